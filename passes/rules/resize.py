"""Resizing by any ratio: nearest, linear and cubic, antialiased."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from districompile.cutter import Cutter, Value
from districompile.ir.layout import Factor, Layout, per_rank
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
    yield Sample((torch.randn(1, 2, 26, 4), [14, 4], None), (2,))


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
    op = cut.operator
    where, shape = x.layout.cut, cut.out_shape
    assert where is not None
    if where.dim < 2:
        return along(cut, x, op, size, scales)
    rows_in, rows_out = x.layout.coarse(where.dim).size, shape[where.dim]
    bounds = cut.bounds(rows_out)
    step = _step(where.dim, rows_in, rows_out, scales)
    source = _floors(torch.arange(rows_out, dtype=torch.float32), step, rows_in)
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


def _floors(rows: torch.Tensor, step: float, rows_in: int) -> list[int]:
    """Source rows of nearest resizing: the product is rounded to float32 before it is floored, as torch does."""
    return [min(int(v), rows_in - 1) for v in (rows * torch.tensor(step, dtype=torch.float32)).tolist()]


def _step(dim: int, rows_in: int, rows_out: int, scales: Sequence[float] | None) -> float:
    """torch's rule: a given scale factor is used as it is, in float32; else the ratio of the sizes."""
    if scales is not None and scales[dim - 2] > 0:
        return float(torch.tensor(1.0 / scales[dim - 2], dtype=torch.float32))
    return float(torch.tensor(rows_in / rows_out, dtype=torch.float32))


def _exact_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 9, 4)
    yield Sample((x, None, [2.0, 2.0]), (2,))
    yield Sample((x, [14, 5], None), (2,))
    yield Sample((x, [5, 2], None), (2,))
    yield Sample((x, None, [1.5, 3.0]), (2,))


@rule(aten._upsample_nearest_exact2d.vec, kind="resize", samples=_exact_samples)
@rule(
    aten._upsample_nearest_exact1d.vec,
    kind="resize",
    samples=lambda: [Sample((torch.randn(2, 3, 9), [13], None), (2,))],
)
@rule(
    aten._upsample_nearest_exact3d.vec, kind="resize",
    samples=lambda: [Sample((torch.randn(2, 3, 2, 9, 4), None, [1.0, 2.0, 2.0]), (3,))],
)  # fmt: skip
def nearest_exact(cut: Cutter, x: Value, size: Sequence[int] | None, scales: Sequence[float] | None) -> Value:
    """Output row y reads input row floor((y + 1/2) * scale)."""
    op = cut.operator
    where, shape = x.layout.cut, cut.out_shape
    assert where is not None
    if where.dim < 2:
        return along(cut, x, op, size, scales)
    dim = where.dim
    rows_in, rows_out = x.layout.coarse(dim).size, shape[dim]
    bounds = cut.bounds(rows_out)
    step = _step(dim, rows_in, rows_out, scales)
    source = _floors(torch.arange(rows_out, dtype=torch.float32) + 0.5, step, rows_in)
    want = [(source[a], source[b - 1] + 1) for a, b in itertools.pairwise(bounds)]
    window = cut.fetch(x, want, kind="resize")
    picks = [[source[y] - lo for y in range(a, b)] for (lo, _), a, b in zip(want, bounds, bounds[1:], strict=False)]
    node = cut.emit(torch.ops.districompile.pick.default, window, dim, per_rank(picks))
    return _columns(cut, x, node, op, dim, bounds, (), scales)


def _columns(
    cut: Cutter, x: Value, node: torch.fx.Node, op: Any, dim: int, bounds: Sequence[int], options: Sequence[Any],
    scales: Sequence[float] | None,
) -> Value:  # fmt: skip
    """The other dims resized by the operator itself, the rows being there already."""
    shape = cut.out_shape
    if any(shape[d] != x.shape[d] for d in range(2, x.ndim) if d != dim):
        if scales is None:
            sizes: list[Any] = list(shape[2:])
            sizes[dim - 2] = per_rank(b - a for a, b in itertools.pairwise(bounds))
            node = cut.emit(op, node, sizes, *options, None)
        else:
            node = cut.emit(op, node, None, *options, [1.0 if d == dim - 2 else s for d, s in enumerate(scales)])
    return cut.value(node, Layout.whole(shape).with_dim(dim, (Factor(shape[dim], tuple(bounds)),)))


def _linear_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 9, 4)
    yield Sample((x, None, False, [2.0, 2.0]), (2,))
    yield Sample((x, [27, 8], False, None), (2,))
    yield Sample((x, [18, 7], True, None), (2,))
    yield Sample((x, [14, 4], False, None), (2,))
    yield Sample((x, [5, 2], False, None), (2,))
    yield Sample((x, [13, 5], True, None), (2,))
    yield Sample((x, None, False, [1.5, 0.5]), (2,))
    yield Sample((x, None, False, [0.6, 1.0]), (2,))
    yield Sample((x, [9, 6], False, None), (2,))


_KINDS = {
    aten.upsample_linear1d.vec: "linear", aten.upsample_bilinear2d.vec: "linear",
    aten.upsample_trilinear3d.vec: "linear",
    aten.upsample_bicubic2d.vec: "cubic", aten._upsample_bilinear2d_aa.vec: "linear_aa",
    aten._upsample_bicubic2d_aa.vec: "cubic_aa",
}  # fmt: skip


