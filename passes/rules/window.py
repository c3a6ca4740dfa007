# SPDX-License-Identifier: Apache-2.0
"""Convolution: each output row reads a window of input rows, so ranks fetch a halo.

For output rows [a, b), stride s, padding p, dilation d and kernel k, the input rows are
[a*s - p, (b-1)*s - p + (k-1)*d + 1). Rows outside the image are the padding itself, so the local operator pads nothing
along the rows and has the same shape on every rank, border or not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from districompile.ir.layout import Factor, Layout, Refused, per_rank
from districompile.passes.rules.common import keep_sharding, per_dim, positive
from districompile.sharding.builder import ShardedValue, ShardingBuilder
from districompile.sharding.registry import Sample, rule

aten = torch.ops.aten


def window(
    builder: ShardingBuilder,
    x: ShardedValue,
    spatial: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    local: Callable[[Any, list[int]], Any],
    fill: float = 0.0,
) -> ShardedValue:
    """Shard a window operator, which ``local(x, padding)`` computes with the given paddings.

    The sharded rows may also be in the batch.
    """
    axis = x.layout.sharded_axis
    assert axis is not None
    first = x.ndim - spatial
    shape = builder.out_shape
    if axis.dim < first:
        if axis.dim == first - 1:
            raise Refused("the channels are sharded")
        layout = Layout.replicated(shape).with_dim(axis.dim, x.layout.dims[axis.dim])
        return builder.value(local(x.node, list(padding)), layout)
    x.layout.merged_dim(axis.dim)
    i = axis.dim - first
    bounds = builder.bounds(shape[axis.dim])
    k, s, p, d = kernel[i], stride[i], padding[i], dilation[i]
    want = [(a * s - p, (b - 1) * s - p + (k - 1) * d + 1) for a, b in itertools.pairwise(bounds)]
    window = builder.fetch(x, want, fill=fill, purpose="conv")
    rest = list(padding)
    rest[i] = 0
    layout = Layout.replicated(shape).with_dim(axis.dim, (Factor(shape[axis.dim], bounds),))
    return builder.value(local(window, rest), layout)


def _conv_samples() -> Iterable[Sample]:
    x = torch.randn(2, 4, 13, 6)

    def w(o: int, i: int, *k: int) -> torch.Tensor:
        return torch.randn(o, i, *k)

    yield Sample((x, w(3, 4, 3, 3), torch.randn(3), [1, 1], [1, 1]), (2, None, None))
    yield Sample((x, w(3, 4, 3, 3), None, [2, 2], [1, 1]), (2, None))
    yield Sample((x, w(3, 4, 3, 3), None, [2, 2], [0, 0]), (2, None))
    yield Sample((x, w(3, 4, 1, 1)), (2, None))
    yield Sample((x, w(3, 4, 5, 3), None, [1, 1], [2, 1]), (2, None))
    yield Sample((x, w(3, 4, 3, 3), None, [1, 1], [2, 2]), (2, None))  # the map grows by two rows
    yield Sample((x, w(3, 4, 3, 3), None, [1, 1], [2, 2], [2, 2]), (2, None))
    yield Sample((x, w(4, 1, 3, 3), None, [1, 1], [1, 1], [1, 1], 4), (2, None))
    yield Sample((x, w(3, 4, 4, 4), None, [2, 2], [1, 1]), (2, None))
    yield Sample((x, w(3, 4, 3, 3), None, [1, 1], [1, 1]), (3, None))  # columns sharded
    yield Sample((torch.randn(9, 4, 5, 5), w(3, 4, 3, 3), None, [1, 1], [1, 1]), (0, None))
    yield Sample((torch.randn(4, 13, 6), w(3, 4, 3, 3), torch.randn(3), [1, 1], [1, 1]), (1, None, None))  # no batch


@rule(aten.conv2d.default, samples=_conv_samples)
@rule(
    aten.conv1d.default,
    samples=lambda: [Sample((torch.randn(2, 4, 13), torch.randn(3, 4, 3), None, [1], [1]), (2, None))],
)  # fmt: skip
@rule(
    aten.conv3d.default,
    samples=lambda: [
        Sample((torch.randn(1, 2, 3, 9, 4), torch.randn(3, 2, 3, 3, 1), None, [1] * 3, [1, 1, 0]), (3, None)),
        Sample((torch.randn(1, 2, 9, 3, 4), torch.randn(3, 2, 3, 3, 1), None, [1] * 3, [1, 1, 0]), (2, None)),
    ],
)  # fmt: skip
def conv(
    builder: ShardingBuilder,
    x: ShardedValue,
    weight: ShardedValue,
    bias: ShardedValue | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> ShardedValue:
    """Shard conv1d, conv2d and conv3d along any spatial dim, with groups, strides and dilations."""
    n = weight.ndim - 2
    op = builder.operator
    s, d, kernel = per_dim(stride, n), per_dim(dilation, n), weight.shape[2:]
    p = per_dim(padding, n)
    if not x.is_sharded:
        raise Refused("the weight is sharded")
    bias = None if bias is None else builder.gather(bias)
    weight = builder.gather(weight)
    return window(builder, x, n, kernel, s, p, d, lambda v, q: builder.emit(op, v, weight, bias, s, q, d, groups))


@rule(
    aten.conv1d.padding,
    samples=lambda: [Sample((torch.randn(2, 4, 13), torch.randn(3, 4, 4), None, [1], "same"), (2, None))],
)  # fmt: skip
@rule(
    aten.conv3d.padding,
    samples=lambda: [
        Sample((torch.randn(1, 2, 3, 9, 4), torch.randn(3, 2, 2, 3, 2), None, [1, 1, 1], "same"), (3, None)),
    ],
)  # fmt: skip
@rule(
    aten.conv2d.padding,
    samples=lambda: [
        Sample((torch.randn(2, 4, 13, 6), torch.randn(3, 4, 3, 5), None, [1, 1], "same"), (2, None)),
        Sample((torch.randn(2, 4, 13, 6), torch.randn(3, 4, 4, 3), None, [1, 1], "same"), (2, None)),
        Sample((torch.randn(2, 4, 13, 6), torch.randn(3, 4, 3, 3), None, [1, 1], "valid"), (2, None)),
    ],
)  # fmt: skip
def conv_padding(
    builder: ShardingBuilder,
    x: ShardedValue,
    weight: ShardedValue,
    bias: ShardedValue | None = None,
    stride: Any = 1,
    padding: str = "valid",
    dilation: Any = 1,
    groups: int = 1,
) -> ShardedValue:
    """Shard a convolution with a padding by name.

    "same" with an even kernel pads one row more below; columns are then padded by an operator of their own.
    """
    n = weight.ndim - 2
    s, d, kernel = per_dim(stride, n), per_dim(dilation, n), weight.shape[2:]
    op = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}[n]
    total = [(k - 1) * e if padding == "same" else 0 for k, e in zip(kernel, d, strict=True)]
    first = x.ndim - n
    uneven = [x.ndim - n + i for i, t in enumerate(total) if t % 2 and first + i != x.sharded_dim]

    def local(v: Any, q: list[int]) -> Any:
        if uneven:
            sides_inner_first = [side for i in reversed(range(n)) for side in (0, 1 if first + i in uneven else 0)]
            v = builder.emit(aten.constant_pad_nd.default, v, sides_inner_first, 0.0)
        return builder.emit(op, v, builder.gather(weight), bias, s, q, d, groups)

    return window(builder, x, n, kernel, s, [t // 2 for t in total], d, local)


def _transposed_samples() -> Iterable[Sample]:
    x = torch.randn(2, 4, 9, 5)
    yield Sample((x, torch.randn(4, 3, 2, 2), torch.randn(3), [2, 2]), (2, None, None))
    yield Sample((x, torch.randn(4, 3, 4, 4), None, [2, 2], [1, 1]), (2, None))
    yield Sample((x, torch.randn(4, 3, 3, 3), None, [2, 2], [1, 1], [1, 1]), (2, None))
    yield Sample((x, torch.randn(4, 3, 4, 4), None, [2, 2], [3, 3]), (2, None))
    yield Sample((x[0], torch.randn(4, 3, 4, 4), None, [2, 2], [1, 1]), (1, None))
    yield Sample((x, torch.randn(4, 2, 3, 3), None, [1, 1], [1, 1], [0, 0], 2, [2, 2]), (2, None))


@rule(aten.conv_transpose2d.input, samples=_transposed_samples)
@rule(
    aten.conv_transpose1d.default,
    samples=lambda: [Sample((torch.randn(2, 4, 9), torch.randn(4, 3, 4), torch.randn(3), [2], [1]), (2, None, None))],
)  # fmt: skip
@rule(
    aten.conv_transpose3d.input,
    samples=lambda: [
        Sample((torch.randn(1, 2, 2, 9, 3), torch.randn(2, 3, 1, 4, 2), None, [1, 2, 2], [0, 1, 0]), (3, None))
    ],
)
def conv_transpose(
    builder: ShardingBuilder,
    x: ShardedValue,
    weight: ShardedValue,
    bias: ShardedValue | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> ShardedValue:
    """Shard a transposed convolution: fetch the input rows of the output rows, compute, and crop.

    Output row y sums the input rows i where i*s - p <= y <= i*s - p + (k-1)*d.
    """
    n = weight.ndim - 2
    op = builder.operator
    s, p, extra, d = per_dim(stride, n), per_dim(padding, n), per_dim(output_padding, n), per_dim(dilation, n)
    axis = x.layout.sharded_axis
    if axis is None:
        raise Refused("the weight is sharded")
    first, shape = x.ndim - n, builder.out_shape
    if axis.dim == first - 2:
        layout = Layout.replicated(shape).with_dim(0, x.layout.dims[0])
        return builder.call(op, x, weight, bias, s, p, extra, groups, d, layout=layout)
    if axis.dim < first:
        raise Refused("the channels are sharded")
    i, dim = axis.dim - first, axis.dim
    bounds = builder.bounds(shape[dim])
    reach = (weight.shape[2 + i] - 1) * d[i]
    # From the first input row that reaches row a, or, where strides leave gaps, from the one before row a
    want = [
        (min(-((reach - a - p[i]) // s[i]), (a + p[i]) // s[i]), (b - 1 + p[i]) // s[i] + 1)
        for a, b in itertools.pairwise(bounds)
    ]
    window = builder.fetch(x, want, purpose="conv")
    rest, spare = list(p), list(extra)
    rest[i], spare[i] = 0, s[i] - 1  # rows that no input row reaches; the crop below removes the excess
    node = builder.emit(op, window, builder.gather(weight), bias, s, rest, _within(spare, s, d), groups, d)
    starts = [a - (lo * s[i] - p[i]) for (lo, _), a in zip(want, bounds, strict=False)]
    stops = [start + b - a for start, a, b in zip(starts, bounds, bounds[1:], strict=False)]
    return builder.value(
        _crop(builder, node, dim, starts, stops), Layout.replicated(shape).with_dim(dim, (Factor(shape[dim], bounds),))
    )


def _within(output_padding: list[int], stride: list[int], dilation: list[int]) -> list[int]:
    """Limit an output padding to less than the stride or the dilation, as torch requires."""
    return [min(o, max(s, d) - 1) for o, s, d in zip(output_padding, stride, dilation, strict=True)]


def _crop(
    builder: ShardingBuilder, node: torch.fx.Node, dim: int, starts: Sequence[int], stops: Sequence[int]
) -> torch.fx.Node:
    """Crop each rank's local result to rows [start, stop), unless that is all of it."""
    sizes = [t.shape[dim] for t in node.meta["local"]]
    if any(b > n for b, n in zip(stops, sizes, strict=True)):
        raise Refused("the output padding reaches past what the rank's rows make")
    if all(a == 0 and b == n for a, b, n in zip(starts, stops, sizes, strict=True)):
        return node
    return builder.emit(aten.slice.Tensor, node, dim, per_rank(starts), per_rank(stops))


