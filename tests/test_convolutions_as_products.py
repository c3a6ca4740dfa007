"""Convolutions that are computed as products: which, and with the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from districompile.backends import inductor_unfold, timing
from districompile.backends.base import BuildSegment
from districompile.backends.gpu.hopper import unusable
from districompile.backends.inductor import TIMED, InductorBackend
from districompile.backends.inductor_unfold import (
    KERNEL_CONVOLUTION,
    PRODUCT_CONVOLUTION,
    choose,
    unfolded,
    use_fastest,
)
from districompile.cli import main
from districompile.errors import BackendError
from tests.helpers_segments import make_segment, run_segment

_REASON = InductorBackend("cpu").cannot_build()


def _segment(
    dtype: torch.dtype = torch.float16, channels: int = 6, groups: int = 1, bias: bool = False, **options: Any
) -> tuple[BuildSegment, list[Tensor]]:
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

    monkeypatch.setattr(inductor_unfold, "choose", chosen)
    segment, args = _segment(**options)
    want = segment.graph(*args)[0]
    use_fastest(segment.graph.graph, products=True, kernels=True)
    segment.graph.recompile()
    assert asked == (taken or [])
    target = KERNEL_CONVOLUTION if way else PRODUCT_CONVOLUTION
    found = [n for n in segment.graph.graph.nodes if n.target is target]
    assert len(found) == (taken is not None)
    assert all("val" in n.meta for n in found)
    torch.testing.assert_close(segment.graph(*args)[0], want, rtol=1e-2, atol=1e-2)


def test_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor_unfold, "choose", lambda *size: None)
    segment, _ = _segment(padding=1)
    use_fastest(segment.graph.graph, products=True, kernels=True)
    assert not any(n.target is PRODUCT_CONVOLUTION for n in segment.graph.graph.nodes)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 3), (4, 2)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("padding", [(0, 0), (0, 1), (2, 1)])
def test_numbers(kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> None:
    x, weight = torch.randn(2, 5, 9, 8, dtype=torch.float64), torch.randn(7, 5, *kernel, dtype=torch.float64)
    want = torch.nn.functional.conv2d(x, weight, None, stride, padding)
    for format in (torch.contiguous_format, torch.channels_last):
        got = unfolded(x.to(memory_format=format), weight.to(memory_format=format), list(stride), list(padding))
        torch.testing.assert_close(got, want)


@pytest.mark.slow
@pytest.mark.skipif(_REASON is not None, reason=str(_REASON))
def test_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor_unfold, "choose", lambda *size: ())

    def net(x: Tensor, w: Tensor, b: Tensor, w1: Tensor) -> Tensor:
        y = torch.nn.functional.silu(x)
        y = torch.nn.functional.conv2d(y, w, b, padding=(0, 1))
        return y + torch.nn.functional.conv2d(x[:, :, 1:-1], w1)

    inputs = {"x": torch.randn(1, 16, 8, 12).bfloat16()}
    weights = {
        "w": torch.randn(24, 16, 3, 3).bfloat16(), "b": torch.randn(24).bfloat16(),
        "w1": torch.randn(24, 16, 1, 1).bfloat16(),
    }  # fmt: skip
    backend = InductorBackend("cpu", timed=["convolutions"], channels_last=True)
    got = run_segment(backend, make_segment(net, inputs, weights), inputs, weights, tmp_path)
    [(_, package)] = backend._plans.values()
    assert package.job.graph.count("product_convolution") == 2
    want = net(*(t.double() for t in (*inputs.values(), *weights.values())))
    assert (got["y0"].double() - want).norm() <= 1e-2 * want.norm()


def test_words() -> None:
    with pytest.raises(BackendError, match="'attention'.*products, convolutions, kernels"):
        InductorBackend("cpu", timed=["attention"])
    with pytest.raises(BackendError, match="'attention'"):
        InductorBackend("cpu", timed="products, attention")
    for asked, words in (
        ("products, kernels", {"products", "kernels"}), ("all", {*TIMED}), ("none", set()), (None, set()),
        (["convolutions"], {"convolutions"}),
    ):  # fmt: skip
        assert InductorBackend("cpu", timed=asked)._timed == words


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", "demo", "--timed", "none"]
    assert main(command) == 2
    assert "--timed: only with --backend inductor, not with onnxruntime" in capsys.readouterr().err
    assert main([*command[:-1], "speed", "--backend", "inductor"]) == 2
    assert "nothing named 'speed' is timed" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here")
def test_convolutions_are_timed() -> None:
    for width in (64, 128):
        image = (1, 64, 16, width)
        with timing.told() as times:
            found = choose(image, (320, 64, 3, 3), (1, 1), (1, 1), torch.float16, True, True)
        assert found in times and {None, ()} <= {*times}
        assert unusable() is not None or {*times} >= {(160, 1), (160, 2), (80, 1)}
