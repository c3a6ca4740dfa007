# SPDX-License-Identifier: Apache-2.0
"""Resizing by any ratio: nearest, linear and cubic, with or without antialiasing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from districompile.ir.layout import Factor, Layout, per_rank
from districompile.passes.rules.common import keep_sharding
from districompile.sharding.builder import ShardedValue, ShardingBuilder
from districompile.sharding.registry import Sample, rule

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


@rule(aten.upsample_nearest2d.vec, samples=_nearest_samples)
@rule(
    aten.upsample_nearest1d.vec,
    samples=lambda: [
        Sample((torch.randn(2, 3, 9), None, [2.0]), (2,)),
        Sample((torch.randn(2, 3, 9), [13], None), (2,)),
    ],
)
@rule(
    aten.upsample_nearest3d.vec,
    samples=lambda: [Sample((torch.randn(2, 3, 2, 9, 4), None, [1.0, 2.0, 2.0]), (3,))],
)  # fmt: skip
def nearest(
    builder: ShardingBuilder, x: ShardedValue, size: Sequence[int] | None, scales: Sequence[float] | None
) -> ShardedValue:
    """Shard nearest resizing: output row y reads input row floor(y * scale).

    For integer factors, the operator runs on the fetched rows, and its result is cropped. For other ratios, the rows
    are picked one by one.
    """
    op = builder.operator
    axis, shape = x.layout.sharded_axis, builder.out_shape
    assert axis is not None
    if axis.dim < 2:
        return keep_sharding(builder, x, op, size, scales)
    rows_in, rows_out = x.layout.merged_dim(axis.dim).size, shape[axis.dim]
    bounds = builder.bounds(rows_out)
    step = _step(axis.dim, rows_in, rows_out, scales)
    source = _floors(torch.arange(rows_out, dtype=torch.float32), step, rows_in)
    want = [(source[a], source[b - 1] + 1) for a, b in itertools.pairwise(bounds)]
    window = builder.fetch(x, want, purpose="resize")
    layout = Layout.replicated(shape).with_dim(axis.dim, (Factor(rows_out, bounds),))
    factor = rows_out // rows_in
    if rows_out % rows_in == 0 and source == [y // factor for y in range(rows_out)]:
        local = [s * shape[d + 2] // x.shape[d + 2] for d, s in enumerate(x.shape[2:])]
        heights: Any = per_rank((b - a) * factor for a, b in want)
        local[axis.dim - 2] = heights
        node = builder.emit(op, window, local, None)
        start = [a - lo * factor for (lo, _), a in zip(want, bounds, strict=False)]
        stop = [s + b - a for s, a, b in zip(start, bounds, bounds[1:], strict=False)]
        if any(start) or any(b != (w[1] - w[0]) * factor for b, w in zip(stop, want, strict=True)):
            node = builder.emit(aten.slice.Tensor, node, axis.dim, per_rank(start), per_rank(stop))
        return builder.value(node, layout)
    picks = [[source[y] - lo for y in range(a, b)] for (lo, _), a, b in zip(want, bounds, bounds[1:], strict=False)]
    node = builder.emit(torch.ops.districompile.pick.default, window, axis.dim, per_rank(picks))
    if any(shape[d] != x.shape[d] for d in range(2, x.ndim) if d != axis.dim):
        sizes: list[Any] = list(shape[2:])
        sizes[axis.dim - 2] = per_rank(b - a for a, b in itertools.pairwise(bounds))
        kept = None if scales is None else [1.0 if d == axis.dim - 2 else s for d, s in enumerate(scales)]
        node = builder.emit(op, node, sizes, None) if kept is None else builder.emit(op, node, None, kept)
    return builder.value(node, layout)


def _floors(rows: torch.Tensor, step: float, rows_in: int) -> list[int]:
    """Return the source rows of nearest resizing; products are rounded to float32 before the floor, as in torch."""
    return [min(int(v), rows_in - 1) for v in (rows * torch.tensor(step, dtype=torch.float32)).tolist()]


def _step(dim: int, rows_in: int, rows_out: int, scales: Sequence[float] | None) -> float:
    """Return torch's step in source rows, in float32: the inverse of a given scale factor, else the ratio of sizes."""
    if scales is not None and scales[dim - 2] > 0:
        return float(torch.tensor(1.0 / scales[dim - 2], dtype=torch.float32))
    return float(torch.tensor(rows_in / rows_out, dtype=torch.float32))


