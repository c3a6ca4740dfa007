"""Whether 8 bits make a layer faster: what is timed for each kind of layer, without a clock; and on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from districompile.backends.inductor import autotune, convolution, fp8, fp8_speed
from districompile.backends.inductor.backend import InductorBackend
from districompile.backends.inductor.kernels import fp8 as kernels
from districompile.backends.inductor.kernels import hopper
from districompile.ir.layer_size import LayerSize
from districompile.ir.quantised import quantise_features

_UNAVAILABLE = hopper.unavailable_reason()
_LINEAR = LayerSize(64, 32, 160, True, torch.float16)
_IMAGE = LayerSize(
    63, 32, 160, True, torch.float16, False, (1, 32, 9, 7), (160, 32, 3, 3), (1, 1), (0, 1), (1, 1)
)  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """Milliseconds of what is called; 16 bits take 1. Tensors are on the CPU."""
    times: dict[str, float] = {"eight": 0.5, "rounding": 0.1}
    spent: list[float] = []
    for name in ("randn", "rand", "empty", "ones"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *s, make=make, dtype=torch.float32, **_: make(*s).to(dtype))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module in (fp8, fp8_speed, convolution):
        monkeypatch.setattr(module, "unavailable_reason", lambda: None)
    monkeypatch.setattr(fp8, "best_linear", lambda *_: 80)
    monkeypatch.setattr(fp8, "best_convolution", lambda *_: 80)
    monkeypatch.setattr(convolution, "best_convolution", lambda *_: None)

    def eight(*_: Any) -> Tensor:
        spent.append(times["eight"])
        return torch.zeros(1, 1, 1, 1)

    def replay(call: Any) -> Any:
        spent.clear()
        call()
        total = sum(spent) if spent else 1.0
        return lambda: total

    monkeypatch.setattr(kernels, "tiled_convolution", eight)
    monkeypatch.setattr(fp8_speed, "quantise_rows", lambda x: spent.append(times["rounding"]))
    monkeypatch.setattr(autotune, "_replay", replay)
    for function in (fp8_speed._faster_linear, fp8_speed._faster_convolution):
        function.cache_clear()  # type: ignore[attr-defined]
    yield times
    for function in (fp8_speed._faster_linear, fp8_speed._faster_convolution):
        function.cache_clear()  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [_LINEAR, _IMAGE])
@pytest.mark.parametrize(("ms", "faster"), [(0.5, True), (0.98, False), (2.0, False)])
def test_the_faster_one(size: LayerSize, ms: float, faster: bool, clock: dict[str, float]) -> None:
    clock["eight"] = ms
    assert fp8_speed.faster_in_8_bits(size) is faster


def test_a_kernel_that_rounds_the_input_counts(clock: dict[str, float]) -> None:
    clock |= {"eight": 0.8, "rounding": 0.3}
    point = dataclasses.replace(_IMAGE, kernel=(160, 32, 1, 1), padding=(0, 0), apart=True)
    apart = dataclasses.replace(_LINEAR, apart=True)
    assert [fp8_speed.faster_in_8_bits(x) for x in (_LINEAR, apart, point)] == [True, False, False]


def test_what_no_kernel_computes(clock: dict[str, float]) -> None:
    strided = dataclasses.replace(_IMAGE, stride=(2, 2))
    grouped = dataclasses.replace(_IMAGE, groups=2)
    volume = dataclasses.replace(_IMAGE, image=(1, 32, 4, 9, 7))
    odd = dataclasses.replace(_LINEAR, columns=150)
    assert [fp8_speed.faster_in_8_bits(x) for x in (strided, grouped, volume, odd)] == [False] * 4


def test_unknown(clock: dict[str, float]) -> None:
    assert fp8_speed.faster_in_8_bits(dataclasses.replace(_LINEAR, dtype=torch.float32)) is None
    assert InductorBackend("cpu").faster_in_8_bits(_LINEAR) is None


@pytest.mark.gpu
@pytest.mark.skipif(_UNAVAILABLE is not None, reason=str(_UNAVAILABLE))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inner", [16, 640, 1280, 5120])
def test_rows_are_rounded_by_a_kernel(inner: int, dtype: torch.dtype) -> None:
    from districompile.backends.inductor.kernels import operators

    x = torch.randn(70, inner, device="cuda", dtype=dtype) * torch.logspace(-6, 3, 70, device="cuda")[:, None].to(dtype)
    x[3] = 0
    values, scales = operators.quantise_rows(x)
    want, own = quantise_features(x, -1)
    assert torch.equal(scales, own.flatten()) and not values[3].float().any()
    steps = values.view(torch.uint8).int() - want.view(torch.uint8).int()  # a division may round the other way
    assert int(steps.abs().max()) <= 1 and float((steps != 0).float().mean()) < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(_UNAVAILABLE is not None, reason=str(_UNAVAILABLE))
def test_speeds_are_told() -> None:
    linear = LayerSize(4096, 1280, 3840, True, torch.float16)
    sides = {"kernel": (1280, 1280, 3, 3), "stride": (1, 1), "padding": (0, 1), "dilation": (1, 1)}
    image = LayerSize(2048, 1280, 1280, True, torch.float16, image=(1, 1280, 34, 64), **sides)
    strided = dataclasses.replace(image, stride=(2, 2))
    assert [fp8_speed.faster_in_8_bits(x) for x in (linear, image, strided)] == [True, True, False]
    assert fp8_speed.faster_in_8_bits(dataclasses.replace(linear, dtype=torch.float32)) is None
