"""Operators that run through the rows: running sums, and the extreme element with its position."""

from __future__ import annotations

import itertools
import math
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from districompile.cutter import Cutter, Value, rows_of
from districompile.ir.layout import Factor, Layout, Refused, per_rank
from districompile.passes.rules.common import along, positive
from districompile.passes.rules.dimwise import dimwise
from districompile.registry import Sample, rule

aten = torch.ops.aten

# What a running total starts from, how totals of ranks are added up, and how that is added to a rank's own
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


@rule(*_RUNNING, kind="reduction", samples=_running_samples, mixed=True)
def running(cut: Cutter, x: Value, dim: int, *args: Any, **kwargs: Any) -> Value:
    """Over the rows: each rank runs through its own, and adds the totals of those before it."""
    op = cut.operator
    dim = positive(dim, x.ndim)
    if dim != x.cut_dim:
        return along(cut, x, op, dim, *args, **kwargs)
    x = cut.unmixed(x)
    x.layout.coarse(dim)
    y = cut.emit(op, x, dim, *args, **kwargs)
    if cut.ranks == 1:
        return cut.value(y, x.layout)
    start, total, join = _RUNNING[op]
    ranks = cut.ranks
    last = cut.emit(aten.slice.Tensor, y, dim, -1, sys.maxsize)
    ends = Layout.whole(x.shape).with_dim(dim, (Factor(ranks, tuple(range(ranks + 1))),))
    # One row before those of the ranks: what the first one starts from
    before = cut.fetch(cut.value(last, ends), [(-1, ranks - 1)] * ranks, fill=start)
    mine = cut.emit(aten.slice.Tensor, before, dim, 0, per_rank(range(1, ranks + 1)))
    given = cut.emit(total, mine, dim if total is aten.prod.dim_int else [dim], True)
    return cut.value(cut.emit(join, y, given), x.layout)


def _extreme_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 9, 4)
    yield Sample((x, 2), (2,))
    yield Sample((x, 2, True), (2,))
    yield Sample((torch.randint(0, 3, (2, 9, 4)).float(), 1), (1,))  # the first of several
    yield Sample((x, 1), (2,))
    yield Sample((x, -1, True), (2,))


@rule(aten.max.dim, aten.min.dim, kind="reduction", samples=_extreme_samples, mixed=True)
def extreme(cut: Cutter, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
    """Over the rows: each rank's own, then the best of all ranks, and the first place that holds it."""
    op = cut.operator
    dim = positive(dim, x.ndim)
    if dim != x.cut_dim:
        return dimwise(cut, x, dim, keepdim)  # type: ignore[no-any-return]
    return _extreme(cut, cut.unmixed(x), op, dim, keepdim)


def _extreme(cut: Cutter, x: Value, op: Any, dim: int, keepdim: bool) -> tuple[Value, Value]:
    _, bounds, size = rows_of(x)
    both = cut.emit(op, x, dim, keepdim)
    best, place = (cut.emit(operator.getitem, both, i) for i in range(2))
    found = cut.reduce(best, "max" if op is aten.max.dim else "min")
    worse = aten.lt.Tensor if op is aten.max.dim else aten.gt.Tensor
    here = cut.emit(aten.logical_not.default, cut.emit(worse, best, found))  # so that NaN is found, too
    place = cut.emit(aten.add.Tensor, place, per_rank(bounds[:-1]))
    place = cut.emit(aten.where.ScalarOther, here, place, size)
    return found, cut.reduce(place, "min")


@rule(aten.argmax.default, aten.argmin.default, kind="reduction", samples=_extreme_samples, mixed=True)
def place_of_extreme(cut: Cutter, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    op = cut.operator
    if dim is None or positive(dim, x.ndim) != x.cut_dim:
        return dimwise(cut, x, dim, keepdim)  # type: ignore[no-any-return]
    best = aten.max.dim if op is aten.argmax.default else aten.min.dim
    return _extreme(cut, cut.unmixed(x), best, positive(dim, x.ndim), keepdim)[1]


def _max_pool_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 12, 5)
    for size in ([1, 1], [7, 2], [6, 5], [12, 1], [1, 3]):
        yield Sample((x, size), (2,), used=(0,))
    yield Sample((x, [4, 5]), (3,), used=(0,))


@rule(aten.adaptive_max_pool2d.default, kind="reduction", samples=_max_pool_samples, few=True)
@rule(
    aten.adaptive_max_pool1d.default, kind="reduction", few=True,
    samples=lambda: [Sample((torch.randn(2, 3, 12), [n]), (2,), used=(0,)) for n in (5, 1)],
)  # fmt: skip
@rule(
    aten.adaptive_max_pool3d.default, kind="reduction", few=True,
    samples=lambda: [
        Sample((torch.randn(1, 2, 3, 12, 4), size), (3,), used=(0,)) for size in ([1, 1, 1], [2, 5, 4])
    ],
)  # fmt: skip
def adaptive_max_pool(cut: Cutter, x: Value, size: Sequence[int]) -> tuple[Value, None]:
    """To one row, the maximum over the ranks; to more, each rank takes the rows of its windows, all windows made
    equally long by repeating their last row."""
    assert cut.target is not None
    if any(user.args[1] != 0 for user in cut.target.users if user.users):
        raise Refused("the places of the maxima are used")
    op = cut.operator
    shape = tuple(int(n) for n in cut.out[0].shape)
    n, where = len(size), x.layout.cut
    assert where is not None
    dim, first = where.dim, x.ndim - n

    def pooled(v: Any, out: Sequence[Any]) -> torch.fx.Node:
        return cut.emit(operator.getitem, cut.emit(op, v, list(out)), 0)

    if dim < first:
        return cut.value(pooled(x, size), Layout.whole(shape).with_dim(dim, x.layout.dims[dim])), None
    if shape[dim] == 1:
        return cut.reduce(pooled(x, size), "max"), None
    rows = x.layout.coarse(dim).size
    windows = [(i * rows // shape[dim], -(-(i + 1) * rows // shape[dim])) for i in range(shape[dim])]
    try:
        bounds = cut.bounds(shape[dim])
    except Refused:
        return cut.whole_value(pooled(cut.gather(x), size)), None
    want = [(windows[a][0], windows[b - 1][1]) for a, b in itertools.pairwise(bounds)]
    longest = max(b - a for a, b in windows)
    picks = [
        [min(a + k, b - 1) - lo for a, b in windows[s:t] for k in range(longest)]
        for s, t, (lo, _) in zip(bounds, bounds[1:], want, strict=False)
    ]
    node = cut.emit(torch.ops.districompile.pick.default, cut.fetch(x, want, kind="resize"), dim, per_rank(picks))
    local: list[Any] = list(shape[first:])
    local[dim - first] = per_rank(b - a for a, b in itertools.pairwise(bounds))
    return cut.value(pooled(node, local), Layout.whole(shape).with_dim(dim, (Factor(shape[dim], bounds),))), None
