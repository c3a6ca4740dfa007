"""Engines against the eager oracle, on a GPU that an installed TensorRT runs on. Elsewhere: skipped, saying why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import districompile as dc
from districompile.backends.tensorrt import TensorRTBackend
from districompile.backends.tensorrt.library import installed, present_gpu
from tests.small_models import MODELS, first, relative_error

pytestmark = [pytest.mark.tensorrt, pytest.mark.gpu]


def why_not() -> str | None:
    """Why no engine can run here, or None."""
    gpu = present_gpu()
    if gpu is None:
        return "no NVIDIA GPU here: TensorRT engines were built, not run"
    reasons = [r if isinstance(r, str) else r.runs_on(gpu) for r in installed().values()]
    return None if None in reasons else "; ".join(str(r) for r in reasons)


TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 5e-2}


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("weights", ["bound", "refit", "inside"])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("name", ["sd15", "sdxl", "unet2d", "vae_decoder"])
def test_engines_equal_the_oracle(name: str, dtype: torch.dtype, weights: Any, tmp_path: Path) -> None:
    module, kwargs = MODELS[name](1, 16, 16)

    def cast(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: cast(v) for k, v in value.items()}
        return value.to(dtype) if value.is_floating_point() and value.ndim else value

    kwargs = {k: cast(v) for k, v in kwargs.items()}
    program = dc.convert(module.to(dtype), kwargs=kwargs, ranks=2)
    program.save(tmp_path / "engines", backend=TensorRTBackend(weights=weights))
    program.save(tmp_path / "oracle", backend="eager")
    outputs: dict[str, list[torch.Tensor]] = {}
    for which in ("engines", "oracle"):
        unet = dc.load(tmp_path / which, lockstep=True, device="cuda")
        outputs[which] = []
        for phase in ("warmup", "steady", "steady"):
            unet.phase = phase  # type: ignore[assignment]
            outputs[which].append(first(unet(**kwargs)).cpu())
    for got, want in zip(outputs["engines"], outputs["oracle"], strict=True):
        assert relative_error(got, want) <= TOLERANCES[dtype]


def test_a_second_load_finds_the_runtime_cache(tmp_path: Path) -> None:
    module, kwargs = MODELS["unet2d"](1, 16, 16)
    program = dc.convert(module, kwargs=kwargs, ranks=2)
    backend = TensorRTBackend()
    program.save(tmp_path / "b", backend=backend)
    unet = dc.load(tmp_path / "b", lockstep=True, backend=backend)
    unet(**kwargs)
    for cache in backend._caches.values():
        cache.save()
    if backend.library.flavour == "tensorrt_rtx":
        assert list((tmp_path / "b" / "cache").glob("*.cache"))
    dc.load(tmp_path / "b", lockstep=True)(**kwargs)