def _exact_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 9, 4)
    yield Sample((x, None, [2.0, 2.0]), (2,))
    yield Sample((x, [14, 5], None), (2,))
    yield Sample((x, [5, 2], None), (2,))
    yield Sample((x, None, [1.5, 3.0]), (2,))


@rule(aten._upsample_nearest_exact2d.vec, samples=_exact_samples)
@rule(
    aten._upsample_nearest_exact1d.vec,
    samples=lambda: [Sample((torch.randn(2, 3, 9), [13], None), (2,))],
)
@rule(
    aten._upsample_nearest_exact3d.vec,
    samples=lambda: [Sample((torch.randn(2, 3, 2, 9, 4), None, [1.0, 2.0, 2.0]), (3,))],
)  # fmt: skip
def nearest_exact(
    builder: ShardingBuilder, x: ShardedValue, size: Sequence[int] | None, scales: Sequence[float] | None
) -> ShardedValue:
    """Shard exact nearest resizing: output row y reads input row floor((y + 1/2) * scale)."""
    op = builder.operator
    axis, shape = x.layout.sharded_axis, builder.out_shape
    assert axis is not None
    if axis.dim < 2:
        return keep_sharding(builder, x, op, size, scales)
    dim = axis.dim
    rows_in, rows_out = x.layout.merged_dim(dim).size, shape[dim]
    bounds = builder.bounds(rows_out)
    step = _step(dim, rows_in, rows_out, scales)
    source = _floors(torch.arange(rows_out, dtype=torch.float32) + 0.5, step, rows_in)
    want = [(source[a], source[b - 1] + 1) for a, b in itertools.pairwise(bounds)]
    window = builder.fetch(x, want, purpose="resize")
    picks = [[source[y] - lo for y in range(a, b)] for (lo, _), a, b in zip(want, bounds, bounds[1:], strict=False)]
    node = builder.emit(torch.ops.districompile.pick.default, window, dim, per_rank(picks))
    return _columns(builder, x, node, op, dim, bounds, (), scales)