@rule(
    aten.pixel_shuffle.default,
    samples=lambda: [Sample((torch.randn(2, 8, 7, 5), 2), (2,)), Sample((torch.randn(2, 8, 7, 5), 2), (3,)),
                     Sample((torch.randn(9, 8, 3, 5), 2), (0,))],
)  # fmt: skip
def pixel_shuffle(builder: ShardingBuilder, x: ShardedValue, factor: int) -> ShardedValue:
    """Shard ``pixel_shuffle``: each row becomes ``factor`` rows on the same rank."""
    if (x.sharded_dim or 0) < x.ndim - 3:
        return keep_sharding(builder, x, aten.pixel_shuffle.default, factor)
    return _scaled(builder, x, aten.pixel_shuffle.default, factor, x.layout.merged_dim(_row_dim(x)).scaled(factor))


@rule(
    aten.pixel_unshuffle.default,
    samples=lambda: [Sample((torch.randn(2, 3, 14, 6), 2), (2,)), Sample((torch.randn(2, 3, 6, 14), 2), (3,)),
                     Sample((torch.randn(9, 3, 6, 4), 2), (0,))],
)  # fmt: skip
def pixel_unshuffle(builder: ShardingBuilder, x: ShardedValue, factor: int) -> ShardedValue:
    """Shard ``pixel_unshuffle``: ``factor`` rows become one, so the rows are resharded at multiples of it first."""
    if (x.sharded_dim or 0) < x.ndim - 3:
        return keep_sharding(builder, x, aten.pixel_unshuffle.default, factor)
    dim = _row_dim(x)
    bounds = builder.bounds(builder.out_shape[dim])
    x = builder.reshard(x, [b * factor for b in bounds])
    return _scaled(builder, x, aten.pixel_unshuffle.default, factor, Factor(builder.out_shape[dim], bounds))


def _row_dim(x: ShardedValue) -> int:
    axis = x.layout.sharded_axis
    assert axis is not None
    if axis.dim < positive(-2, x.ndim):
        raise Refused("the channels are sharded")
    return axis.dim


def _scaled(builder: ShardingBuilder, x: ShardedValue, op: Any, factor: int, rows: Factor) -> ShardedValue:
    return builder.call(op, x, factor, layout=Layout.replicated(builder.out_shape).with_dim(_row_dim(x), (rows,)))
