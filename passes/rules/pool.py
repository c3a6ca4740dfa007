# SPDX-License-Identifier: Apache-2.0
"""Pooling in one, two and three dims; extraction of windows from a tensor, and their sum into one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from districompile.ir.layout import Factor, Layout, Refused, per_rank
from districompile.ir.ops import ops
from districompile.passes.rules.common import keep_sharding, per_dim, positive
from districompile.passes.rules.window import window
from districompile.sharding.builder import ShardedValue, ShardingBuilder
from districompile.sharding.registry import Sample, rule

aten = torch.ops.aten


def _pool_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 14, 6)
    yield Sample((x, [2, 2], [2, 2]), (2,))
    yield Sample((x, [3, 3], [2, 2], [1, 1]), (2,))
    yield Sample((x, [2, 2]), (2,))
    yield Sample((x[0], [3, 3], [2, 2], [1, 1]), (1,))
    yield Sample((x, [3, 3], [1, 1], [1, 1]), (2,))
    yield Sample((x, [3, 1], [2, 1], [1, 0]), (2,))


def _avg_samples() -> Iterable[Sample]:
    yield from _pool_samples()
    x = torch.randn(2, 3, 14, 6)
    yield Sample((x, [3, 3], [2, 2], [1, 1], True, True), (2,))
    yield Sample((x, [3, 3], [2, 2], [1, 1], True, False), (2,))
    yield Sample((x, [3, 3], [1, 1], [1, 1], False, False), (2,))
    yield Sample((x, [3, 3], [2, 2], [1, 1], False, False, 5), (2,))
    yield Sample((x, [4, 4], [3, 3], [1, 1], True), (2,))


@rule(aten.avg_pool2d.default, samples=_avg_samples)
@rule(
    aten.avg_pool1d.default,
    samples=lambda: [
        Sample((torch.randn(2, 3, 14), [2], [2]), (2,)), Sample((torch.randn(2, 3, 14), [3], [1], [1]), (2,)),
        Sample((torch.randn(2, 3, 14), [3], [2], [1], True, False), (2,)),
    ],
)  # fmt: skip
@rule(
    aten.avg_pool3d.default,
    samples=lambda: [
        Sample((torch.randn(1, 2, 4, 12, 4), [2, 2, 2], [2, 2, 2]), (3,)),
        Sample((torch.randn(1, 2, 12, 3, 4), [3, 1, 1], [1, 1, 1], [1, 0, 0], False, False), (2,)),
    ],
)  # fmt: skip
def avg_pool(
    builder: ShardingBuilder, x: ShardedValue, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor: int | None = None,
) -> ShardedValue:  # fmt: skip
    """Shard an average pooling. Rows beyond the border are zeros; where they do not count, border rows are rescaled."""
    op = builder.operator
    n = {aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}[op]
    k = per_dim(kernel, n)
    s, p = per_dim(stride, n) if stride else k, per_dim(padding, n)
    tail = () if n == 1 else (divisor,)
    y = window(
        builder, x, n, k, s, p, [1] * n, lambda v, q: builder.emit(op, v, k, s, q, ceil_mode, count_include_pad, *tail)
    )
    axis, i = y.layout.sharded_axis, (x.sharded_dim or 0) - (x.ndim - n)
    if axis is None or divisor is not None or i < 0:
        return y
    size = x.shape[axis.dim]
    last = size + (p[i] if count_include_pad else 0)
    ends = [(v * s[i] - p[i], v * s[i] - p[i] + k[i]) for v in (0, axis.size - 1)]
    if (ends[0][0] >= 0 or count_include_pad) and ends[1][1] <= last:
        return y
    heights = per_rank(b - a for a, b in itertools.pairwise(axis.bounds))
    first = -p[i] if count_include_pad else 0
    node = builder.emit(
        ops.border_scale.default, y, axis.dim, per_rank(axis.bounds[:-1]), heights, s[i], p[i], k[i], first, last
    )
    return builder.value(node, y.layout)


@rule(aten.max_pool2d.default,
      samples=lambda: [*_pool_samples(),
                       Sample((torch.randn(2, 3, 14, 6), [3, 3], [2, 2], [1, 1], [1, 1], True), (2,))])  # fmt: skip
@rule(aten.max_pool1d.default, samples=lambda: [Sample((torch.randn(2, 3, 14), [3], [2], [1]), (2,))])
@rule(
    aten.max_pool3d.default,
    samples=lambda: [Sample((torch.randn(1, 2, 4, 12, 4), [2, 2, 2], [2, 2, 2]), (3,))],
)  # fmt: skip
def max_pool(
    builder: ShardingBuilder,
    x: ShardedValue,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> ShardedValue:
    op = builder.operator
    n = {aten.max_pool1d.default: 1, aten.max_pool2d.default: 2, aten.max_pool3d.default: 3}[op]
    k = per_dim(kernel, n)
    s, p, d = per_dim(stride, n) if stride else k, per_dim(padding, n), per_dim(dilation, n)
    return window(builder, x, n, k, s, p, d, lambda v, q: builder.emit(op, v, k, s, q, d, ceil_mode), fill=-math.inf)


@rule(
    aten.unfold.default,
    samples=lambda: [
        Sample((torch.randn(2, 3, 12, 4), 2, 3, 1), (2,)), Sample((torch.randn(2, 3, 12, 4), 2, 2, 2), (2,)),
        Sample((torch.randn(2, 3, 12, 4), 3, 2, 1), (2,)),
    ],
)  # fmt: skip
def unfold(builder: ShardingBuilder, x: ShardedValue, dim: int, size: int, step: int) -> ShardedValue:
    """Shard ``unfold``: windows along one dim, each in a new last dim."""
    dim = positive(dim, x.ndim)
    shape = builder.out_shape
    if x.sharded_dim != dim:
        return keep_sharding(builder, x, aten.unfold.default, dim, size, step)
    bounds = builder.bounds(shape[dim])
    node = builder.fetch(x, [(a * step, (b - 1) * step + size) for a, b in itertools.pairwise(bounds)], purpose="conv")
    layout = Layout.replicated(shape).with_dim(dim, (Factor(shape[dim], bounds),))
    return builder.call(aten.unfold.default, node, dim, size, step, layout=layout)


def _steps(size: int, kernel: int, dilation: int, padding: int, stride: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


@rule(
    aten.im2col.default,
    samples=lambda: [
        Sample((torch.randn(2, 3, 12, 5), [3, 3], [1, 1], [1, 1], [1, 1]), (2,)),
        Sample((torch.randn(2, 3, 12, 6), [2, 2], [1, 1], [0, 0], [2, 2]), (2,)),
        Sample((torch.randn(2, 3, 13, 6), [3, 2], [2, 1], [1, 0], [2, 1]), (2,)),
    ],
)  # fmt: skip
def im2col(
    builder: ShardingBuilder,
    x: ShardedValue,
    kernel: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> ShardedValue:
    """Shard ``F.unfold``: (B, C, H, W) -> (B, C * k * k, rows * columns)."""
    axis = x.layout.sharded_axis
    if x.ndim != 4 or axis is None or axis.dim == 1:
        raise Refused("no batch dim, or channels that are sharded")
    if axis.dim == 0:
        return keep_sharding(builder, x, aten.im2col.default, kernel, dilation, padding, stride)
    sizes = [_steps(x.shape[2 + i], kernel[i], dilation[i], padding[i], stride[i]) for i in range(2)]
    i = axis.dim - 2
    bounds = builder.bounds(sizes[i])
    s, p, reach = stride[i], padding[i], (kernel[i] - 1) * dilation[i]
    x.layout.merged_dim(axis.dim)
    rows = builder.fetch(
        x, [(a * s - p, (b - 1) * s - p + reach + 1) for a, b in itertools.pairwise(bounds)], purpose="conv"
    )
    rest = [0 if j == i else padding[j] for j in range(2)]
    factors = tuple(Factor(sizes[j], bounds if j == i else None) for j in range(2))
    layout = Layout.replicated(builder.out_shape).with_dim(2, factors)
    return builder.call(aten.im2col.default, rows, list(kernel), list(dilation), rest, list(stride), layout=layout)


@rule(
    aten.col2im.default,
    samples=lambda: [
        Sample((torch.randn(2, 12, 30), [12, 10], [2, 2], [1, 1], [0, 0], [2, 2]), (2,)),
        Sample((torch.randn(2, 18, 60), [12, 5], [3, 3], [1, 1], [1, 1], [1, 1]), (2,)),
    ],
)  # fmt: skip
def col2im(
    builder: ShardingBuilder,
    x: ShardedValue,
    size: Sequence[int],
    kernel: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> ShardedValue:
    """Shard ``F.fold``, which sums windows into an image.

    Output row y sums the token rows i where i*s - p <= y <= i*s - p + (k-1)*d.
    """
    shape = builder.out_shape
    if x.ndim != 3 or x.sharded_dim == 1:
        raise Refused("no batch dim, or channels that are sharded")
    if x.sharded_dim == 0:
        return keep_sharding(builder, x, aten.col2im.default, size, kernel, dilation, padding, stride)
    tokens, columns = x.shape[2], _steps(size[1], kernel[1], dilation[1], padding[1], stride[1])
    x.layout.merged_dim(2)
    bounds = builder.bounds(size[0])
    s, p, reach = stride[0], padding[0], (kernel[0] - 1) * dilation[0]
    want = [(min(-((reach - a - p) // s), (a + p) // s), (b - 1 + p) // s + 1) for a, b in itertools.pairwise(bounds)]
    assert tokens % columns == 0
    rows = builder.fetch(x, [(a * columns, b * columns) for a, b in want], purpose="conv")
    heights: Any = per_rank((b - a - 1) * s + reach + 1 for a, b in want)
    node = builder.emit(
        aten.col2im.default, rows, [heights, size[1]], list(kernel), list(dilation), [0, padding[1]], list(stride)
    )
    starts = [a - (lo * s - p) for (lo, _), a in zip(want, bounds, strict=False)]
    stops = [v + b - a for v, a, b in zip(starts, bounds, bounds[1:], strict=False)]
    made = [t.shape[2] for t in node.meta["local"]]
    if any(b > n for b, n in zip(stops, made, strict=True)):
        raise Refused("rows that no window reaches")
    node = builder.emit(aten.slice.Tensor, node, 2, per_rank(starts), per_rank(stops))
    return builder.value(node, Layout.replicated(shape).with_dim(2, (Factor(size[0], bounds),)))