def _columns(
    builder: ShardingBuilder,
    x: ShardedValue,
    node: torch.fx.Node,
    op: Any,
    dim: int,
    bounds: Sequence[int],
    options: Sequence[Any],
    scales: Sequence[float] | None,
) -> ShardedValue:
    """Resize the other dims by the operator itself, after the rows were resized."""
    shape = builder.out_shape
    if any(shape[d] != x.shape[d] for d in range(2, x.ndim) if d != dim):
        if scales is None:
            sizes: list[Any] = list(shape[2:])
            sizes[dim - 2] = per_rank(b - a for a, b in itertools.pairwise(bounds))
            node = builder.emit(op, node, sizes, *options, None)
        else:
            node = builder.emit(op, node, None, *options, [1.0 if d == dim - 2 else s for d, s in enumerate(scales)])
    return builder.value(node, Layout.replicated(shape).with_dim(dim, (Factor(shape[dim], tuple(bounds)),)))


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
    aten._upsample_bicubic2d_aa.vec, samples=_linear_samples,
)  # fmt: skip
@rule(
    aten.upsample_linear1d.vec,
    samples=lambda: [
        Sample((torch.randn(2, 3, 9), [13], False, None), (2,)),
        Sample((torch.randn(2, 3, 9), None, False, [2.0]), (2,)),
    ],
)  # fmt: skip
@rule(
    aten.upsample_trilinear3d.vec,
    samples=lambda: [
        Sample((torch.randn(1, 2, 3, 9, 4), None, False, [1.0, 2.0, 2.0]), (3,)),
        Sample((torch.randn(1, 2, 9, 3, 4), [13, 5, 4], True, None), (2,)),
    ],
)  # fmt: skip
def smooth(
    builder: ShardingBuilder,
    x: ShardedValue,
    size: Sequence[int] | None,
    align_corners: bool,
    scales: Sequence[float] | None,
) -> ShardedValue:
    """Shard linear and cubic resizing by any ratio: the rows first, then the other dims."""
    op = builder.operator
    axis, shape = x.layout.sharded_axis, builder.out_shape
    assert axis is not None
    if axis.dim < 2:
        return keep_sharding(builder, x, op, size, align_corners, scales)
    dim = axis.dim
    rows_in, rows_out = x.layout.merged_dim(dim).size, shape[dim]
    bounds = builder.bounds(rows_out)
    scale = _scale(dim, rows_in, rows_out, scales, align_corners)
    antialias = op in (aten._upsample_bilinear2d_aa.vec, aten._upsample_bicubic2d_aa.vec)
    if rows_out == rows_in and scale == 1 and not antialias:
        x = builder.reshard(x, bounds)
        return _columns(builder, x, x.node, op, dim, bounds, (align_corners,), scales)
    if not align_corners and rows_out % rows_in == 0 and scale == rows_in / rows_out and not antialias:
        return _by_whole_factor(builder, x, op, dim, bounds)
    reach = {"linear": 1, "cubic": 2, "linear_aa": 1, "cubic_aa": 2}[_KINDS[op]]
    reach = math.ceil(reach * max(scale, 1.0)) + 1 if antialias else reach
    half = 0.0 if align_corners else 0.5
    want = [
        (max(0, math.floor(scale * (a + half) - half) - reach),
         min(rows_in, math.floor(scale * (b - 1 + half) - half) + reach + 2))
        for a, b in itertools.pairwise(bounds)
    ]  # fmt: skip
    want = [(min(lo, rows_in - 1), max(hi, 1)) for lo, hi in want]
    window = builder.fetch(x, want, purpose="resize")
    lows: Any = per_rank(lo for lo, _ in want)
    heights: Any = per_rank(b - a for a, b in itertools.pairwise(bounds))
    resample = torch.ops.districompile.resample.default
    node = builder.emit(
        resample, window, dim, per_rank(bounds[:-1]), heights, lows, rows_in, scale, align_corners, _KINDS[op]
    )
    if antialias:  # torch's operator is wrong on one column (CPU, 2.13), which a rank may have
        for d in range(2, x.ndim):
            if d != dim and (shape[d] != x.shape[d] or (scales is not None and scales[d - 2] != 1)):
                step = _scale(d, x.shape[d], shape[d], scales, align_corners)
                node = builder.emit(resample, node, d, 0, shape[d], 0, x.shape[d], step, align_corners, _KINDS[op])
        return builder.value(node, Layout.replicated(shape).with_dim(dim, (Factor(rows_out, bounds),)))
    return _columns(builder, x, node, op, dim, bounds, (align_corners,), scales)


def _scale(dim: int, rows_in: int, rows_out: int, scales: Sequence[float] | None, align_corners: bool) -> float:
    """Return source rows per output row, in float32 as in torch."""
    if align_corners:
        ratio = (rows_in - 1) / (rows_out - 1) if rows_out > 1 else 0.0
        return float(torch.tensor(ratio, dtype=torch.float32))
    return _step(dim, rows_in, rows_out, scales)


def _by_whole_factor(
    builder: ShardingBuilder, x: ShardedValue, op: Any, dim: int, bounds: tuple[int, ...]
) -> ShardedValue:
    """Resize by an integer factor, not aligned at the corners: run the operator on a few more rows, then crop.

    All ranks have one graph. Rows beyond the border repeat the border's row, because the operator clamps there, too.
    """
    shape = builder.out_shape
    factor = shape[dim] // x.layout.merged_dim(dim).size
    reach = 2 if op is aten.upsample_bicubic2d.vec else 1
    want = [(a // factor - reach, -(-b // factor) + reach) for a, b in itertools.pairwise(bounds)]
    window = builder.fetch(x, want, edge="replicate", purpose="resize")
    local: list[Any] = list(shape[2:])
    local[dim - 2] = per_rank((b - a) * factor for a, b in want)
    node = builder.emit(op, window, local, False, None)
    start = [a - lo * factor for (lo, _), a in zip(want, bounds, strict=False)]
    stop = [s + b - a for s, a, b in zip(start, bounds, bounds[1:], strict=False)]
    node = builder.emit(aten.slice.Tensor, node, dim, per_rank(start), per_rank(stop))
    return builder.value(node, Layout.replicated(shape).with_dim(dim, (Factor(shape[dim], bounds),)))
