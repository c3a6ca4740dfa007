# SPDX-License-Identifier: Apache-2.0
"""Scans over the rows: running sums, and the extreme element with its position."""

from __future__ import annotations

import itertools
import math
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from districompile.ir.layout import Factor, Layout, Refused, per_rank
from districompile.passes.rules.common import keep_sharding, positive
from districompile.passes.rules.dimwise import dimwise
from districompile.sharding.builder import ShardedValue, ShardingBuilder, rows_of
from districompile.sharding.registry import Sample, rule

aten = torch.ops.aten

# The neutral element, the reduction of the ranks' totals, and the operator that adds this to a rank's own rows
_RUNNING: dict[Any, tuple[float, Callable[..., Any], Callable[..., Any]]] = {
    aten.cumsum.default: (0.0, aten.sum.dim_IntList, aten.add.Tensor),
    aten.cumprod.default: (1.0, aten.prod.dim_int, aten.mul.Tensor),
    aten.logcumsumexp.default: (-math.inf, aten.logsumexp.default, aten.logaddexp.default),
}


def _running_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 9, 4)
    yield Sample((x, 2), (2,))
    yield Sample((x, 1), (2,))
    yield Sample((x, -2), (2,))


@rule(*_RUNNING, samples=_running_samples, partially_replicated=True)
def running(builder: ShardingBuilder, x: ShardedValue, dim: int, *args: Any, **kwargs: Any) -> ShardedValue:
    """Shard a running sum: each rank scans its own rows, and adds the totals of the ranks before it."""
    op = builder.operator
    dim = positive(dim, x.ndim)
    if dim != x.sharded_dim:
        return keep_sharding(builder, x, op, dim, *args, **kwargs)
    x = builder.drop_replicas(x)
    x.layout.merged_dim(dim)
    y = builder.emit(op, x, dim, *args, **kwargs)
    if builder.ranks == 1:
        return builder.value(y, x.layout)
    start, total, join = _RUNNING[op]
    ranks = builder.ranks
    last = builder.emit(aten.slice.Tensor, y, dim, -1, sys.maxsize)
    ends = Layout.replicated(x.shape).with_dim(dim, (Factor(ranks, tuple(range(ranks + 1))),))
    # One row before those of the ranks: the neutral element, for the first rank
    before = builder.fetch(builder.value(last, ends), [(-1, ranks - 1)] * ranks, fill=start)
    mine = builder.emit(aten.slice.Tensor, before, dim, 0, per_rank(range(1, ranks + 1)))
    given = builder.emit(total, mine, dim if total is aten.prod.dim_int else [dim], True)
    return builder.value(builder.emit(join, y, given), x.layout)


def _extreme_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 9, 4)
    yield Sample((x, 2), (2,))
    yield Sample((x, 2, True), (2,))
    yield Sample((torch.randint(0, 3, (2, 9, 4)).float(), 1), (1,))  # the first of several
    yield Sample((x, 1), (2,))
    yield Sample((x, -1, True), (2,))


@rule(aten.max.dim, aten.min.dim, samples=_extreme_samples, partially_replicated=True)
def extreme(
    builder: ShardingBuilder, x: ShardedValue, dim: int, keepdim: bool = False
) -> tuple[ShardedValue, ShardedValue]:
    """Shard an extreme with its position: reduce each rank's own, then find the first position that holds it."""
    op = builder.operator
    dim = positive(dim, x.ndim)
    if dim != x.sharded_dim:
        return dimwise(builder, x, dim, keepdim)  # type: ignore[no-any-return]
    return _extreme(builder, builder.drop_replicas(x), op, dim, keepdim)


def _extreme(
    builder: ShardingBuilder, x: ShardedValue, op: Any, dim: int, keepdim: bool
) -> tuple[ShardedValue, ShardedValue]:
    _, bounds, size = rows_of(x)
    both = builder.emit(op, x, dim, keepdim)
    best, place = (builder.emit(operator.getitem, both, i) for i in range(2))
    found = builder.reduce(best, "max" if op is aten.max.dim else "min")
    worse = aten.lt.Tensor if op is aten.max.dim else aten.gt.Tensor
    here = builder.emit(aten.logical_not.default, builder.emit(worse, best, found))  # so that NaN is found, too
    place = builder.emit(aten.add.Tensor, place, per_rank(bounds[:-1]))
    place = builder.emit(aten.where.ScalarOther, here, place, size)
    return found, builder.reduce(place, "min")


