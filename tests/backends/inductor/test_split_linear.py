"""Products that are written where they are sent from: the same numbers, and fewer copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from districompile.backends.inductor import split_linear
from districompile.backends.inductor.backend import InductorBackend
from districompile.backends.inductor.split_linear import (
    INSERT_LINEAR,
    insert_linear,
    insert_linear_in_place,
    split_linears,
)
from districompile.ir.ops import ops
from districompile.ir.segment import SegmentGraph
from districompile.testing import make_segment
from tests.helpers_segments import run_segment

_REASON = InductorBackend("cpu").build_unavailable_reason()


def _attend(received: Tensor, x: Tensor, weight: Tensor, last: bool = True, bias: Tensor | None = None) -> Tensor:
    """Queries, and keys with values, of one product; the latter are the last columns, or the first."""
    y = torch.nn.functional.linear(x, weight, bias)
    own, q = (y[..., 8:24], y[..., :8]) if last else (y[..., :16], y[..., 16:24])
    whole = ops.assemble_in_place(received, own, 1, 3, 0, 5)
    return torch.nn.functional.scaled_dot_product_attention(q, whole[..., :8], whole[..., 8:])


def _segment(batch: int = 1, **kwargs: Any) -> tuple[SegmentGraph, list[Tensor]]:
    received, x, weight = torch.randn(10, batch, 16), torch.randn(batch, 5, 12), torch.randn(24, 12)
    inputs = {"received": received, "x": x}
    segment = make_segment(lambda r, x, w: _attend(r, x, w, **kwargs), inputs, {"w": weight})
    return segment, [received, x, weight]


@pytest.mark.parametrize("last", [True, False])
def test_a_product_is_split(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[object, ...]] = []

    def pays(*size: object) -> tuple[int, ...]:
        sizes.append(size)
        return ()

    monkeypatch.setattr(split_linear, "best_split_config", pays)
    segment, args = _segment(last=last)
    want = segment.graph(*args)[0]
    split_linears(segment.graph.graph, custom_kernels=True)
    segment.graph.recompile()
    assert [n.target for n in segment.graph.graph.nodes].count(INSERT_LINEAR) == 1
    assert not any(n.target is torch.ops.aten.linear.default for n in segment.graph.graph.nodes)
    assert sizes == [(5, 12, 16, 8, torch.float32, last)]
    torch.testing.assert_close(segment.graph(*args)[0], want)


def test_what_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def left(segment: SegmentGraph) -> bool:
        split_linears(segment.graph.graph)
        return not any(n.target is INSERT_LINEAR for n in segment.graph.graph.nodes)

    monkeypatch.setattr(split_linear, "best_split_config", lambda *size: None)
    assert left(_segment()[0])
    monkeypatch.setattr(split_linear, "best_split_config", lambda *size: ())
    assert not left(_segment()[0])
    assert left(_segment(batch=2)[0])  # rows of a batch are not those received, in another order
    assert left(_segment(bias=torch.randn(24))[0])


def test_in_place() -> None:
    received, x, weight = torch.randn(10, 1, 16), torch.randn(1, 5, 12), torch.randn(24, 12)
    want = insert_linear(received, x, weight, 1, 3, [8, 24], [0, 8], [])
    got = insert_linear_in_place(received, x, weight, 1, 3, [8, 24], [0, 8], [])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(received[3:8], torch.nn.functional.linear(x, weight)[..., 8:24].transpose(0, 1))


@pytest.mark.skipif(_REASON is not None, reason=str(_REASON))
def test_an_engine_writes_where_others_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what it sends from there is no output of its own."""
    monkeypatch.setattr(split_linear, "best_split_config", lambda *size: ())

    def attend(received: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.nn.functional.linear(torch.nn.functional.layer_norm(x, (12,)), weight)
        own = y[..., 8:24]
        whole = ops.assemble_in_place(received, own, 1, 3, 0, 5)
        seen = torch.nn.functional.scaled_dot_product_attention(y[..., :8], whole[..., :8], whole[..., 8:])
        return seen, ops.pack_boundary(own, 1, 5, 5)

    inputs, weights = {"received": torch.randn(10, 1, 16), "x": torch.randn(1, 5, 12)}, {"w": torch.randn(24, 12)}
    want = attend(*inputs.values(), *weights.values())
    backend = InductorBackend("cpu", autotune=("linear",))
    got = run_segment(backend, make_segment(attend, inputs, weights), inputs, weights, tmp_path)
    [(_, package)] = backend._plans.values()
    assert "insert_product" in package.job.graph and list(package.operands["aliased"]) == ["y1"]
    torch.testing.assert_close(got["y0"], want[0])
    torch.testing.assert_close(got["y1"], want[1][:5])
    torch.testing.assert_close(inputs["received"][3:8], want[1][:5])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here")
def test_products_are_timed() -> None:
    assert split_linear.best_split_config(256, 64, 128, 64, torch.float16, True) in (None, (), *split_linear._CONFIGS)
