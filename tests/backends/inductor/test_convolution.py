"""Convolutions that are computed as products: which, and with the same numbers."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from districompile.backends.inductor import autotune, convolution
from districompile.backends.inductor.backend import AUTOTUNABLE, InductorBackend
from districompile.backends.inductor.convolution import (
    IM2COL_CONVOLUTION,
    KERNEL_CONVOLUTION,
    autotune_convolutions,
    best_convolution,
    im2col,
)
from districompile.backends.inductor.kernels.hopper import unavailable_reason
from districompile.cli.main import main
from districompile.errors import BackendError
from districompile.ir.segment import SegmentGraph
from districompile.testing import make_segment
from tests.helpers_segments import run_segment

_REASON = InductorBackend("cpu").build_unavailable_reason()


def _segment(
    dtype: torch.dtype = torch.float16, channels: int = 6, groups: int = 1, bias: bool = False, **options: Any
) -> tuple[SegmentGraph, list[Tensor]]:
    inputs = {"x": torch.randn(2, channels, 7, 10).to(dtype)}
    weights = {"w": torch.randn(8, channels // groups, 3, 3).to(dtype)}
    if bias:
        weights["b"] = torch.randn(8).to(dtype)

    def convolve(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return torch.nn.functional.conv2d(x, w, b, groups=groups, **options)

    return make_segment(convolve, inputs, weights), [*inputs.values(), *weights.values()]


@pytest.mark.parametrize("way", [(), (64, 2, 128, 32, 64, 8, 4)])
@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"padding": 1}, [(2, 6, 7, 10), (8, 6, 3, 3), (1, 1), (1, 1)]),
        ({"padding": (0, 1), "bias": True}, [(2, 6, 7, 10), (8, 6, 3, 3), (1, 1), (0, 1)]),
        ({"stride": (2, 1), "dtype": torch.bfloat16}, [(2, 6, 7, 10), (8, 6, 3, 3), (2, 1), (0, 0)]),
        ({"dtype": torch.float32}, None),
        ({"dilation": 2}, None),
        ({"groups": 2}, None),
    ],
)
def test_which_are_replaced(
    options: dict[str, Any], taken: list[object] | None, way: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def chosen(*size: object) -> tuple[int, ...]:
        asked.extend(size[:-3])
        return way

    monkeypatch.setattr(convolution, "best_convolution", chosen)
    segment, args = _segment(**options)
    want = segment.graph(*args)[0]
    autotune_convolutions(segment.graph.graph, im2col=True, custom_kernels=True)
    segment.graph.recompile()
    assert asked == (taken or [])
    target = KERNEL_CONVOLUTION if way else IM2COL_CONVOLUTION
    found = [n for n in segment.graph.graph.nodes if n.target is target]
    assert len(found) == (taken is not None)
    assert all("val" in n.meta for n in found)
    torch.testing.assert_close(segment.graph(*args)[0], want, rtol=1e-2, atol=1e-2)


def test_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "best_convolution", lambda *size: None)
    segment, _ = _segment(padding=1)
    autotune_convolutions(segment.graph.graph, im2col=True, custom_kernels=True)
    assert not any(n.target is IM2COL_CONVOLUTION for n in segment.graph.graph.nodes)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 3), (4, 2)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("padding", [(0, 0), (0, 1), (2, 1)])
def test_numbers(kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> None:
    x, weight = torch.randn(2, 5, 9, 8, dtype=torch.float64), torch.randn(7, 5, *kernel, dtype=torch.float64)
    want = torch.nn.functional.conv2d(x, weight, None, stride, padding)
    for format in (torch.contiguous_format, torch.channels_last):
        got = im2col(x.to(memory_format=format), weight.to(memory_format=format), list(stride), list(padding))
        torch.testing.assert_close(got, want)


@pytest.mark.slow
@pytest.mark.skipif(_REASON is not None, reason=str(_REASON))
def test_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "best_convolution", lambda *size: ())

    def net(x: Tensor, w: Tensor, b: Tensor, w1: Tensor) -> Tensor:
        y = torch.nn.functional.silu(x)
        y = torch.nn.functional.conv2d(y, w, b, padding=(0, 1))
        return y + torch.nn.functional.conv2d(x[:, :, 1:-1], w1)

    inputs = {"x": torch.randn(1, 16, 8, 12).bfloat16()}
    weights = {
        "w": torch.randn(24, 16, 3, 3).bfloat16(), "b": torch.randn(24).bfloat16(),
        "w1": torch.randn(24, 16, 1, 1).bfloat16(),
    }  # fmt: skip
    backend = InductorBackend("cpu", autotune=("conv",), channels_last=True)
    got = run_segment(backend, make_segment(net, inputs, weights), inputs, weights, tmp_path)
    [(_, package)] = backend._plans.values()
    assert package.job.graph.count("product_convolution") == 2
    want = net(*(t.double() for t in (*inputs.values(), *weights.values())))
    assert (got["y0"].double() - want).norm() <= 1e-2 * want.norm()


def test_autotune_option() -> None:
    with pytest.raises(BackendError, match="autotune=attention: give any of linear, conv, custom-kernels"):
        InductorBackend("cpu", autotune=("linear", "attention"))
    with pytest.raises(BackendError, match="autotune=conv,none: all and none stand alone"):
        InductorBackend("cpu", autotune=("conv", "none"))
    cases: list[tuple[tuple[str, ...] | None, set[str]]] = [
        (("linear", "custom-kernels"), {"linear", "custom-kernels"}), (("all",), {*AUTOTUNABLE}), (("none",), set()),
        ((), set()), (None, set()), (("conv",), {"conv"}),
    ]  # fmt: skip
    for requested, want in cases:
        assert InductorBackend("cpu", autotune=requested)._autotune == want


def test_every_option_has_a_line_of_help() -> None:
    options = {*inspect.signature(InductorBackend.__init__).parameters} - {"self", "inductor_config"}
    assert options == {*InductorBackend.OPTION_HELP}
    assert all("(default: " in line and "\n" not in line for line in InductorBackend.OPTION_HELP.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"device": "mps"}, "device=mps: .* compiles for cuda or cpu"), ({"workers": 0}, "workers=0: give 1 or more")],
)
def test_malformed_options_are_one_clear_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        InductorBackend(**options)


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", "demo", "-o", "autotune=none"]
    assert main(command) == 2
    assert "the backend onnxruntime has no option autotune" in capsys.readouterr().err
    assert main([*command[:-1], "autotune=speed", "--backend", "inductor"]) == 2
    assert "autotune=speed" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here")
def test_convolutions_are_timed() -> None:
    for width in (64, 128):
        image = (1, 64, 16, width)
        with autotune.recorded_timings() as times:
            found = best_convolution(image, (320, 64, 3, 3), (1, 1), (1, 1), torch.float16, True, True)
        assert found in times and {None, ()} <= {*times}
        assert unavailable_reason() is not None or {*times} >= {(160, 1), (160, 2), (80, 1)}
