"""Test pipelines whose networks are computed by several ranks: results, changes that are followed, and refusals."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_attached import lora_of
from pipeline_kinds import KINDS, tensor_of
from pipeline_parts import text

import districompile as dc
from districompile.backends.eager import EagerBackend
from districompile.errors import InputError, LaunchError


def draw(pipe: Any, steps: int = 4, **given: Any) -> torch.Tensor:
    found = pipe(
        num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="latent", height=16,
        width=16, **text(), **given,
    )  # fmt: skip
    return tensor_of(found)


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((got - want).abs().max() <= 1e-4 * want.abs().max())


@torch.no_grad()
def denoise(pipe: Any, scale: float) -> torch.Tensor:
    """Call the UNet once, with a factor for all adapters."""
    states = text()["prompt_embeds"].repeat(2, 1, 1)
    sample = torch.ones(2, 4, 8, 8)
    return pipe.unet(sample, 5, states, cross_attention_kwargs={"scale": scale}).sample  # type: ignore[no-any-return]


def one_device(pipe: Any, enabled: Any, call: Any = draw, **given: Any) -> torch.Tensor:
    """Draw with the pipeline's own computation."""
    forward = pipe.unet.__dict__.pop("forward")
    try:
        return call(pipe, **given)
    finally:
        pipe.unet.__dict__["forward"] = forward


def conversions(cache: Path) -> int:
    return len(list(cache.iterdir()))


def test_unet_equals_one_device_and_is_restored(pipe: Any, enabled: Any, cache: Path) -> None:
    want = one_device(pipe, enabled)
    assert same(draw(pipe), want)
    (module,) = enabled.components["unet"].modules
    assert module.image_calls == {"exact": 4, "displaced": 0}
    enabled.phase = None
    draw(pipe, 8)
    assert module.image_calls == {"exact": 2, "displaced": 6}
    enabled.close()
    assert "forward" not in pipe.unet.__dict__ and torch.equal(draw(pipe), want)


@pytest.mark.slow
def test_lora_by_name_is_a_refit(pipe: Any, enabled: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = draw(pipe)
    made = conversions(cache)
    given = {"one": lora_of(pipe.unet), "two": lora_of(pipe.unet, 900)}
    for name, weights in given.items():
        pipe.load_lora_weights(weights, adapter_name=name)
    pipe.set_adapters(["one", "two"], [0.8, 0.4])
    both = draw(pipe)
    assert same(both, one_device(pipe, enabled)) and not same(both, base)
    monkeypatch.setattr(EagerBackend, "reads_weights", False)  # as backends whose engines hold copies
    enabled.components["unet"]._loaded.clear()
    assert same(draw(pipe), both)
    pipe.set_adapters("two")
    assert same(draw(pipe), one_device(pipe, enabled))
    assert same(denoise(pipe, 0.5), one_device(pipe, enabled, denoise, scale=0.5))
    assert not same(denoise(pipe, 0.5), denoise(pipe, 1.0))
    monkeypatch.undo()
    pipe.fuse_lora(adapter_names=["two"])
    assert same(draw(pipe), one_device(pipe, enabled))
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert same(draw(pipe), base)
    assert conversions(cache) == made


def test_features_are_followed(pipe: Any, enabled: Any, cache: Path) -> None:
    base, made = draw(pipe), conversions(cache)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert same(draw(pipe), one_device(pipe, enabled)) and conversions(cache) == made + 1
    pipe.disable_freeu()
    assert same(draw(pipe), base) and conversions(cache) == made + 1


def test_few_steps_are_said(pipe: Any, enabled: Any) -> None:
    enabled.phase = None
    with pytest.warns(UserWarning, match="all 2 steps of this image are exact"):
        draw(pipe, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        draw(pipe, 2)


def test_refusals(pipe: Any, cache: Path) -> None:
    with pytest.raises(LaunchError, match="torchrun --nproc-per-node 4"):
        dc.enable(pipe, 4)
    with pytest.raises(InputError, match="no component 'net'; it has: vae, unet"):
        dc.enable(pipe, 2, lockstep=True, components=["net"])
    with pytest.raises(InputError, match="no option 'warmup'; the options of a conversion are: .*warmup_steps"):
        dc.enable(pipe, 2, lockstep=True, warmup=1)
    with dc.enable(pipe, 2, lockstep=True, components=["unet"], backend="eager", cache=cache):
        with pytest.raises(InputError, match="unet has a forward that is not its class's"):
            dc.enable(pipe, 2, lockstep=True, components=["unet"], backend="eager")
        pipe.unet.conv_in.register_forward_hook(lambda *_: None)
        with pytest.raises(InputError, match="unet.conv_in has a forward hook"):
            draw(pipe)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ip_adapter", "controlnet_in_part", "gligen", "guidance_that_stops", "kandinsky_2_2"])
def test_kinds(name: str, cache: Path) -> None:
    pipe, drawn = KINDS[name].make()
    want = drawn(3)
    with dc.enable(pipe, 2, lockstep=True, backend="eager", cache=cache) as enabled:
        enabled.phase = "exact"
        assert same(drawn(3), want)
        assert enabled.components["unet"].modules
