# SPDX-License-Identifier: Apache-2.0
"""Slices, splits, concatenation, and writes into a slice.

All of them are local along other dims than the rows. Along the rows, the concatenation of replicated tensors with a
sharded one has a *partially replicated* dim (text tokens beside an image's), and that of sharded tensors a *segmented*
dim. A slice takes such a part off again. None of these sends anything. All other cases are fetches.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from districompile.ir.layout import Factor, Layout, Refused, per_rank
from districompile.passes.rules.common import keep_sharding, positive
from districompile.sharding import parts as row_parts
from districompile.sharding.builder import ShardedValue, ShardingBuilder, rows_of
from districompile.sharding.registry import Sample, rule

aten = torch.ops.aten


def _slice_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 12, 4)
    yield Sample((x, 2, 1, 11), (2,))
    yield Sample((x, 2, 0, sys.maxsize, 2), (2,))
    yield Sample((x, 2, 1, sys.maxsize, 2), (2,))
    yield Sample((x, 3, 1, 3), (2,))
    yield Sample((x, 2, -9, -1), (2,))
    yield Sample((x, 2, 3, 4), (2,))
    yield Sample((x, 2, -1, sys.maxsize), (2,))


@rule(
    aten.slice.Tensor,
    samples=_slice_samples,
    partially_replicated=True,
    allow_fewer_rows_than_ranks=True,
)
def slice_(
    builder: ShardingBuilder,
    x: ShardedValue,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> ShardedValue:
    """Shard a slice: local along other dims than the rows, else :func:`rows_between`."""
    dim = positive(dim, x.ndim)
    first, last, step = slice(start, end, step).indices(x.shape[dim])
    if x.sharded_dim != dim:
        return keep_sharding(builder, x, aten.slice.Tensor, dim, first, last, step)
    return rows_between(builder, x, first, last, step)


def rows_between(builder: ShardingBuilder, x: ShardedValue, first: int, last: int, step: int = 1) -> ShardedValue:
    """Return rows first, first + step, ... below last of the sharded dim."""
    dim = x.sharded_dim
    assert dim is not None
    size = len(range(first, last, step))
    if size == x.shape[dim]:
        return x
    if size == 0:
        return builder.replicated_value(builder.emit(aten.slice.Tensor, x, dim, 0, 0))
    if step == 1:
        part = _parts(builder, x, dim, first, last)
        if part is not None:
            return part
    x = builder.drop_replicas(x)
    x.layout.merged_dim(dim)
    try:
        bounds = builder.bounds(size)
    except Refused:  # fewer rows than ranks: every rank fetches these rows, and no others
        return builder.replicated_value(_stepped(builder, builder.fetch(x, [(first, last)] * builder.ranks), dim, step))
    want = [(first + a * step, first + (b - 1) * step + 1) for a, b in itertools.pairwise(bounds)]
    node = _stepped(builder, builder.fetch(x, want), dim, step)
    return builder.value(node, x.layout.with_dim(dim, (Factor(size, bounds),)))


def _stepped(builder: ShardingBuilder, node: torch.fx.Node, dim: int, step: int) -> torch.fx.Node:
    return node if step == 1 else builder.emit(aten.slice.Tensor, node, dim, 0, sys.maxsize, step)


def _parts(builder: ShardingBuilder, x: ShardedValue, dim: int, first: int, last: int) -> ShardedValue | None:
    """Return a slice of several parts of the dim, which is local; None for one that divides a sharded part."""
    axis = x.layout.sharded_axis
    assert axis is not None
    if not (axis.partially_replicated or axis.segments):
        return None
    factor = x.layout.merged_dim(dim)
    within = next((p for p in factor.parts if p.start <= first and last <= p.stop and p.bounds is not None), None)
    found = [within] if within is not None else row_parts.parts_between(factor, first, last)
    if found is None:
        return None
    joined = row_parts.joined_parts(found)
    assert joined is not None  # neighbours in a factor
    if joined.bounds is not None and not joined.segments and any(a == b for a, b in itertools.pairwise(joined.bounds)):
        return None  # a segment of which some rank owns nothing
    node = row_parts.slice_parts(builder, x.node, dim, factor, found)
    if joined.bounds is None:
        return builder.replicated_value(node)
    piece = builder.value(node, x.layout.with_dim(dim, (joined,)))
    if within is None or (first, last) == (within.start, within.stop):
        return piece
    return rows_between(builder, piece, first - within.start, last - within.start)


def _select_samples() -> Iterable[Sample]:
    yield Sample((torch.randn(3, 7, 2), 0, 1), (1,))
    yield Sample((torch.randn(3, 7, 2), 1, -2), (1,))


@rule(aten.select.int, samples=_select_samples, partially_replicated=True, allow_fewer_rows_than_ranks=True)
def select(builder: ShardingBuilder, x: ShardedValue, dim: int, index: int) -> ShardedValue:
    """Shard ``select``. One of the rows becomes a replicated value."""
    dim = positive(dim, x.ndim)
    if x.sharded_dim != dim:
        return builder.call(aten.select.int, x, dim, index, layout=x.layout.without([dim]))
    index = positive(index, x.shape[dim])
    return _squeezed(builder, _row(builder, x, index), dim)


def _row(builder: ShardingBuilder, x: ShardedValue, index: int) -> ShardedValue:
    """Return one row, on every rank."""
    row = rows_between(builder, x, index, index + 1)
    return builder.gather(row) if builder.ranks > 1 else builder.replicated_value(row.node)


def _squeezed(builder: ShardingBuilder, x: ShardedValue, dim: int) -> ShardedValue:
    return builder.replicated_value(builder.emit(aten.select.int, x, dim, 0))


def _pieces(builder: ShardingBuilder, x: ShardedValue, dim: int, sizes: Sequence[int]) -> tuple[ShardedValue, ...]:
    out, start = [], 0
    for size in sizes:
        if x.sharded_dim == dim:
            out.append(rows_between(builder, x, start, start + size))
        else:
            assert builder.target is not None
            node = builder.emit(aten.slice.Tensor, x, dim, start, start + size, name=f"{builder.target.name}_part")
            out.append(builder.value(node, x.layout.with_dim(dim, Layout.replicated((size,)).dims[0])))
        start += size
    return tuple(out)


@rule(
    aten.split_with_sizes.default, partially_replicated=True, allow_fewer_rows_than_ranks=True,
    samples=lambda: [
        Sample((torch.randn(2, 7, 9), [4, 5], -1), (1,)), Sample((torch.randn(2, 12, 3), [5, 1, 6], 1), (1,)),
    ],
)  # fmt: skip
@rule(
    aten.split.Tensor,
    aten.chunk.default,
    aten.tensor_split.sections,
    partially_replicated=True,
    allow_fewer_rows_than_ranks=True,
    samples=lambda: [Sample((torch.randn(2, 7, 9), 4, -1), (1,)), Sample((torch.randn(2, 12, 3), 3, 1), (1,))],
)
def split(builder: ShardingBuilder, x: ShardedValue, how: Any, dim: int = 0) -> tuple[ShardedValue, ...]:
    """Shard ``split`` and ``chunk`` as slices."""
    dim = positive(dim, x.ndim)
    results: Any = builder.out
    return _pieces(builder, x, dim, [int(t.shape[dim]) for t in results])


@rule(
    aten.unbind.int, partially_replicated=True, allow_fewer_rows_than_ranks=True,
    samples=lambda: [Sample((torch.randn(3, 7, 2), 0), (1,)), Sample((torch.randn(3, 5, 2), 1), (1,))],
)  # fmt: skip
def unbind(builder: ShardingBuilder, x: ShardedValue, dim: int = 0) -> tuple[ShardedValue, ...]:
    """Shard ``unbind``. Rows are gathered first."""
    dim = positive(dim, x.ndim)
    if x.sharded_dim == dim:
        gathered = builder.gather(x)
        nodes = [builder.emit(aten.select.int, gathered, dim, i) for i in range(x.shape[dim])]
        return tuple(builder.replicated_value(n) for n in nodes)
    layout = x.layout.without([dim])
    assert builder.target is not None
    name = builder.target.name
    return tuple(
        builder.value(builder.emit(aten.select.int, x, dim, i, name=f"{name}_part"), layout)
        for i in range(x.shape[dim])
    )


def _cat_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 7)
    yield Sample(([x, torch.randn(2, 1, 7)], 1), (2, 2))
    yield Sample(([x, torch.randn(2, 1, 7)], 1), (2, None))
    yield Sample(([torch.randn(2, 3, 4), x], -1), (None, 2))
    yield Sample(([torch.randn(2, 3, 2), x, torch.randn(2, 3, 3), torch.randn(2, 3, 1)], 2), (None, 2, None, None))
    yield Sample(([x, torch.randn(2, 3, 5), torch.randn(2, 3, 6)], 2), (2, None, 2))
    yield Sample(([torch.randn(2, 3, 29), x], 2), (None, 2))
    yield Sample(([x, torch.randn(2, 3, 5)], 2), (2, 1))


@rule(aten.cat.default, aten.concat.default, samples=_cat_samples, partially_replicated=True)
def cat(builder: ShardingBuilder, tensors: Sequence[ShardedValue], dim: int = 0) -> ShardedValue:
    """Shard a concatenation: local along other dims than the rows."""
    tensors = [t for t in tensors if t.shape != (0,)]
    dim = positive(dim, len(builder.out_shape))
    elsewhere = [t for t in tensors if t.is_sharded and t.sharded_dim != dim]
    if not elsewhere:
        return _cat_rows(builder, [t for t in tensors if t.shape[dim]], dim)
    leader = elsewhere[0]
    axis = leader.layout.sharded_axis
    assert axis is not None
    factors = leader.layout.dims[axis.dim]
    parts = [builder.redistribute(t, axis.dim, factors) for t in tensors]
    layout = Layout.replicated(builder.out_shape).with_dim(axis.dim, factors)
    return builder.call(aten.cat.default, parts, dim, layout=layout)


def _cat_rows(builder: ShardingBuilder, tensors: Sequence[ShardedValue], dim: int) -> ShardedValue:
    """Concatenate along the rows.

    One sharded tensor beside replicated ones gives a partially replicated dim, if the replicated ones have together no
    more rows than it. Several sharded tensors give a segmented dim. Otherwise each rank fetches its rows of the result.
    """
    shape, total = builder.out_shape, builder.out_shape[dim]
    factors = [t.layout.merged_dim(dim) for t in tensors]
    found = [p for f in factors for p in f.parts]
    factor = Factor.of_parts([p.stop - p.start for p in found], [p.bounds for p in found])
    if factor is not None and total - factor.rows <= factor.rows:
        joined = builder.emit(aten.cat.default, list(tensors), dim)
        copies = [t.replicated if t.is_sharded else t.node for t in tensors]
        copy = builder.emit(aten.cat.default, copies, dim) if all(copies) else None
        return builder.value(joined, Layout.replicated(shape).with_dim(dim, (factor,)), copy)
    bounds = builder.bounds(total)
    return builder.value(row_parts.join_rows(builder, tensors, dim, bounds), Layout.sharded_at(shape, dim, bounds))


@rule(aten.stack.default, partially_replicated=True,
      samples=lambda: [Sample(([torch.randn(2, 7), torch.randn(2, 7)], 1), (1, 1))])  # fmt: skip
def stack(builder: ShardingBuilder, tensors: Sequence[ShardedValue], dim: int = 0) -> ShardedValue:
    """Shard ``stack``: all tensors take the layout of the first sharded one."""
    leader = next(t for t in tensors if t.is_sharded)
    axis = leader.layout.sharded_axis
    assert axis is not None
    dim = positive(dim, leader.ndim + 1)
    factors = leader.layout.dims[axis.dim]
    parts = [builder.redistribute(t, axis.dim, factors) for t in tensors]
    layout = parts[0].layout.insert(dim, Layout.replicated((len(parts),)).dims[0])
    return builder.call(aten.stack.default, parts, dim, layout=layout)


def _scatter_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 12, 4)
    yield Sample((x, torch.randn(2, 2, 12, 4), 1, 0, 2), (2, 2))
    yield Sample((x, torch.randn(2, 2, 12, 4), 1, 0, 2), (None, 2))
    yield Sample((x, torch.randn(2, 3, 5, 4), 2, 3, 8), (2, 2))
    yield Sample((x, torch.randn(2, 3, 1, 4), 2, -1, sys.maxsize), (2, None))
    yield Sample((x, torch.randn(2, 3, 7, 4), 2, 3, 10), (None, 2))
    yield Sample((x, torch.randn(2, 3, 6, 4), 2, 1, sys.maxsize, 2), (2, 2))
    yield Sample((x, torch.randn(2, 3, 4, 4), 2, 0, 11, 3), (None, 2))
    yield Sample((x, torch.randn(2, 3, 2, 4), 2, 4, 10, 5), (2, None))


@rule(aten.slice_scatter.default, samples=_scatter_samples)
def slice_scatter(
    builder: ShardingBuilder,
    x: ShardedValue,
    source: ShardedValue,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> ShardedValue:
    """Shard a write into a slice. Along the rows, each rank replaces those of its own that are written."""
    dim = positive(dim, x.ndim)
    first, last, step = slice(start, end, step).indices(x.shape[dim])
    leader = x if x.is_sharded else source
    axis = leader.layout.sharded_axis
    assert axis is not None
    if axis.dim != dim:
        factors = leader.layout.dims[axis.dim]
        parts = [builder.redistribute(v, axis.dim, factors) for v in (x, source)]
        layout = parts[0].layout
        return builder.call(aten.slice_scatter.default, *parts, dim, first, last, step, layout=layout)
    if not x.is_sharded:
        x = builder.slice_local(x, Layout.sharded_at(x.shape, dim, builder.bounds(x.shape[dim])))
    _, bounds, _ = rows_of(x)
    if step != 1:
        return _every(builder, x, source, dim, first, step)
    want = [(a - first, b - first) for a, b in itertools.pairwise(bounds)]
    new = builder.fetch(source, want) if source.is_sharded else builder.window(source, dim, want)
    return _where_rows(builder, x, new, dim, first, last)


def _every(
    builder: ShardingBuilder, x: ShardedValue, source: ShardedValue, dim: int, first: int, step: int
) -> ShardedValue:
    """Write ``source`` into rows first, first + step, ...: each rank writes those among its own."""
    _, bounds, _ = rows_of(x)
    count = source.shape[dim]
    before = [min(count, max(0, -((first - b) // step))) for b in bounds]  # rows of source above each bound
    want = list(itertools.pairwise(before))
    new = builder.fetch(source, want) if source.is_sharded else builder.window(source, dim, want)
    starts = [min(first + a * step - b, c - b) for (a, _), b, c in zip(want, bounds, bounds[1:], strict=False)]
    stops = [s + max(0, (b - a - 1) * step + 1) if b > a else s for s, (a, b) in zip(starts, want, strict=True)]
    node = builder.emit(aten.slice_scatter.default, x, new, dim, per_rank(starts), per_rank(stops), step)
    return builder.value(node, x.layout)


def _where_rows(
    builder: ShardingBuilder, x: ShardedValue, new: torch.fx.Node, dim: int, first: int, last: int
) -> ShardedValue:
    """Write ``new`` into rows [first, last) of the global tensor, ``x`` elsewhere."""
    _, bounds, _ = rows_of(x)
    device = x.node.meta["local"][0].device
    rows = builder.emit(aten.arange.start, per_rank(bounds[:-1]), per_rank(bounds[1:]), device=device, pin_memory=False)
    inside = builder.emit(
        aten.logical_and.default, builder.emit(aten.ge.Scalar, rows, first), builder.emit(aten.lt.Scalar, rows, last)
    )
    heights = per_rank(b - a for a, b in itertools.pairwise(bounds))
    mask = builder.emit(aten.reshape.default, inside, [heights if d == dim else 1 for d in range(x.ndim)])
    return builder.value(builder.emit(aten.where.self, mask, new, x), x.layout)


@rule(
    aten.select_scatter.default,
    samples=lambda: [
        Sample((torch.randn(2, 9, 4), torch.randn(9, 4), 0, 1), (1, 0)),
        Sample((torch.randn(2, 9, 4), torch.randn(2, 4), 1, 7), (1, None)),
    ],
)  # fmt: skip
def select_scatter(
    builder: ShardingBuilder, x: ShardedValue, source: ShardedValue, dim: int, index: int
) -> ShardedValue:
    """Shard ``select_scatter`` as a write into a slice of one."""
    dim = positive(dim, x.ndim)
    index = positive(index, x.shape[dim])
    thick = source.layout.insert(dim)
    thicker = builder.call(aten.unsqueeze.default, source, dim, layout=thick)
    return slice_scatter(builder, x, thicker, dim, index, index + 1)  # type: ignore[no-any-return]
