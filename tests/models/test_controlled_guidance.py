"""Test UNets with ControlNets whose guidance halves are split over the ranks: exact and displaced, on 2 and 4."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import pipeline_attached  # noqa: E402
import pipeline_kinds  # noqa: E402
import pipeline_parts as parts  # noqa: E402

import districompile as dc  # noqa: E402
from districompile.models.inputs import Example  # noqa: E402
from districompile.models.sources import load_source  # noqa: E402

assert pipeline_attached  # it adds its kinds


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A UNet with a ControlNet in it, as ``convert`` loads it."""
    folder = tmp_path_factory.mktemp("guided")
    parts.unet().save_pretrained(folder / "unet")
    parts.controlnet().save_pretrained(folder / "net")
    loaded = load_source(f"{folder / 'unet'}+controlnet:{folder / 'net'}")
    example = loaded.example(16, 12, cfg="batch")
    example.kwargs["mid_block_additional_residual"][0] = 0.0  # guess mode: the unguided half has none
    return loaded, example


def _steps(example: Example) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the calls of an image: falling timesteps, and a sample that moves a little."""
    sample, _, *rest = example.args
    drift = torch.randn(sample.shape, generator=torch.Generator().manual_seed(5))
    times = (900, 700, 500)
    return [((sample + 0.05 * i * drift, torch.tensor(t), *rest), example.kwargs) for i, t in enumerate(times)]


def _half(value: Any, index: int) -> Any:
    """Return one guidance half of the arguments."""
    return torch.utils._pytree.tree_map(
        lambda v: v[index : index + 1] if isinstance(v, torch.Tensor) and v.ndim else v, value
    )


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_split_guidance_with_controlnets(model: Any, ranks: int) -> None:
    loaded, example = model
    calls = _steps(example)
    rows = example.rows
    split = dc.convert(loaded.module, calls[0][0], calls[0][1], ranks=ranks, rows=rows, cfg="split", warmup_steps=1)
    with torch.no_grad():
        want = [loaded.module(*a, **k).sample for a, k in calls]
    for (a, k), one in zip(calls, want, strict=True):
        got = split.simulate(*a, phase="exact", **k).sample
        assert (got - one).abs().max() <= 1e-5 * one.abs().max()
    # Displaced, each half is what its own ranks compute of it alone
    split.reset()
    halves = []
    alone = dc.convert(loaded.module, *_half(calls[0], 0), ranks=ranks // 2, rows=rows, warmup_steps=1)
    for index in range(2):
        alone.reset()
        phases = ["exact", *["displaced"] * (len(calls) - 1)]
        found = []
        for call, phase in zip(calls, phases, strict=True):
            a, k = _half(call, index)
            found.append(alone.simulate(*a, phase=phase, **k).sample)
        halves.append(found)
    moved = 0.0
    for i, (a, k) in enumerate(calls):
        got = split.simulate(*a, phase="displaced" if i else "exact", **k).sample
        expected = torch.cat([half[i] for half in halves])
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
        moved = max(moved, float((got - want[i]).abs().max() / want[i].abs().max()))
    assert moved <= 1e-5 if ranks == 2 else 1e-5 < moved < 0.2  # a rank that has a whole half is exact


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["controlnet_one", "controlnet_two", "controlnet_guess", "controlnet_in_part"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_split_guidance_of_pipelines(kind: str, ranks: int, tmp_path: Path) -> None:
    """ControlNets as networks of their own, whose residuals are inputs of the UNet."""
    pipe, draw = pipeline_kinds.KINDS[kind].make()
    want = draw(6)
    given = {"backend": "eager", "cache": tmp_path, "cfg": "split", "warmup_steps": 2, "drift_limit": 0.0}
    with dc.enable(pipe, ranks, lockstep=True, **given) as enabled:
        with enabled.exact():
            assert (draw(6) - want).abs().max() <= 1e-4 * want.abs().max()
        enabled.reset()
        first = draw(6)
        assert torch.equal(first, draw(6)) and (first - want).abs().max() <= 0.1 * want.abs().max()
        found = enabled.components.items()
        modules = {name: live.modules[-1] for name, live in found if not name.startswith("vae")}
        assert modules["unet"].image_calls["displaced"]
        if kind != "controlnet_guess":  # whose ControlNet is called with one half alone
            assert all(module.plan.options.cfg == "split" for module in modules.values())
