"""Engines against the eager oracle, on a GPU that an installed TensorRT runs on. Elsewhere: skipped, saying why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import districompile as dc
from districompile.backends.tensorrt import TensorRTBackend
from districompile.backends.tensorrt.library import installed, present_gpu
from districompile.testing import make_segment
from tests.helpers_segments import run_on_gpu
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
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    # PyTorch computes convolutions of float32 in TF32, unless it is told not to. Engines never do.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("weights", ["bound", "refit", "inside"])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("name", ["sd15", "sdxl", "unet2d", "vae_decoder"])
def test_engines_equal_the_oracle(name: str, dtype: torch.dtype, weights: Any, tmp_path: Path) -> None:
    if TensorRTBackend().library.is_v8 and (weights != "inside" or dtype == torch.bfloat16):
        pytest.skip("TensorRT 8.6 has its weights inside, and no bfloat16")
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
        for n, phase in enumerate(("exact", "displaced", "displaced") if "timestep" in kwargs else ("exact",)):
            unet.phase = phase  # type: ignore[assignment]
            moved = {"timestep": kwargs["timestep"] - n} if n else {}  # else an image of its own would begin
            outputs[which].append(first(unet(**{**kwargs, **moved})).cpu())
    for got, want in zip(outputs["engines"], outputs["oracle"], strict=True):
        assert relative_error(got, want) <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_engine_in_a_cuda_graph(dtype: torch.dtype, tmp_path: Path) -> None:
    """Operators that are rewritten for TensorRT 8.6, an int64 input and an int64 output, replayed."""
    functional = torch.nn.functional

    def block(x: torch.Tensor, i: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = functional.group_norm(functional.conv2d(functional.pad(x, (1, 1, 1, 1), "circular"), w), 2)
        y = functional.gelu(y * i.to(y.dtype).reshape(1, -1, 1, 1)) + functional.gelu(y, approximate="tanh")
        z = y.flatten(2).transpose(1, 2)
        a, b = functional.linear(functional.layer_norm(z, (8,)), v).split([3, 5], -1)
        return functional.scaled_dot_product_attention(z, z, z), a.sum((1, 2)), b.amax(1, keepdim=True), i + 1

    generator = torch.Generator().manual_seed(0)
    x, w, v = (torch.randn(s, generator=generator).to(dtype) for s in ((2, 4, 6, 5), (8, 4, 3, 3), (8, 8)))
    inputs, weights = {"x": x, "i": torch.arange(1, 9)}, {"w": w * 0.2, "v": v * 0.3}
    segment = make_segment(block, inputs, weights)
    mode: Any = "inside" if TensorRTBackend().library.is_v8 else None
    on_gpu = {n: t.cuda() for n, t in inputs.items()}
    found = run_on_gpu(TensorRTBackend(weights=mode), segment, on_gpu, weights, tmp_path)
    wide = [t.double() if t.is_floating_point() else t for t in (*inputs.values(), *weights.values())]
    for got, want in zip(found.values(), block(*wide), strict=True):
        if not want.is_floating_point():
            assert got.dtype == torch.int64 and torch.equal(got.cpu(), want)
        else:
            assert relative_error(got.cpu(), want) <= TOLERANCES[dtype]


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
