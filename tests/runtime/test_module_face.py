"""A converted module in place of the original: each thing that pipelines and users do to it works, or is refused with
one line that says what to do instead."""

# ruff: noqa: F811 (fixtures of helpers_face)

from __future__ import annotations

import copy
import io
import math
import pickle
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from helpers_face import bundle, check, example, net, pipeline, shared, unet, want  # noqa: F401

import districompile as dc
from districompile.errors import InputError, UnsupportedError
from districompile.ir.spec import TensorSpec
from districompile.runtime.face.placeholders import Config, attention_processors
from districompile.runtime.module import DistributedModule

# What pipelines read


def test_parameters_as_the_original_has_them(unet: DistributedModule, net: Any) -> None:
    found, expected = dict(unet.named_parameters()), dict(net.named_parameters())
    assert next(iter(found)) == next(iter(expected))
    assert {n: p.shape for n, p in found.items()} == {n: p.shape for n, p in expected.items()}
    first = next(unet.parameters())
    assert first.dtype == torch.float32 and first.device == unet.device and not first.requires_grad
    assert unet.num_parameters() == net.num_parameters() and unet.num_parameters(only_trainable=True) == 0
    assert unet.get_memory_footprint() == net.get_memory_footprint()
    assert unet.get_parameter("conv_in.weight").shape == net.conv_in.weight.shape
    assert first.to("cpu") is first and first.detach() is first and "WeightPlaceholder" in repr(first)
    unet.zero_grad()


WRITES: dict[str, Callable[[Any], Any]] = {
    "data": lambda p: p.data.mul_(2),
    "set data": lambda p: setattr(p, "data", torch.zeros(1)),
    "copy_": lambda p: p.copy_(torch.zeros(p.shape)),
    "add": lambda p: p + 1,
    "clone": lambda p: p.clone(),
    "to": lambda p: p.to(torch.float64),
    "norm": lambda p: torch.linalg.vector_norm(p),
    "item": lambda p: p.sum().item(),
    "numpy": lambda p: p.numpy(),
    "tolist": lambda p: p.tolist(),
    "storage": lambda p: p.untyped_storage(),
    "data_ptr": lambda p: p.data_ptr(),
    "set grad": lambda p: setattr(p, "grad", torch.zeros(p.shape)),
    "requires_grad_": lambda p: p.requires_grad_(),
    "requires_grad": lambda p: setattr(p, "requires_grad", True),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
}


@pytest.mark.parametrize("name", WRITES)
def test_parameters_have_no_values(unet: DistributedModule, name: str) -> None:
    with torch.no_grad(), pytest.raises(InputError, match="refit|train the original"):
        WRITES[name](next(unet.parameters()))


def test_attributes_of_the_original(unet: DistributedModule, net: Any) -> None:
    assert unet.encoder_hid_proj is None and unet.class_embedding is None
    assert list(unet.attn_processors) == list(net.attn_processors)
    assert unet.in_channels == 4 and unet.config.sample_size == net.config.sample_size
    assert not unet.is_gradient_checkpointing and not unet.training and unet.eval() is unet
    assert len(unet.up_blocks) == len(net.up_blocks) and len(list(unet.down_blocks)) == 2
    assert unet.down_blocks[-1].resnets[0].conv1.weight.shape == net.down_blocks[-1].resnets[0].conv1.weight.shape
    assert unet.time_embedding.linear_1.in_features == net.time_embedding.linear_1.in_features
    assert not hasattr(unet, "text_encoder_hid_proj") and not hasattr(unet.mid_block, "motion_modules")
    assert not hasattr(unet, "peft_config") and not hasattr(unet, "_hf_hook")
    with unet.cache_context("cond"):
        pass
    with pytest.raises(IndexError):
        unet.up_blocks[2]


def test_image_prompt_adapters_are_not_skipped() -> None:
    """Diffusers sets the scale of an adapter on processors of its classes: ours must be met, and refuse."""
    spec = TensorSpec((4, 4), torch.float32)
    names = ("a.attn1.to_q.weight", "a.attn2.to_q.weight", "a.attn2.processor.to_k_ip.0.weight")
    plain, adapted = attention_processors(dict.fromkeys(names, spec)).values()
    cls = diffusers.models.attention_processor.IPAdapterAttnProcessor2_0
    assert isinstance(adapted, cls) and not isinstance(plain, cls)
    with pytest.raises(UnsupportedError, match=r"a.attn2.processor.scale .* convert it again"):
        _ = adapted.scale
    with pytest.raises(InputError, match="cannot be set"):
        adapted.scale = [1.0]


# What would change layers or weights


