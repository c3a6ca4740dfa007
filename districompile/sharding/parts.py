# SPDX-License-Identifier: Apache-2.0
"""Parts of a sharded dim: replicated ones beside sharded ones, and several sharded segments.

Functions of :class:`~districompile.sharding.builder.ShardingBuilder`. They slice, join and reorder parts; only
:func:`in_order` sends rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx

from districompile.ir.layout import Factor, Layout, Part, PerRank, per_rank
from districompile.sharding.value import ShardedValue

if TYPE_CHECKING:
    from districompile.sharding.builder import ShardingBuilder

aten = torch.ops.aten
Offset = int | PerRank[int]


def own_rows(builder: ShardingBuilder, node: fx.Node, dim: int, factor: Factor) -> fx.Node:
    """Slice each rank's part of every sharded part out of a replicated tensor; replicated parts are kept."""
    spans: list[tuple[Offset, Offset]] = []
    for p in factor.parts:
        bounds = p.bounds
        if bounds is None:
            spans.append((p.start, p.stop))
        else:
            spans.append((per_rank(p.start + b for b in bounds[:-1]), per_rank(p.start + b for b in bounds[1:])))
    return _joined(builder, node, dim, spans)


def to_held_order(builder: ShardingBuilder, node: fx.Node, dim: int, factor: Factor) -> fx.Node:
    """Reorder ``dim``, which every rank has in full, from its own order to the held order of ``factor``."""
    spans: list[tuple[Offset, Offset]] = [(p.start, p.stop) for p in factor.parts if p.bounds is None]
    at = 1 if spans and spans[0][0] == 0 else 0
    segments = [p for p in factor.parts if p.bounds is not None]
    spans[at:at] = [
        (p.start + p.bounds[r], p.start + p.bounds[r + 1])  # type: ignore[index]
        for r in range(builder.ranks)
        for p in segments
    ]
    return _joined(builder, node, dim, spans)


def from_held_order(builder: ShardingBuilder, node: fx.Node, dim: int, factor: Factor) -> fx.Node:
    """Reorder ``dim``, which every rank has in full, from the held order of ``factor`` to its own order."""
    assert factor.bounds is not None
    starts = list(factor.bounds[:-1])
    found: dict[tuple[int, int], tuple[Offset, Offset]] = {}
    segments = [p for p in factor.parts if p.bounds is not None]
    for r, (s, p) in itertools.product(range(builder.ranks), enumerate(segments)):
        found[s, r] = (starts[r], starts[r] + p.local(r))
        starts[r] += p.local(r)
    spans = [found[key] for key in sorted(found)]
    first, last = factor.bounds[0], factor.bounds[-1]
    return _joined(builder, node, dim, [(0, first), *spans, (last, factor.size)])


def slice_parts(builder: ShardingBuilder, node: fx.Node, dim: int, factor: Factor, at: Sequence[Part]) -> fx.Node:
    """Slice neighbouring parts out of each rank's tensor: sharded ones whole, replicated ones from start to stop."""
    starts, stops = [], []
    for r in range(builder.ranks):
        offset = 0
        for p in factor.parts:
            if p.start <= at[0].start < p.stop:
                starts.append(offset + at[0].start - p.start)
            if p.start < at[-1].stop <= p.stop:
                stops.append(offset + (p.local(r) if p.bounds is not None else at[-1].stop - p.start))
            offset += p.local(r)
    return builder.emit(aten.slice.Tensor, node, dim, per_rank(starts), per_rank(stops))


def parts_between(factor: Factor, first: int, last: int) -> list[Part] | None:
    """Return the parts of elements [first, last): replicated ones in part, sharded ones whole. None for others."""
    found = []
    for p in factor.parts:
        start, stop = max(p.start, first), min(p.stop, last)
        if start < stop:
            if p.bounds is not None and (start, stop) != (p.start, p.stop):
                return None
            found.append(Part(start, stop, p.bounds))
    return found


def joined_parts(parts: Sequence[Part]) -> Factor | None:
    """Return the factor of parts that follow each other, or None where no factor describes them."""
    return Factor.of_parts([p.stop - p.start for p in parts], [p.bounds for p in parts])


def relaid(builder: ShardingBuilder, x: ShardedValue, dim: int, target: Factor) -> ShardedValue | None:
    """Lay out ``dim``, which is one factor, as ``target`` without a transfer; None where that is impossible.

    It is possible where each part of the target is a sharded part that ``x`` has, or lies in a replicated one.
    """
    if len(x.layout.dims[dim]) != 1:
        return None
    factor = x.layout.dims[dim][0]
    spans: list[tuple[Offset, Offset]] = []
    for p in target.parts:
        inside = [(i, q) for i, q in enumerate(factor.parts) if q.start <= p.start and p.stop <= q.stop]
        if not inside:
            return None
        at, q = inside[0]
        if q.bounds is not None and q != p:
            return None
        own = [(0, p.stop - p.start)] * builder.ranks if p.bounds is None else list(itertools.pairwise(p.bounds))
        shift = [sum(o.local(r) for o in factor.parts[:at]) for r in range(builder.ranks)]
        if q.bounds is None:
            shift = [s + p.start - q.start for s in shift]
        else:
            own = [(0, b - a) for a, b in own]
        spans.append(
            (
                per_rank(s + a for s, (a, _) in zip(shift, own, strict=True)),
                per_rank(s + b for s, (_, b) in zip(shift, own, strict=True)),
            )
        )
    node = _joined(builder, x.node, dim, spans)
    return builder.value(node, x.layout.with_dim(dim, (target,)), x.replicated)


