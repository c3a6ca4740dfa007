"""A converted module in place of the original: each thing that pipelines and users do to it works, or is refused with
one line that says what to do instead."""

from __future__ import annotations

import copy
import io
import math
import pickle
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import districompile as dc
from districompile.errors import InputError, UnsupportedError
from districompile.ir.plan import TensorSpec
from districompile.runtime.module import DistributedModule
from districompile.runtime.placeholders import Config, attention_processors

diffusers = pytest.importorskip("diffusers")
from small_models import randomise  # noqa: E402


def example() -> dict[str, Any]:
    g = torch.Generator().manual_seed(3)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=g),
        "timestep": torch.tensor(521.0),
        "encoder_hidden_states": torch.randn(2, 7, 24, generator=g),
    }


def original() -> Any:
    return randomise(
        diffusers.UNet2DConditionModel(
            sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=24,
            attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def net() -> Any:
    return original()


@pytest.fixture(scope="module")
def bundle(net: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("face") / "bundle"
    dc.convert(net, kwargs=example(), ranks=2, warmup_steps=2, optimise="merge-linears").save(path, backend="eager")
    return path


@pytest.fixture(scope="module")
def shared(bundle: Path) -> DistributedModule:
    return dc.load(bundle, lockstep=True)


@pytest.fixture
def unet(shared: DistributedModule) -> Iterator[DistributedModule]:
    """One module for all tests that leave it as it was."""
    before = dict(shared.__dict__)
    shared.reset()
    yield shared
    for name in shared.__dict__.keys() - before.keys():
        delattr(shared, name)


@pytest.fixture(scope="module")
def want(net: Any) -> torch.Tensor:
    with torch.no_grad():
        return net(**example()).sample


def check(unet: Any, want: torch.Tensor, **changes: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(unet(**{**example(), **changes})[0], want, rtol=1e-4, atol=1e-5)


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


def pipeline(unet: Any) -> Any:
    pipe = diffusers.DDIMPipeline(original(), diffusers.DDIMScheduler())
    pipe.unet = unet
    return pipe


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


# What is switched on around a call


def default_dtype() -> Any:
    class Half:
        def __enter__(self) -> None:
            torch.set_default_dtype(torch.float16)

        def __exit__(self, *error: Any) -> None:
            torch.set_default_dtype(torch.float32)

    return Half()


AROUND: dict[str, Callable[[], Any]] = {
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "default device": lambda: torch.device("meta"),
    "default dtype": default_dtype,
    "autocast off": lambda: torch.autocast("cpu", enabled=False),
    "autocast of another device": lambda: torch.autocast("cuda", dtype=torch.float16),
}


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("name", AROUND)
def test_loaded_and_called_inside(name: str, bundle: Path, unet: DistributedModule, want: torch.Tensor) -> None:
    call = example()
    with AROUND[name]():
        loaded = dc.load(bundle, lockstep=True, verify="quick")
        outputs = [u(**call)[0] for u in (unet, loaded) for _ in range(3)]
    outputs.append(loaded(**call)[0])  # what was loaded inside is of use outside
    for output in (outputs[0], outputs[3]):
        torch.testing.assert_close(output, want, rtol=1e-4, atol=1e-5)
    assert all(o.dtype == want.dtype and not o.is_inference() for o in outputs)


def test_autocast_is_refused(unet: DistributedModule, want: torch.Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(InputError, match="autocast: the dtypes of a converted module are fixed"):
            unet(**example())
        with torch.autocast("cpu", enabled=False):
            check(unet, want)


def test_gradients_are_refused_where_they_are_computed(unet: DistributedModule, want: torch.Tensor) -> None:
    x = example()["sample"].requires_grad_()
    output = unet(**{**example(), "sample": x})[0]
    torch.testing.assert_close(output.detach(), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"no gradients: call it with torch.no_grad"):
        torch.autograd.grad((x - output).sum(), x)
    with torch.no_grad():
        assert not unet(**{**example(), "sample": x})[0].requires_grad


@pytest.mark.parametrize("options", [{}, {"dynamic": True}], ids=str)
def test_compile_passes_it_by(unet: DistributedModule, want: torch.Tensor, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(unet, backend="eager", **options)
    for _ in range(2):
        unet.reset()
        check(compiled, want)
    assert compiled.config.in_channels == 4 and next(compiled.parameters()).dtype == torch.float32
    assert pipeline(compiled)._execution_device.type == "cpu"
    with pytest.raises(InputError, match="--dtype float16"):
        compiled.half()


def test_compile_with_one_graph_says_why_not(unet: DistributedModule, want: torch.Tensor) -> None:
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a converted module is compiled already: leave torch.comp"):
        torch.compile(unet, backend="eager", fullgraph=True)(**example())
    check(unet, want)


def test_called_inside_of_compiled_code(unet: DistributedModule, want: torch.Tensor) -> None:
    torch._dynamo.reset()
    seen: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    @torch.compile(backend=backend)
    def step(x: torch.Tensor) -> torch.Tensor:
        return unet(**{**example(), "sample": x + 0})[0] * 2

    with torch.no_grad():
        torch.testing.assert_close(step(example()["sample"]) / 2, want, rtol=1e-4, atol=1e-5)
    assert all("conv" not in str(node.target) for graph in seen for node in graph.graph.nodes)


def test_hooks(unet: DistributedModule) -> None:
    seen: list[str] = []
    handles = [
        unet.register_forward_pre_hook(lambda *a: seen.append("before")),
        unet.register_forward_hook(lambda *a: seen.append("after")),
    ]
    unet(**example())
    for handle in handles:
        handle.remove()
    unet(**example())
    assert seen == ["before", "after"]


# Timesteps


@pytest.mark.parametrize("given", [torch.tensor([521.0]), torch.full((2,), 521), torch.tensor(521.0).expand(2)])
def test_equal_timesteps_are_one(unet: DistributedModule, want: torch.Tensor, given: torch.Tensor) -> None:
    check(unet, want, timestep=given)


def test_unequal_timesteps_are_refused(unet: DistributedModule) -> None:
    with pytest.raises(InputError, match=r"timestep: .* must be equal, but are \[521, 500\]: call once for each"):
        unet(**{**example(), "timestep": torch.tensor([521, 500])})
    with pytest.raises(InputError, match="called with .3."):
        unet(**{**example(), "timestep": torch.full((3,), 521)})


# Threads, and the end


def draw(unet: Any, seed: int, meet: Callable[[], Any] = lambda: None) -> list[torch.Tensor]:
    """The outputs of six steps. The text differs from seed to seed; the timesteps do not."""
    g = torch.Generator().manual_seed(seed)
    x, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 7, 24, generator=g)
    outputs = []
    with torch.no_grad():
        for i in range(6):
            meet()
            outputs.append(unet(x, torch.tensor(900.0 - 20 * i), text)[0])
            x = x - 0.1 * outputs[-1]
    return outputs


def in_threads(*actions: Callable[[], Any]) -> list[Any]:
    found: list[Any] = [None] * len(actions)

    def run(i: int) -> None:
        try:
            found[i] = actions[i]()
        except BaseException as e:
            found[i] = e

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_threads_that_take_turns_are_exact(bundle: Path, net: Any) -> None:
    """Each call is what the original gives: no image is built on the state of another."""
    unet = dc.load(bundle, lockstep=True, verify="quick")
    barrier = threading.Barrier(2, timeout=60)
    turns = in_threads(*(lambda seed=seed: draw(unet, seed, barrier.wait) for seed in (1, 2)))
    for seed, found in zip((1, 2), turns, strict=True):
        assert isinstance(found, list), found
        # Two calls of one thread in a row happen where the other is late, and are displaced at most
        for a, b in zip(found[:2], draw(net, seed)[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        alone = torch.stack(draw(net, seed))
        assert torch.linalg.vector_norm(torch.stack(found) - alone) < 0.02 * torch.linalg.vector_norm(alone)


def test_strict_turns(unet: DistributedModule, net: Any) -> None:
    """One call of each thread at a time, the second image in the midst of the first."""
    turn = threading.Semaphore(1), threading.Semaphore(0)

    def image(number: int) -> list[torch.Tensor]:
        def meet() -> None:
            assert turn[number].acquire(timeout=60)

        def call(*args: Any) -> Any:
            try:
                return unet(*args)
            finally:
                turn[1 - number].release()

        return draw(call, number, meet)

    for seed, found in enumerate(in_threads(lambda: image(0), lambda: image(1))):
        assert isinstance(found, list), found
        torch.testing.assert_close(torch.stack(found), torch.stack(draw(net, seed)), rtol=1e-4, atol=1e-4)


def test_images_of_threads_one_after_the_other(unet: DistributedModule) -> None:
    """As a server draws: each image in a thread of its own, displaced like any other."""
    first, second = draw(unet, 1), in_threads(lambda: draw(unet, 1))[0]
    assert unet.image_calls["displaced"] > 0 or unet.image_calls["exact"] == 6
    assert torch.equal(torch.stack(first), torch.stack(second))


def test_exact_is_of_one_thread(unet: DistributedModule) -> None:
    inside, done = threading.Event(), threading.Event()

    def holds() -> None:
        with unet.exact():
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=holds)
    thread.start()
    inside.wait(60)
    with unet.exact():
        done.set()
        thread.join(60)
        assert unet._phase == "warmup"  # the other thread has left its own block
    assert unet._phase is None


def test_calls_after_close(bundle: Path) -> None:
    unet = dc.load(bundle, lockstep=True, verify="quick")
    unet(**example())
    unet.close()
    unet.close()
    with pytest.raises(InputError, match="this module was closed: load the bundle again"):
        unet(**example())


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