class Block(torch.nn.Module):
    pass


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "modules": (lambda u: list(u.modules()), r"modules\(\): .* convert it again"),
    "named_modules": (lambda u: dict(u.named_modules()), r"modules\(\)"),
    "children": (lambda u: list(u.children()), r"children\(\)"),
    "of a module around it": (lambda u: list(torch.nn.Sequential(u).modules()), r"modules\(\)"),
    "gligen": (
        lambda u: diffusers.StableDiffusionGLIGENPipeline.enable_fuser(types.SimpleNamespace(unet=u), True),
        r"modules\(\)",
    ),
    "get_submodule": (lambda u: u.get_submodule("mid_block"), "get_submodule"),
    "apply": (lambda u: u.apply(print), "apply: "),
    "state_dict": (lambda u: u.state_dict(), "weights.safetensors"),
    "load_state_dict": (lambda u: u.load_state_dict({}, strict=False), "districompile refit"),
    "load_state_dict around": (lambda u: torch.nn.Sequential(u).load_state_dict({}, strict=False), "refit"),
    "register_buffer": (lambda u: u.register_buffer("x", torch.zeros(1)), "register_buffer"),
    "register_parameter": (lambda u: u.register_parameter("x", None), "register_parameter"),
    "add_module": (lambda u: u.add_module("x", Block()), "add_module"),
    "backward hook": (lambda u: u.register_full_backward_hook(print), "no gradients"),
    "half": (lambda u: u.half(), r"to\(float16\): .* float32: .* --dtype float16"),
    "bfloat16": (lambda u: u.bfloat16(), "--dtype bfloat16"),
    "to dtype": (lambda u: u.to("cpu", torch.float64), "--dtype float64"),
    "type": (lambda u: u.type(torch.float16), "--dtype float16"),
    "half around": (lambda u: torch.nn.Sequential(u).half(), "--dtype float16"),
    "to device": (lambda u: u.to("meta"), r"to\('meta'\): .* on cpu and stays there: load the bundle with device="),
    "to_empty": (lambda u: u.to_empty(device="cpu"), "to_empty"),
    "share_memory": (lambda u: u.share_memory(), "share_memory"),
    "train": (lambda u: u.train(), "train the original module"),
    "train around": (lambda u: torch.nn.Sequential(u).train(), "train the original module"),
    "training": (lambda u: setattr(u, "training", True), "train the original module"),
    "requires_grad_": (lambda u: u.requires_grad_(), "train the original module"),
    "copy": (copy.copy, "load the bundle again"),
    "deepcopy": (copy.deepcopy, "load the bundle again"),
    "pickle": (pickle.dumps, "load the bundle again"),
    "torch.save": (lambda u: torch.save(u, io.BytesIO()), "load the bundle again"),
    "set a layer": (lambda u: setattr(u, "conv_in", Block()), "conv_in cannot be set"),
    "set a layer to None": (lambda u: setattr(u, "mid_block", None), "mid_block cannot be set"),
    "new layer": (lambda u: setattr(u, "extra", Block()), "extra cannot be set"),
    "set a method": (lambda u: setattr(u, "set_attn_processor", print), "set_attn_processor cannot be set"),
    "deep setting": (lambda u: setattr(u.mid_block.attentions[0], "x", 1), r"mid_block.attentions.0.x cannot be set"),
    "call a layer": (lambda u: u.conv_in(1), "conv_in cannot be called alone"),
    "hook of a layer": (lambda u: u.mid_block.register_forward_hook(print), "register_forward_hook is not part"),
    "processor": (lambda u: setattr(next(iter(u.attn_processors.values())), "x", 1), "x cannot be set"),
    "set_attn_processor": (lambda u: u.set_attn_processor({}), "convert it again"),
    "fuse_qkv_projections": (lambda u: u.fuse_qkv_projections(), "convert it again"),
    "enable_freeu": (lambda u: u.enable_freeu(s1=1, s2=1, b1=1, b2=1), "convert it again"),
    "disable_freeu": (lambda u: u.disable_freeu(), "convert it again"),
    "lora": (lambda u: u.load_lora_adapter({}), "districompile refit BUNDLE --lora FILE"),
    "fuse_lora": (lambda u: u.fuse_lora(), "districompile refit BUNDLE --lora FILE"),
    "load_lora_weights": (lambda u: u.load_lora_weights("x"), "districompile refit BUNDLE --lora FILE"),
    "image prompts": (lambda u: u._load_ip_adapter_weights([]), "convert it again"),
    "slicing": (lambda u: u.set_attention_slice("auto"), "set_attention_slice: .* leave this call out"),
    "save_pretrained": (lambda u: u.save_pretrained("x"), "districompile.load"),
    "hooks": (
        lambda u: diffusers.hooks.HookRegistry.check_if_exists_or_initialize(u), "hooks do not apply here"
    ),
    "cache": (
        lambda u: diffusers.apply_pyramid_attention_broadcast(
            u, diffusers.PyramidAttentionBroadcastConfig(2, current_timestep_callback=lambda: 1)
        ),
        r"modules\(\)",
    ),
    "trace": (lambda u: torch.jit.trace(lambda x: u(**{**example(), "sample": x})[0], example()["sample"]), "traced"),
    "export": (lambda u: torch.export.export(u, (), example()), r"modules\(\)|exported"),
    "unknown": (lambda u: u.nothing, "nothing is not part of a converted module"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_way_out(unet: DistributedModule, want: torch.Tensor, name: str) -> None:
    action, message = REFUSED[name]
    with torch.no_grad(), pytest.raises(InputError, match=message) as caught:
        action(unet)
    assert "\n" not in str(caught.value)
    check(unet, want)


def test_what_changes_nothing_works(unet: DistributedModule, want: torch.Tensor) -> None:
    assert unet.to("cpu") is unet and unet.to(torch.float32) is unet and unet.float() is unet and unet.cpu() is unet
    assert unet.to(memory_format=torch.channels_last) is unet and unet.requires_grad_(False) is unet
    assert unet.train(False) is unet
    around = torch.nn.Sequential(unet).eval().to(torch.float32)
    assert len(list(around.parameters())) == len(list(unet.parameters()))
    unet.set_attention_slice(None)
    unet.set_use_memory_efficient_attention_xformers(False, None)
    unet.disable_xformers_memory_efficient_attention()
    unet.unfuse_qkv_projections()
    unet.encoder_hid_proj = None
    unet.note = "of a user"
    unet.compile()
    check(unet, want)


def test_configuration_is_not_changed(unet: DistributedModule) -> None:
    config = Config(a=1)
    for change in (lambda: config.update(a=2), lambda: setattr(config, "a", 2), lambda: config.pop("a")):
        with pytest.raises(InputError, match="built in"):
            change()
    assert copy.deepcopy(config) == {"a": 1} and config.a == 1
    with pytest.raises(AttributeError):
        unet.config = {}


# Pipelines


def test_a_pipeline_is_moved_and_saved(unet: DistributedModule, tmp_path: Path) -> None:
    pipe = pipeline(unet)
    assert pipe.to("cpu").to(torch.float32).unet is unet and pipe._execution_device == unet.device
    for change, message in (
        (lambda: pipe.to(torch.float16), "--dtype float16"),
        (lambda: pipe.to("meta"), "stays there"),
        (lambda: pipe.enable_attention_slicing(), "leave this call out"),
        (lambda: pipe.enable_xformers_memory_efficient_attention(), "leave this call out"),
        (lambda: pipe.enable_group_offload(torch.device("cpu")), "leave this call out"),
        (lambda: pipe.enable_sequential_cpu_offload(device="cpu"), "state_dict"),
    ):
        with pytest.raises(InputError, match=message):
            change()
    pipe.disable_attention_slicing()
    pipe.disable_xformers_memory_efficient_attention()
    pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "unet").exists()
    assert diffusers.DDIMPipeline.from_pretrained(tmp_path / "saved", unet=unet).unet is unet