def in_order(builder: ShardingBuilder, x: ShardedValue) -> ShardedValue:
    """Lay out a segmented value so that each rank owns one run of rows."""
    axis = x.layout.sharded_axis
    assert axis is not None
    bounds = builder.bounds(axis.size)
    layout = x.layout.map_sharded(lambda f: Factor(f.size, bounds))
    if builder.ranks == 1:
        return builder.value(x.node, layout, x.replicated)
    if axis.index or x.replicated is not None:
        return builder.slice_local(builder.gather(x), layout)
    factor, inner = x.layout.merged_dim(axis.dim), x.layout.shape[axis.dim] // axis.size
    parts = []
    for p in factor.parts:
        node = slice_parts(builder, x.node, axis.dim, factor, [p])
        parts.append(builder.value(node, x.layout.with_dim(axis.dim, (Factor(p.stop - p.start, p.bounds),))))
    return builder.value(join_rows(builder, parts, axis.dim, [b * inner for b in bounds]), layout)


def join_rows(builder: ShardingBuilder, tensors: Sequence[ShardedValue], dim: int, bounds: Sequence[int]) -> fx.Node:
    """Concatenate along the rows, and give each rank one run of the result: it fetches these rows of every tensor."""
    node: fx.Node | None = None
    offset = 0
    for t in tensors:
        # Rows of the other tensors are zero here, so that the sum has every row in its place
        want = [(a - offset, b - offset) for a, b in itertools.pairwise(bounds)]
        part = builder.fetch(t, want) if t.is_sharded else builder.window(t, dim, want)
        add = aten.logical_or.default if t.dtype == torch.bool else aten.add.Tensor
        node = part if node is None else builder.emit(add, node, part)
        offset += t.shape[dim]
    assert node is not None
    return node


def drop_replicas(builder: ShardingBuilder, x: ShardedValue) -> ShardedValue:
    """Keep replicated parts on one rank only, without a transfer: those in front on the first, others on the last."""
    axis = x.layout.sharded_axis
    assert axis is not None
    node, dim, factor = x.node, axis.dim, axis.factor
    layout = x.layout.map_sharded(lambda f: f.drop_replicas)
    if builder.ranks == 1:
        return builder.value(node, layout, x.replicated)
    if axis.index:
        factors, dim = x.layout.all_factors()
        node = builder.emit(aten.reshape.default, node, builder.local_sizes(Layout(tuple((f,) for f in factors))))
    else:
        factor = x.layout.merged_dim(dim)
    assert factor.bounds is not None
    last, after = builder.ranks - 1, factor.size - factor.bounds[-1]
    starts = per_rank(0 if r == 0 else factor.bounds[0] for r in range(builder.ranks))
    stops = per_rank(factor.local(r) - (0 if r == last else after) for r in range(builder.ranks))
    node = builder.emit(aten.slice.Tensor, node, dim, starts, stops)
    if axis.index:
        node = builder.emit(aten.reshape.default, node, builder.local_sizes(layout))
    return builder.value(node, layout, x.replicated)


def gather_rows(
    builder: ShardingBuilder, x: ShardedValue, dim: int, *, purpose: str, any_order: bool, held: bool
) -> fx.Node:
    """Gather the rows of ``dim``, of which they are the outermost factor, between the parts that are replicated."""
    factor = x.layout.merged_dim(dim)
    bounds = factor.bounds
    assert bounds is not None
    if not factor.partially_replicated and not factor.segments:
        return builder.fetch(x, [(0, factor.size)] * builder.ranks, purpose=purpose, any_order=any_order)
    before, after, n = bounds[0], factor.size - bounds[-1], factor.rows
    own = per_rank(before + b - a for a, b in itertools.pairwise(bounds))
    # In the held order, the segments are one run of rows
    layout = x.layout.with_dim(dim, (Factor(n, tuple(b - before for b in bounds)),))
    mine = ShardedValue(x.node, layout)
    if factor.partially_replicated:
        mine = builder.value(builder.emit(aten.slice.Tensor, x, dim, before, own), layout)
    rows = builder.fetch(mine, [(0, n)] * builder.ranks, purpose=purpose, any_order=any_order)
    parts = [rows]
    if before:
        parts.insert(0, builder.emit(aten.slice.Tensor, x, dim, 0, before))
    if after:
        parts.append(builder.emit(aten.slice.Tensor, x, dim, own, _plus(own, after)))
    node = rows if len(parts) == 1 else builder.emit(aten.cat.default, parts, dim)
    return from_held_order(builder, node, dim, factor) if factor.segments and not (any_order or held) else node


def _joined(builder: ShardingBuilder, node: fx.Node, dim: int, spans: Sequence[tuple[Offset, Offset]]) -> fx.Node:
    """Concatenate slices of a tensor along ``dim``. Slices that follow each other are one, and empty ones are left."""
    runs: list[tuple[Offset, Offset]] = []
    for start, stop in spans:
        if start == stop:
            continue
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    slices = [builder.emit(aten.slice.Tensor, node, dim, start, stop) for start, stop in runs]
    return slices[0] if len(slices) == 1 else builder.emit(aten.cat.default, slices, dim)


def _plus(x: Offset, k: int) -> Offset:
    return per_rank(v + k for v in x.values) if isinstance(x, PerRank) else x + k