@rule(
    aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec, aten._upsample_bilinear2d_aa.vec,
    aten._upsample_bicubic2d_aa.vec, kind="resize", samples=_linear_samples,
)  # fmt: skip
@rule(
    aten.upsample_linear1d.vec, kind="resize",
    samples=lambda: [
        Sample((torch.randn(2, 3, 9), [13], False, None), (2,)),
        Sample((torch.randn(2, 3, 9), None, False, [2.0]), (2,)),
    ],
)  # fmt: skip
@rule(
    aten.upsample_trilinear3d.vec, kind="resize",
    samples=lambda: [
        Sample((torch.randn(1, 2, 3, 9, 4), None, False, [1.0, 2.0, 2.0]), (3,)),
        Sample((torch.randn(1, 2, 9, 3, 4), [13, 5, 4], True, None), (2,)),
    ],
)  # fmt: skip
def smooth(
    cut: Cutter, x: Value, size: Sequence[int] | None, align_corners: bool, scales: Sequence[float] | None
) -> Value:
    """Linear and cubic, by any ratio, with or without antialiasing: rows first, then the other dims."""
    op = cut.operator
    where, shape = x.layout.cut, cut.out_shape
    assert where is not None
    if where.dim < 2:
        return along(cut, x, op, size, align_corners, scales)
    dim = where.dim
    rows_in, rows_out = x.layout.coarse(dim).size, shape[dim]
    bounds = cut.bounds(rows_out)
    scale = _scale(dim, rows_in, rows_out, scales, align_corners)
    antialias = op in (aten._upsample_bilinear2d_aa.vec, aten._upsample_bicubic2d_aa.vec)
    if rows_out == rows_in and scale == 1 and not antialias:
        x = cut.rebound(x, bounds)
        return _columns(cut, x, x.node, op, dim, bounds, (align_corners,), scales)
    if not align_corners and rows_out % rows_in == 0 and scale == rows_in / rows_out and not antialias:
        return _by_whole_factor(cut, x, op, dim, bounds)
    reach = {"linear": 1, "cubic": 2, "linear_aa": 1, "cubic_aa": 2}[_KINDS[op]]
    reach = math.ceil(reach * max(scale, 1.0)) + 1 if antialias else reach
    half = 0.0 if align_corners else 0.5
    want = [
        (max(0, math.floor(scale * (a + half) - half) - reach),
         min(rows_in, math.floor(scale * (b - 1 + half) - half) + reach + 2))
        for a, b in itertools.pairwise(bounds)
    ]  # fmt: skip
    want = [(min(lo, rows_in - 1), max(hi, 1)) for lo, hi in want]
    window = cut.fetch(x, want, kind="resize")
    lows: Any = per_rank(lo for lo, _ in want)
    heights: Any = per_rank(b - a for a, b in itertools.pairwise(bounds))
    resample = torch.ops.districompile.resample.default
    node = cut.emit(
        resample, window, dim, per_rank(bounds[:-1]), heights, lows, rows_in, scale, align_corners, _KINDS[op]
    )
    if antialias:  # torch's own is wrong on one column (CPU, 2.13), which a rank may have
        for d in range(2, x.ndim):
            if d != dim and (shape[d] != x.shape[d] or (scales is not None and scales[d - 2] != 1)):
                step = _scale(d, x.shape[d], shape[d], scales, align_corners)
                node = cut.emit(resample, node, d, 0, shape[d], 0, x.shape[d], step, align_corners, _KINDS[op])
        return cut.value(node, Layout.whole(shape).with_dim(dim, (Factor(rows_out, bounds),)))
    return _columns(cut, x, node, op, dim, bounds, (align_corners,), scales)


def _scale(dim: int, rows_in: int, rows_out: int, scales: Sequence[float] | None, align_corners: bool) -> float:
    """Source rows per output row, in float32 as torch has it."""
    if align_corners:
        ratio = (rows_in - 1) / (rows_out - 1) if rows_out > 1 else 0.0
        return float(torch.tensor(ratio, dtype=torch.float32))
    return _step(dim, rows_in, rows_out, scales)


def _by_whole_factor(cut: Cutter, x: Value, op: Any, dim: int, bounds: tuple[int, ...]) -> Value:
    """By a whole factor, not aligned at the corners: the operator itself on a few more rows, and all ranks have one
    graph. Rows beyond the border repeat the border's, as the operator itself clamps."""
    shape = cut.out_shape
    factor = shape[dim] // x.layout.coarse(dim).size
    reach = 2 if op is aten.upsample_bicubic2d.vec else 1
    want = [(a // factor - reach, -(-b // factor) + reach) for a, b in itertools.pairwise(bounds)]
    window = cut.fetch(x, want, edge="replicate", kind="resize")
    local: list[Any] = list(shape[2:])
    local[dim - 2] = per_rank((b - a) * factor for a, b in want)
    node = cut.emit(op, window, local, False, None)
    start = [a - lo * factor for (lo, _), a in zip(want, bounds, strict=False)]
    stop = [s + b - a for s, a, b in zip(start, bounds, bounds[1:], strict=False)]
    node = cut.emit(aten.slice.Tensor, node, dim, per_rank(start), per_rank(stop))
    return cut.value(node, Layout.whole(shape).with_dim(dim, (Factor(shape[dim], bounds),)))