@rule(aten.argmax.default, aten.argmin.default, samples=_extreme_samples, partially_replicated=True)
def place_of_extreme(
    builder: ShardingBuilder, x: ShardedValue, dim: int | None = None, keepdim: bool = False
) -> ShardedValue:
    op = builder.operator
    if dim is None or positive(dim, x.ndim) != x.sharded_dim:
        return dimwise(builder, x, dim, keepdim)  # type: ignore[no-any-return]
    best = aten.max.dim if op is aten.argmax.default else aten.min.dim
    return _extreme(builder, builder.drop_replicas(x), best, positive(dim, x.ndim), keepdim)[1]


def _max_pool_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 12, 5)
    for size in ([1, 1], [7, 2], [6, 5], [12, 1], [1, 3]):
        yield Sample((x, size), (2,), used=(0,))
    yield Sample((x, [4, 5]), (3,), used=(0,))


@rule(aten.adaptive_max_pool2d.default, samples=_max_pool_samples, allow_fewer_rows_than_ranks=True)
@rule(
    aten.adaptive_max_pool1d.default, allow_fewer_rows_than_ranks=True,
    samples=lambda: [Sample((torch.randn(2, 3, 12), [n]), (2,), used=(0,)) for n in (5, 1)],
)  # fmt: skip
@rule(
    aten.adaptive_max_pool3d.default, allow_fewer_rows_than_ranks=True,
    samples=lambda: [
        Sample((torch.randn(1, 2, 3, 12, 4), size), (3,), used=(0,)) for size in ([1, 1, 1], [2, 5, 4])
    ],
)  # fmt: skip
def adaptive_max_pool(builder: ShardingBuilder, x: ShardedValue, size: Sequence[int]) -> tuple[ShardedValue, None]:
    """Shard an adaptive maximum pooling.

    To one row, it is the maximum over the ranks. To more rows, each rank fetches the rows of its windows; windows are
    made equally long by repeats of their last row.
    """
    assert builder.target is not None
    if any(user.args[1] != 0 for user in builder.target.users if user.users):
        raise Refused("the places of the maxima are used")
    op = builder.operator
    shape = tuple(int(n) for n in builder.out[0].shape)
    n, axis = len(size), x.layout.sharded_axis
    assert axis is not None
    dim, first = axis.dim, x.ndim - n

    def pooled(v: Any, out: Sequence[Any]) -> torch.fx.Node:
        return builder.emit(operator.getitem, builder.emit(op, v, list(out)), 0)

    if dim < first:
        return builder.value(pooled(x, size), Layout.replicated(shape).with_dim(dim, x.layout.dims[dim])), None
    if shape[dim] == 1:
        return builder.reduce(pooled(x, size), "max"), None
    rows = x.layout.merged_dim(dim).size
    windows = [(i * rows // shape[dim], -(-(i + 1) * rows // shape[dim])) for i in range(shape[dim])]
    try:
        bounds = builder.bounds(shape[dim])
    except Refused:
        return builder.replicated_value(pooled(builder.gather(x), size)), None
    want = [(windows[a][0], windows[b - 1][1]) for a, b in itertools.pairwise(bounds)]
    longest = max(b - a for a, b in windows)
    picks = [
        [min(a + k, b - 1) - lo for a, b in windows[s:t] for k in range(longest)]
        for s, t, (lo, _) in zip(bounds, bounds[1:], want, strict=False)
    ]
    node = builder.emit(
        torch.ops.districompile.pick.default, builder.fetch(x, want, purpose="resize"), dim, per_rank(picks)
    )
    local: list[Any] = list(shape[first:])
    local[dim - first] = per_rank(b - a for a, b in itertools.pairwise(bounds))
    return builder.value(
        pooled(node, local), Layout.replicated(shape).with_dim(dim, (Factor(shape[dim], bounds),))
    ), None
