# SPDX-License-Identifier: Apache-2.0
"""Operators that only rearrange dims: the layout is rearranged in the same way, and gives the local shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from districompile.ir.layout import Layout, Refused
from districompile.passes.rules.common import positive
from districompile.sharding.builder import ShardedValue, ShardingBuilder
from districompile.sharding.registry import Sample, rule

aten = torch.ops.aten


def _reshape_samples() -> Iterable[Sample]:
    x = torch.randn(2, 6, 9, 4)
    yield Sample((x, [2, 6, 36]), (2,))
    yield Sample((x, [12, 9, 4]), (2,))
    yield Sample((x, [2, 6, 3, 3, 4]), (2,))
    yield Sample((x, [2, 2, 3, 9, 2, 2]), (2,))
    yield Sample((x, [2, 6, 3, 12]), (2,))
    yield Sample((torch.randn(2, 72, 5), [2, 8, 3, 3, 5]), (1,))


@rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    partially_replicated=True,
    samples=_reshape_samples,
)
@rule(
    aten.flatten.using_ints, partially_replicated=True,
    samples=lambda: [Sample((torch.randn(2, 6, 9, 4), 2), (2,)), Sample((torch.randn(2, 6, 9, 4), 1, 2), (2,))],
)  # fmt: skip
@rule(
    aten.unflatten.int,
    partially_replicated=True,
    samples=lambda: [
        Sample((torch.randn(2, 36, 4), 1, [9, -1]), (1,)),
        Sample((torch.randn(2, 7, 6), 2, [2, 3]), (1,)),
    ],
)
@rule(aten.view_as.default, aten.reshape_as.default, partially_replicated=True,
      samples=lambda: [Sample((torch.randn(2, 9, 4), torch.randn(2, 36)), (1, None))])  # fmt: skip
@rule(aten.squeeze.dim, partially_replicated=True, samples=lambda: [Sample((torch.randn(2, 1, 9), 1), (2,))])
@rule(
    aten.squeeze.dims,
    partially_replicated=True,
    samples=lambda: [Sample((torch.randn(1, 1, 9), [0, 1]), (2,))],
)
@rule(
    aten.squeeze.default,
    partially_replicated=True,
    samples=lambda: [Sample((torch.randn(2, 1, 9),), (2,))],
)
def reshape(builder: ShardingBuilder, x: ShardedValue, *args: Any) -> ShardedValue:
    """Shard a reshape. Where it splits the rows elsewhere than at the bounds, the rows are resharded first."""
    shape = builder.out_shape
    try:
        layout = x.layout.regrouped(shape)
    except Refused:
        x = _recut_for(builder, builder.drop_replicas(x), shape)
        layout = x.layout.regrouped(shape)
    return builder.call(aten.reshape.default, x, builder.local_sizes(layout), layout=layout)


def _recut_for(builder: ShardingBuilder, x: ShardedValue, shape: Sequence[int]) -> ShardedValue:
    axis = x.layout.sharded_axis
    assert axis is not None
    if axis.index:
        raise Refused(f"reshape of {list(x.shape)} to {list(shape)} breaks the rows up")
    rows = x.layout.merged_dim(axis.dim)  # rows and the dims merged into them: tokens that become windows
    x = builder.value(x.node, x.layout.with_dim(axis.dim, (rows,)), x.replicated)
    for outer in sorted({s for s in shape if rows.size % s == 0 and 1 < s < rows.size}, reverse=True):
        inner = rows.size // outer
        bounds = tuple(b * inner for b in builder.bounds(outer))
        moved = x.layout.map_sharded(lambda f, b=bounds: type(f)(f.size, b))  # type: ignore[misc]
        try:
            moved.regrouped(shape)
        except Refused:
            continue
        return builder.reshard(x, bounds)
    raise Refused(f"reshape of {list(x.shape)} to {list(shape)} breaks the rows up")


def _permute(builder: ShardingBuilder, x: ShardedValue, order: Sequence[int]) -> ShardedValue:
    return builder.call(aten.permute.default, x, list(order), layout=x.layout.permuted(order))


@rule(
    aten.permute.default, partially_replicated=True,
    samples=lambda: [Sample((torch.randn(2, 3, 7, 4), [0, 2, 3, 1]), (2,))],
)  # fmt: skip
def permute(builder: ShardingBuilder, x: ShardedValue, order: Sequence[int]) -> ShardedValue:
    """Shard ``permute``."""
    return _permute(builder, x, [positive(d, x.ndim) for d in order])


@rule(
    aten.transpose.int, aten.swapaxes.default, partially_replicated=True,
    samples=lambda: [Sample((torch.randn(2, 3, 7, 4), 1, -2), (2,))],
)  # fmt: skip
def transpose(builder: ShardingBuilder, x: ShardedValue, a: int, b: int) -> ShardedValue:
    """Shard ``transpose`` as a permutation."""
    order = list(range(x.ndim))
    a, b = positive(a, x.ndim), positive(b, x.ndim)
    order[a], order[b] = order[b], order[a]
    return _permute(builder, x, order)


@rule(aten.t.default, aten.mT.default, aten.numpy_T.default, partially_replicated=True,
      samples=lambda: [Sample((torch.randn(7, 4),), (0,))])  # fmt: skip
def matrix_transpose(builder: ShardingBuilder, x: ShardedValue) -> ShardedValue:
    """Shard ``t``, ``mT`` and ``T`` as a permutation."""
    order = list(range(x.ndim))
    if x.ndim > 1:
        order[-1], order[-2] = order[-2], order[-1]
    return _permute(builder, x, order)


@rule(
    aten.movedim.int,
    partially_replicated=True,
    samples=lambda: [Sample((torch.randn(2, 3, 7), 1, -1), (2,))],
)
def movedim(builder: ShardingBuilder, x: ShardedValue, source: int, target: int) -> ShardedValue:
    """Shard ``movedim`` as a permutation."""
    order = list(range(x.ndim))
    order.insert(positive(target, x.ndim), order.pop(positive(source, x.ndim)))
    return _permute(builder, x, order)


@rule(
    aten.unsqueeze.default,
    partially_replicated=True,
    samples=lambda: [Sample((torch.randn(2, 7), -1), (1,))],
)
def unsqueeze(builder: ShardingBuilder, x: ShardedValue, dim: int) -> ShardedValue:
    """Shard ``unsqueeze``."""
    dim = positive(dim, x.ndim + 1)
    return builder.call(aten.unsqueeze.default, x, dim, layout=x.layout.insert(dim))


def _expand_samples() -> Iterable[Sample]:
    yield Sample((torch.randn(1, 7, 1), [3, 7, 5]), (1,))
    yield Sample((torch.randn(7, 1), [2, 3, -1, 4]), (0,))


@rule(aten.expand.default, aten.broadcast_to.default, partially_replicated=True, samples=_expand_samples)
def expand(builder: ShardingBuilder, x: ShardedValue, size: Sequence[int], **kwargs: Any) -> ShardedValue:
    """Shard ``expand``: the rows keep their sharding, unless one row becomes many."""
    shape = builder.out_shape
    extra = len(shape) - x.ndim
    axis = x.layout.sharded_axis
    assert axis is not None
    if shape[axis.dim + extra] != x.shape[axis.dim]:  # one row, which only one rank can have "sharded", is expanded
        return builder.replicated_value(builder.emit(aten.expand.default, builder.gather(x), list(shape)))
    layout = Layout.replicated(shape).with_dim(axis.dim + extra, x.layout.dims[axis.dim])
    return builder.call(aten.expand.default, x, builder.local_sizes(layout), layout=layout)


@rule(aten.expand_as.default, partially_replicated=True,
      samples=lambda: [
          Sample((torch.randn(1, 7), torch.randn(3, 7)), (1, 1)),
          Sample((torch.randn(1, 7), torch.randn(3, 7)), (None, 1)),
          Sample((torch.randn(1), torch.randn(3, 7)), (None, 1)),
      ])  # fmt: skip
def expand_as(builder: ShardingBuilder, x: ShardedValue, other: ShardedValue) -> ShardedValue:
    """Shard ``expand_as``: a replicated ``x`` takes the sharding of ``other``."""
    axis = other.layout.sharded_axis
    if x.is_sharded or axis is None:
        return expand(builder, x, other.shape)  # type: ignore[no-any-return]
    dim = axis.dim - (other.ndim - x.ndim)
    layout = Layout.replicated(builder.out_shape).with_dim(axis.dim, other.layout.dims[axis.dim])
    if dim >= 0 and x.shape[dim] == other.shape[axis.dim] != 1:
        x = builder.redistribute(x, dim, other.layout.dims[axis.dim])
    return builder.call(aten.expand.default, x, builder.local_sizes(layout), layout=layout)


@rule(
    aten.repeat.default,
    aten.tile.default,
    partially_replicated=True,
    samples=lambda: [
        Sample((torch.randn(2, 7, 3), [2, 1, 3]), (1,)),
        Sample((torch.randn(7, 3), [2, 1, 2]), (0,)),
        Sample((torch.randn(2, 7, 3), [1, 2, 1]), (1,)),
    ],
)
def repeat(builder: ShardingBuilder, x: ShardedValue, repeats: Sequence[int]) -> ShardedValue:
    """Shard ``repeat``: local, unless the rows are repeated."""
    times = [1] * (x.ndim - len(repeats)) + list(repeats)
    extra = len(times) - x.ndim
    axis = x.layout.sharded_axis
    assert axis is not None
    if times[axis.dim + extra] != 1:
        return _repeat_rows(builder, x, times)
    layout = Layout.replicated(builder.out_shape).with_dim(axis.dim + extra, x.layout.dims[axis.dim])
    return builder.call(aten.repeat.default, x, times, layout=layout)


def _repeat_rows(builder: ShardingBuilder, x: ShardedValue, times: Sequence[int]) -> ShardedValue:
    """Repeat gathered rows. Copies follow each other, so the rows of a rank may come from any rank."""
    gathered = builder.gather(x)
    node = builder.emit(aten.repeat.default, gathered, list(times))
    dim = len(times) - x.ndim + (x.sharded_dim or 0)
    size = builder.out_shape[dim]
    return builder.slice_local(
        builder.replicated_value(node), Layout.sharded_at(builder.out_shape, dim, builder.bounds(size))
    )


@rule(
    aten.repeat_interleave.self_int,
    partially_replicated=True,
    samples=lambda: [Sample((torch.randn(2, 7, 3), 2, 1), (1,)), Sample((torch.randn(2, 7, 3), 2, 0), (1,))],
)
def repeat_interleave(
    builder: ShardingBuilder, x: ShardedValue, repeats: int, dim: int | None = None, **kwargs: Any
) -> ShardedValue:
    """Shard ``repeat_interleave``, which is local: copies of a row stay on its rank."""
    if dim is None:
        raise Refused("repeat_interleave over the flattened tensor")  # a flat tensor holds no rows
    dim = positive(dim, x.ndim)
    x = builder.drop_replicas(x) if x.sharded_dim == dim else x
    axis = x.layout.sharded_axis
    assert axis is not None
    factors = (
        (x.layout.merged_dim(dim).scaled(repeats),)
        if dim == axis.dim
        else Layout.replicated(builder.out_shape).dims[dim]
    )
    layout = x.layout.with_dim(dim, factors)
    return builder.call(aten.repeat_interleave.self_int, x, repeats, dim, layout=layout)
