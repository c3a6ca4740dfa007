"""Resizing: nearest by any ratio, linear and cubic by whole factors."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from districompile.cutter import Cutter, Value
from districompile.ir.layout import Factor, Layout, Refused, per_rank
from districompile.passes.rules.common import along
from districompile.registry import Sample, rule

aten = torch.ops.aten


def _nearest_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 9, 4)
    yield Sample((x, None, [2.0, 2.0]), (2,))
    yield Sample((x, [18, 8], None), (2,))
    yield Sample((x, [15, 4], None), (2,))
    yield Sample((x, [5, 2], None), (2,))
    yield Sample((x, [9, 8], None), (2,))
    yield Sample((x, None, [1.5, 3.0]), (2,))


@rule(aten.upsample_nearest2d.vec, kind="resize", samples=_nearest_samples)
@rule(
    aten.upsample_nearest1d.vec,
    kind="resize",
    samples=lambda: [
        Sample((torch.randn(2, 3, 9), None, [2.0]), (2,)),
        Sample((torch.randn(2, 3, 9), [13], None), (2,)),
    ],
)
@rule(
    aten.upsample_nearest3d.vec, kind="resize",
    samples=lambda: [Sample((torch.randn(2, 3, 2, 9, 4), None, [1.0, 2.0, 2.0]), (3,))],
)  # fmt: skip
def nearest(cut: Cutter, x: Value, size: Sequence[int] | None, scales: Sequence[float] | None) -> Value:
    """Output row y reads input row floor(y * scale). Whole factors run the operator on the fetched rows and crop;
    other ratios pick the rows one by one."""
    op: Any = cut.target.target  # type: ignore[union-attr]
    where, shape = x.layout.cut, cut.out_shape
    assert where is not None
    if where.dim < 2:
        return along(cut, x, op, size, scales)
    rows_in, rows_out = x.layout.coarse(where.dim).size, shape[where.dim]
    bounds = cut.bounds(rows_out)
    step = _step(where.dim, rows_in, rows_out, scales)
    source = [min(int(y * step), rows_in - 1) for y in range(rows_out)]
    want = [(source[a], source[b - 1] + 1) for a, b in itertools.pairwise(bounds)]
    window = cut.fetch(x, want, kind="resize")
    layout = Layout.whole(shape).with_dim(where.dim, (Factor(rows_out, bounds),))
    factor = rows_out // rows_in
    if rows_out % rows_in == 0 and source == [y // factor for y in range(rows_out)]:
        local = [s * shape[d + 2] // x.shape[d + 2] for d, s in enumerate(x.shape[2:])]
        heights: Any = per_rank((b - a) * factor for a, b in want)
        local[where.dim - 2] = heights
        node = cut.emit(op, window, local, None)
        start = [a - lo * factor for (lo, _), a in zip(want, bounds, strict=False)]
        stop = [s + b - a for s, a, b in zip(start, bounds, bounds[1:], strict=False)]
        if any(start) or any(b != (w[1] - w[0]) * factor for b, w in zip(stop, want, strict=True)):
            node = cut.emit(aten.slice.Tensor, node, where.dim, per_rank(start), per_rank(stop))
        return cut.value(node, layout)
    picks = [[source[y] - lo for y in range(a, b)] for (lo, _), a, b in zip(want, bounds, bounds[1:], strict=False)]
    node = cut.emit(torch.ops.districompile.pick.default, window, where.dim, per_rank(picks))
    if any(shape[d] != x.shape[d] for d in range(2, x.ndim) if d != where.dim):
        sizes: list[Any] = list(shape[2:])
        sizes[where.dim - 2] = per_rank(b - a for a, b in itertools.pairwise(bounds))
        kept = None if scales is None else [1.0 if d == where.dim - 2 else s for d, s in enumerate(scales)]
        node = cut.emit(op, node, sizes, None) if kept is None else cut.emit(op, node, None, kept)
    return cut.value(node, layout)


def _step(dim: int, rows_in: int, rows_out: int, scales: Sequence[float] | None) -> float:
    """torch's rule: a given scale factor is used as it is, in float32; else the ratio of the sizes."""
    if scales is not None and scales[dim - 2] > 0:
        return float(torch.tensor(1.0 / scales[dim - 2], dtype=torch.float32))
    return float(torch.tensor(rows_in / rows_out, dtype=torch.float32))


def _linear_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 9, 4)
    yield Sample((x, None, False, [2.0, 2.0]), (2,))
    yield Sample((x, [27, 8], False, None), (2,))


@rule(aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec, kind="resize", samples=_linear_samples)
def linear(
    cut: Cutter, x: Value, size: Sequence[int] | None, align_corners: bool, scales: Sequence[float] | None
) -> Value:
    """By a whole factor, not aligned at the corners: rows beyond the border repeat the border's, as the operator
    itself clamps."""
    op: Any = cut.target.target  # type: ignore[union-attr]
    where, shape = x.layout.cut, cut.out_shape
    assert where is not None
    if where.dim < 2:
        return along(cut, x, op, size, align_corners, scales)
    rows_in, rows_out = x.layout.coarse(where.dim).size, shape[where.dim]
    if align_corners or rows_out % rows_in:
        raise Refused("resizing rows by a fraction or aligned at the corners")
    factor, bounds = rows_out // rows_in, cut.bounds(rows_out)
    reach = 2 if op is aten.upsample_bicubic2d.vec else 1
    want = [(a // factor - reach, -(-b // factor) + reach) for a, b in itertools.pairwise(bounds)]
    window = cut.fetch(x, want, edge="replicate", kind="resize")
    local: list[Any] = list(shape[2:])
    local[where.dim - 2] = per_rank((b - a) * factor for a, b in want)
    node = cut.emit(op, window, local, False, None)
    start = [a - lo * factor for (lo, _), a in zip(want, bounds, strict=False)]
    stop = [s + b - a for s, a, b in zip(start, bounds, bounds[1:], strict=False)]
    node = cut.emit(aten.slice.Tensor, node, where.dim, per_rank(start), per_rank(stop))
    return cut.value(node, Layout.whole(shape).with_dim(where.dim, (Factor(rows_out, bounds),)))