def test_inside_of_a_module_of_diffusers(unet: DistributedModule) -> None:
    """A decoder is a part of a larger model, whose own questions walk through it."""
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2).eval()
    vae.decoder = unet
    assert vae.dtype == torch.float32 and vae.device == unet.device and vae.to(torch.float32) is vae
    with pytest.raises(InputError, match="state_dict"):
        vae.state_dict()


def test_other_dtypes(tmp_path: Path) -> None:
    """The dtype of a module is that of its weights."""
    net = torch.nn.Conv2d(2, 2, 3, padding=1).to(torch.bfloat16).eval()
    x = torch.randn(1, 2, 8, 8).to(torch.bfloat16)
    dc.convert(net, args=(x,), ranks=2, rows={"input": 2}).save(tmp_path / "b", backend="eager")
    unet = dc.load(tmp_path / "b", lockstep=True)
    assert next(unet.parameters()).dtype == torch.bfloat16 and unet.bfloat16() is unet
    assert unet.weight.shape == net.weight.shape and unet.num_parameters() == sum(
        math.prod(p.shape) for p in net.parameters()
    )
    with pytest.raises(InputError, match="converted as bfloat16: .* --dtype float32"):
        unet.float()
    with pytest.raises(InputError, match="weight cannot be removed"):
        del unet.weight
    assert not hasattr(unet, "attn_processors")
