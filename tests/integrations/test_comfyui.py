"""ComfyUI's nodes: what a sampler of ComfyUI gets from a bundle is what the original UNet gives."""

# ruff: noqa: F811 (a fixture of helpers_comfy)

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_comfy import METHODS, USED, comfy  # noqa: F401

import districompile as dc
from districompile.models.autoencoder import VaeDecoder

diffusers = pytest.importorskip("diffusers")

FOLDER = Path(__file__).resolve().parents[2] / "integrations" / "comfyui"
STEPS = [900.0, 700.5, 500.25, 300.0, 100.0]


def load_nodes() -> Any:
    """Import the nodes as ComfyUI does: a folder by its path."""
    spec = importlib.util.spec_from_file_location(
        "comfyui_districompile", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules["comfyui_districompile"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return sys.modules["comfyui_districompile.nodes"]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    found = load_nodes()
    yield found
    for workers in found._workers.values():
        workers.close()
    sys.modules.pop("comfyui_districompile", None)


def unet_of(xl: bool) -> Any:
    torch.manual_seed(0)
    more = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80,
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=2048 if xl else 768,
        attention_head_dim=4, layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **(more if xl else {}),
    ).eval()  # fmt: skip


def arguments(xl: bool, batch: int) -> dict[str, Any]:
    made: dict[str, Any] = {
        "sample": torch.randn(batch, 4, 16, 16), "timestep": torch.tensor(5.0),
        "encoder_hidden_states": torch.randn(batch, 7, 2048 if xl else 768),
    }  # fmt: skip
    if xl:
        made["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, 32), "time_ids": torch.randn(batch, 6)}
    return made


def bundle_of(unet: Any, folder: Path, xl: bool, batch: int = 2) -> Path:
    program = dc.convert(unet, kwargs=arguments(xl, batch), ranks=2, rows={"sample": 2}, warmup_steps=2)
    program.save(folder, backend="eager")
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["sd", "xl"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, bool]:
    unet = unet_of(request.param)
    return unet, bundle_of(unet, tmp_path_factory.mktemp("comfy") / "unet", request.param), request.param


def sampled(model: Any, x: torch.Tensor, c: dict[str, Any]) -> list[torch.Tensor]:
    """Call a model as a sampler of ComfyUI does, and return its result of each step."""
    found = []
    with torch.inference_mode():
        for t in STEPS:
            out = model.apply_model(x, torch.full((x.shape[0],), t), **c)
            found.append(out)
            x = 0.97 * x - 0.1 * out
    return found


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_model_of_comfyui_draws_what_the_unet_draws(nodes: Any, made: Any, comfy: None) -> None:
    unet, folder, xl = made
    (patcher,) = nodes.NODE_CLASS_MAPPINGS["DistricompileLoadBundle"]().load(str(folder))
    model = patcher.clone().model
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 2048 if xl else 768)
    given: dict[str, Any] = {"c_crossattn": text}
    want: dict[str, Any] = {"encoder_hidden_states": text}
    if xl:
        pooled = torch.randn(2, 32)
        given["y"] = model.encode_adm(pooled_output=pooled, width=96, height=64, crop_w=3, target_height=60)
        ids = torch.tensor([[64.0, 96, 0, 3, 60, 96]]).expand(2, 6)
        want["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
    out = sampled(model, x, given)
    with torch.no_grad():
        first = unet(x, torch.tensor(STEPS[0]), **want).sample
    assert torch.allclose(out[0], first, rtol=1e-5, atol=1e-5)
    with nodes.load_bundle(str(folder)).exact():
        exact = sampled(model, x, given)
    y = x
    for t, found in zip(STEPS, exact, strict=True):
        with torch.no_grad():
            assert torch.allclose(found, unet(y, torch.tensor(t), **want).sample, rtol=1e-5, atol=1e-5)
        y = 0.97 * y - 0.1 * found
    assert torch.equal(sampled(model, x, given)[-1], out[-1])  # the next picture starts anew
    # One sample, and four, of a bundle for two
    one = {n: v[:1] for n, v in given.items()}
    assert torch.allclose(model.apply_model(x[:1], torch.tensor([STEPS[0]]), **one), first[:1], rtol=1e-5, atol=1e-5)
    four = {n: v.repeat(2, *[1] * (v.ndim - 1)) for n, v in given.items()}
    twice = model.apply_model(x.repeat(2, 1, 1, 1), torch.full((4,), STEPS[0]), **four)
    assert torch.allclose(twice, first.repeat(2, 1, 1, 1), rtol=1e-5, atol=1e-5)
    assert model.memory_required([2, 4, 16, 16]) == 0 and patcher.size == 0


@pytest.mark.slow
@pytest.mark.multiprocess
def test_what_a_bundle_cannot_do_is_refused(nodes: Any, made: Any, comfy: None) -> None:
    _, folder, xl = made
    if xl:
        pytest.skip("the same for both")
    (patcher,) = nodes.NODE_CLASS_MAPPINGS["DistricompileLoadBundle"]().load(str(folder))
    x, t = torch.randn(2, 4, 16, 16), torch.full((2,), 5.0)
    c: dict[str, Any] = {"c_crossattn": torch.randn(2, 7, 768)}
    options = {"cond_or_uncond": [1, 0], "sigmas": t, "patches": {}, "patches_replace": {"attn2": {}}}
    assert (
        patcher.model.apply_model(x, t, transformer_options=options, control={"output": [None]}, **c).shape == x.shape
    )
    for given, message in (
        ({"control": {"output": [x]}}, "a ControlNet"),
        ({"transformer_options": {"patches": {"output_block_patch": [print]}}}, "a patch of its attention"),
        ({"transformer_options": {"patches_replace": {"attn1": {("middle", 0): print}}}}, "a patch of its attention"),
        ({"transformer_options": {"wrappers": {"diffusion_model": {None: [print]}}}}, "a wrapper"),
        ({"guidance": x}, "the input guidance"),
    ):
        with pytest.raises(dc.InputError, match=message):
            patcher.model.apply_model(x, t, **c, **given)
    with pytest.raises(dc.InputError, match="converted for 16x16, called with 8x8"):
        patcher.model.apply_model(x[..., :8, :8], t, **c)
    with pytest.raises(dc.InputError, match="3 samples in one call, and the bundle has batches of 2"):
        patcher.model.apply_model(x[:1].expand(3, -1, -1, -1), t, c_crossattn=torch.randn(3, 7, 768))
    for changed in (patcher, patcher.clone()):
        with pytest.raises(dc.InputError, match="refit BUNDLE --lora"):
            changed.add_patches({}, 0.8)
        assert changed.add_patches({}, 0.0) == []
    with pytest.raises(dc.InputError, match="one of epsilon, v_prediction"):
        nodes.model_class({}, "sample")
    with pytest.raises(dc.InputError, match="none of Stable Diffusion 1, 2 and XL"):
        nodes.model_class({"num_single_layers": 38}, "epsilon")
    config = {"down_block_types": ("DownBlock2D",), "cross_attention_dim": 1024}
    assert nodes.model_class(config, "v_prediction") == ("SD20", "BaseModel", "V_PREDICTION")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_latents_are_decoded_by_the_workers_of_the_unet(nodes: Any, made: Any, comfy: None, tmp_path: Path) -> None:
    if made[2]:
        pytest.skip("the same for both")
    unet = nodes.load_bundle(str(made[1]))
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
    ).eval()  # fmt: skip
    decoder = VaeDecoder(vae)
    program = dc.convert(decoder, (torch.randn(1, 4, 16, 16),), ranks=2, rows={"z": 2}, phases="auto")
    program.save(tmp_path / "vae", backend="eager")
    latents = torch.randn(2, 4, 16, 16)
    (image,) = nodes.NODE_CLASS_MAPPINGS["DistricompileDecode"]().decode({"samples": latents}, str(tmp_path / "vae"))
    with torch.no_grad():
        want = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    assert image.shape == (2, 32, 32, 3) and torch.allclose(image, want, atol=1e-5)
    assert len(nodes._workers) == 1 and nodes.load_bundle(str(made[1])) is unet
    with pytest.raises(dc.InputError, match="a VAE's decoder"):
        nodes.NODE_CLASS_MAPPINGS["DistricompileDecode"]().decode({"samples": latents}, str(made[1]))
    # Ranks that were lost are started again, and ComfyUI is told that the node has to run anew
    before = nodes.fingerprint(str(made[1]))
    nodes._workers[2].close()
    assert nodes.fingerprint(str(made[1])) != before
    assert nodes.load_bundle(str(made[1])) is not unet and nodes.fingerprint(str(made[1])) == before
    assert "nothing" in nodes.fingerprint(str(tmp_path / "nothing"))


def test_nodes_have_what_comfyui_reads(nodes: Any) -> None:
    assert set(nodes.NODE_CLASS_MAPPINGS) == set(nodes.NODE_DISPLAY_NAME_MAPPINGS)
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()["required"]
        parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
        assert [p for p in parameters if p != "self"] == list(inputs)
        assert isinstance(node.RETURN_TYPES, tuple) and node.CATEGORY
        assert "bundle" in inspect.signature(node.IS_CHANGED).parameters


def test_the_double_is_what_comfyui_is() -> None:
    """Compare the names and parameters that the nodes use, where ComfyUI is installed."""
    pytest.importorskip("comfy.model_base")
    for name, used in USED.items():
        module = importlib.import_module(name)
        for attribute, parameters in used.items():
            assert set(parameters) <= set(inspect.signature(getattr(module, attribute)).parameters), attribute
    for name, methods in METHODS.items():
        module, _, owner = name.partition(":")
        found = getattr(importlib.import_module(module), owner)
        assert all(hasattr(found, method) for method in methods)
