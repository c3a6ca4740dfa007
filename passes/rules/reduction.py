"""Reductions: local where the rows are kept, a partial result and a ``reduce`` over the ranks where they are not."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from districompile.cutter import Cutter, Value
from districompile.ir.layout import Factor, Layout, Refused, per_rank
from districompile.passes.rules.common import along, cast, positive, wide
from districompile.registry import Sample, rule

aten = torch.ops.aten


def _dims(x: Value, dim: int | Sequence[int] | None) -> list[int]:
    if dim is None or (not isinstance(dim, int) and not dim):
        return list(range(x.ndim))
    return [positive(d, x.ndim) for d in ([dim] if isinstance(dim, int) else dim)]


def _kept(x: Value, dims: Sequence[int], keepdim: bool) -> Layout:
    if not keepdim:
        return x.layout.without(dims)
    layout = x.layout
    for d in dims:
        layout = layout.with_dim(d, ())
    return layout


def _samples(*tail: Any) -> list[Sample]:
    x = torch.randn(2, 3, 9, 4)
    return [
        Sample((x, [2, 3], *tail), (2,)), Sample((x, [1], True, *tail), (2,)), Sample((x, [-1, -2], True, *tail), (2,)),
        Sample((x, [3]), (2,)),
    ]  # fmt: skip


@rule(aten.mean.default, kind="reduction", samples=lambda: [Sample((torch.randn(2, 9, 4),), (1,))])
@rule(aten.mean.dim, kind="reduction", samples=_samples, mixed=True)
def mean(cut: Cutter, x: Value, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Value:
    dims = _dims(x, dim)
    if x.cut_dim not in dims:
        return cut.call(aten.mean.dim, x, dims, keepdim, dtype=dtype, layout=_kept(x, dims, keepdim))
    return cut.whole_value(cast(cut, _mean(cut, cut.unmixed(x), dims, keepdim, dtype or wide(x.dtype)), cut.out.dtype))


def _mean(cut: Cutter, x: Value, dims: Sequence[int], keepdim: bool, dtype: torch.dtype) -> torch.fx.Node:
    total = cut.reduce(cut.emit(aten.sum.dim_IntList, x, list(dims), keepdim, dtype=dtype), "sum")
    return cut.emit(aten.div.Tensor, total, float(math.prod(x.shape[d] for d in dims)))


@rule(aten.sum.default, kind="reduction", samples=lambda: [Sample((torch.randn(2, 9, 4),), (1,))])
@rule(aten.sum.dim_IntList, kind="reduction", samples=_samples, mixed=True)
def sum_(cut: Cutter, x: Value, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Value:
    dims = _dims(x, dim)
    if x.cut_dim not in dims:
        return cut.call(aten.sum.dim_IntList, x, dims, keepdim, dtype=dtype, layout=_kept(x, dims, keepdim))
    return cut.reduce(cut.emit(aten.sum.dim_IntList, cut.unmixed(x), dims, keepdim, dtype=dtype), "sum")


@rule(aten.amax.default, aten.amin.default, kind="reduction", samples=_samples, mixed=True)
def extremum(cut: Cutter, x: Value, dim: Any = (), keepdim: bool = False) -> Value:
    """The replicated parts of a mixed dim do not matter: their maximum is the same everywhere."""
    op = cut.operator
    dims = _dims(x, dim)
    if x.cut_dim not in dims:
        return cut.call(op, x, dims, keepdim, layout=_kept(x, dims, keepdim))
    return cut.reduce(cut.emit(op, x, dims, keepdim), "max" if op is aten.amax.default else "min")


@rule(
    aten.max.default, aten.min.default, kind="reduction", mixed=True,
    samples=lambda: [Sample((torch.randn(2, 9, 4),), (1,))],
)  # fmt: skip
def full_extremum(cut: Cutter, x: Value) -> Value:
    op = cut.operator
    return cut.reduce(cut.emit(op, x), "max" if op is aten.max.default else "min")


@rule(
    aten.any.default, aten.all.default, kind="reduction", mixed=True,
    samples=lambda: [Sample((torch.randn(2, 9, 4) > 2.5,), (1,))],
)  # fmt: skip
def truth(cut: Cutter, x: Value) -> Value:
    op = cut.operator
    number = cut.emit(aten._to_copy.default, cut.emit(op, x), dtype=torch.float32)
    found = cut.reduce(number, "max" if op is aten.any.default else "min")
    return cut.whole_value(cut.emit(aten.gt.Scalar, found, 0.5))


def _norm_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 9, 4)
    yield Sample((x, 2, [2, 3], True), (2,))
    yield Sample((x, 2, [1]), (2,))
    yield Sample((x, 1, [2]), (2,))
    yield Sample((x, float("inf"), [2], True), (2,))


@rule(aten.linalg_vector_norm.default, kind="reduction", samples=_norm_samples, mixed=True)
def vector_norm(cut: Cutter, x: Value, order: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Value:
    op, dims = aten.linalg_vector_norm.default, _dims(x, dim)
    if x.cut_dim not in dims:
        layout = _kept(x, dims, keepdim)
        return cut.call(op, x, order, dims, keepdim, layout=layout, **kwargs)
    if order not in (1, 2, math.inf):
        raise Refused(f"vector norm of order {order} over the rows")
    y = cut.emit(op, cut.unmixed(x), order, dims, keepdim, dtype=wide(x.dtype))
    if order == 2:
        y = cut.emit(aten.mul.Tensor, y, y)
    total = cut.reduce(y, "max" if order == math.inf else "sum").node
    return cut.whole_value(cast(cut, cut.emit(aten.sqrt.default, total) if order == 2 else total, cut.out.dtype))


def _var_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 9, 4) + 3
    yield Sample((x, [1]), (2,), {"correction": 0, "keepdim": True})
    yield Sample((x, [2, 3]), (2,), {"correction": 1})
    yield Sample((x, [-1, -2]), (2,), {"correction": 0, "keepdim": True})


def _old_var_samples() -> Iterable[Sample]:
    yield Sample((torch.randn(2, 3, 9, 4), [1], False, True), (2,))
    yield Sample((torch.randn(2, 3, 9, 4), [2], True), (2,))


@rule(aten.var.dim, aten.std.dim, kind="reduction", samples=_old_var_samples, mixed=True)
def var_dim(cut: Cutter, x: Value, dim: Any = None, unbiased: bool = True, keepdim: bool = False) -> Value:
    return var(cut, x, dim, correction=1 if unbiased else 0, keepdim=keepdim)  # type: ignore[no-any-return]


def _full_var_samples() -> Iterable[Sample]:
    yield Sample((torch.randn(2, 3, 9, 4),), (2,))
    yield Sample((torch.randn(2, 3, 9, 4), False), (2,))


@rule(aten.var.default, aten.std.default, kind="reduction", samples=_full_var_samples, mixed=True)
def full_var(cut: Cutter, x: Value, unbiased: bool = True) -> Value:
    return var(cut, x, None, correction=1 if unbiased else 0)  # type: ignore[no-any-return]


@rule(aten.var.correction, aten.std.correction, kind="reduction", samples=_var_samples, mixed=True)
def var(cut: Cutter, x: Value, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Value:
    name = str(cut.operator)
    root, op = ".std" in name, aten.std.correction if ".std" in name else aten.var.correction
    dims = _dims(x, dim)
    if x.cut_dim not in dims:
        return cut.call(op, x, dims, correction=correction, keepdim=keepdim, layout=_kept(x, dims, keepdim))
    node = spread_over_rows(cut, cut.unmixed(x), dims, keepdim, 1 if correction is None else correction)[0]
    return cut.whole_value(cast(cut, cut.emit(aten.sqrt.default, node) if root else node, cut.out.dtype))


def spread_over_rows(
    cut: Cutter, x: Value, dims: Sequence[int], keepdim: bool, correction: float
) -> tuple[torch.fx.Node, torch.fx.Node]:
    """Variance and mean over dims that hold the rows, in two passes: nothing is squared before the mean is taken
    off."""
    y = cut.value(cast(cut, x.node, wide(x.dtype)), x.layout)
    centre = _mean(cut, y, dims, True, wide(x.dtype))
    away = cut.emit(aten.sub.Tensor, y, centre)
    total = cut.reduce(
        cut.emit(aten.sum.dim_IntList, cut.emit(aten.mul.Tensor, away, away), list(dims), keepdim), "sum"
    )
    count = math.prod(x.shape[d] for d in dims)
    if not keepdim:
        centre = cut.emit(aten.squeeze.dims, centre, list(dims))
    return cut.emit(aten.div.Tensor, total, float(max(0.0, count - correction))), centre


@rule(aten.var_mean.correction, aten.std_mean.correction, kind="reduction", samples=_var_samples, mixed=True)
def var_mean(
    cut: Cutter, x: Value, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Value, Value]:
    root = "std_mean" in str(cut.operator)
    op = aten.std_mean.correction if root else aten.var_mean.correction
    dims = _dims(x, dim)
    if x.cut_dim not in dims:
        both = cut.emit(op, x, dims, correction=correction, keepdim=keepdim)
        first, second = (
            cut.value(cut.emit(torch.ops.aten.alias.default, node), _kept(x, dims, keepdim))
            for node in (_item(cut, both, 0), _item(cut, both, 1))
        )
        return first, second
    spread, centre = spread_over_rows(cut, cut.unmixed(x), dims, keepdim, 1 if correction is None else correction)
    spread = cut.emit(aten.sqrt.default, spread) if root else spread
    dtype = x.dtype
    return cut.whole_value(cast(cut, spread, dtype)), cut.whole_value(cast(cut, centre, dtype))


@rule(aten.var_mean.dim, aten.std_mean.dim, kind="reduction", samples=_old_var_samples, mixed=True)
def var_mean_dim(
    cut: Cutter, x: Value, dim: Any = None, unbiased: bool = True, keepdim: bool = False
) -> tuple[Value, Value]:
    return var_mean(cut, x, dim, correction=1 if unbiased else 0, keepdim=keepdim)  # type: ignore[no-any-return]


@rule(aten.var_mean.default, aten.std_mean.default, kind="reduction", samples=_full_var_samples, mixed=True)
def full_var_mean(cut: Cutter, x: Value, unbiased: bool = True) -> tuple[Value, Value]:
    return var_mean(cut, x, None, correction=1 if unbiased else 0)  # type: ignore[no-any-return]


def _item(cut: Cutter, node: torch.fx.Node, index: int) -> torch.fx.Node:
    return cut.emit(operator.getitem, node, index)


def _softmax_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 9, 4) * 4
    yield Sample((x, -1), (2,))
    yield Sample((x, 2), (2,))


@rule(aten.softmax.int, kind="reduction", samples=_softmax_samples, mixed=True)
@rule(
    aten._softmax.default, kind="reduction", mixed=True,
    samples=lambda: [Sample((torch.randn(2, 9, 4), 1, False), (1,))],
)  # fmt: skip
def softmax(cut: Cutter, x: Value, dim: int, *args: Any, **kwargs: Any) -> Value:
    """Over the rows: the maximum and the sum of the exponentials are reduced over the ranks."""
    op = cut.operator
    dim = positive(dim, x.ndim)
    if dim != x.cut_dim:
        return along(cut, x, op, dim, *args, **kwargs)
    x = cut.unmixed(x)
    y, total, _ = _exponentials(cut, x, dim, wide(cut.out.dtype))
    return cut.value(cast(cut, cut.emit(aten.div.Tensor, y, total), cut.out.dtype), x.layout)


def _exponentials(
    cut: Cutter, x: Value, dim: int, dtype: torch.dtype
) -> tuple[torch.fx.Node, torch.fx.Node, torch.fx.Node]:
    """exp(x - max), its sum over the whole dim, and x - max."""
    y = cast(cut, x.node, dtype)
    top = cut.reduce(cut.emit(aten.amax.default, y, [dim], True), "max")
    shifted = cut.emit(aten.sub.Tensor, y, top)
    exps = cut.emit(aten.exp.default, shifted)
    return exps, cut.reduce(cut.emit(aten.sum.dim_IntList, exps, [dim], True), "sum").node, shifted


@rule(aten.log_softmax.int, kind="reduction", samples=_softmax_samples, mixed=True)
@rule(
    aten._log_softmax.default, kind="reduction", mixed=True,
    samples=lambda: [Sample((torch.randn(2, 9, 4), 1, False), (1,))],
)  # fmt: skip
def log_softmax(cut: Cutter, x: Value, dim: int, *args: Any, **kwargs: Any) -> Value:
    op = cut.operator
    dim = positive(dim, x.ndim)
    if dim != x.cut_dim:
        return along(cut, x, op, dim, *args, **kwargs)
    x = cut.unmixed(x)
    _, total, shifted = _exponentials(cut, x, dim, wide(cut.out.dtype))
    node = cut.emit(aten.sub.Tensor, shifted, cut.emit(aten.log.default, total))
    return cut.value(cast(cut, node, cut.out.dtype), x.layout)


def _pooled(size_out: Sequence[int], size_in: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Adaptive pooling: of each spatial dim, the window [start, stop) of each output element."""
    return [
        [(i * n // m, -(-(i + 1) * n // m)) for i in range(m)] for m, n in zip(size_out, size_in, strict=True)
    ]  # fmt: skip


def _adaptive_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 12, 5)
    yield Sample((x, [1, 1]), (2,))
    yield Sample((x, [6, 5]), (2,))
    yield Sample((x, [7, 2]), (2,))
    yield Sample((x, [3, 1]), (2,))
    yield Sample((x, [12, 1]), (2,))


@rule(aten.adaptive_avg_pool2d.default, kind="reduction", samples=_adaptive_samples, few=True)
@rule(
    aten.adaptive_avg_pool1d.default, kind="reduction", few=True,
    samples=lambda: [Sample((torch.randn(2, 3, 12), [5]), (2,)), Sample((torch.randn(2, 3, 12), [1]), (2,))],
)  # fmt: skip
@rule(
    aten.adaptive_avg_pool3d.default, kind="reduction", few=True,
    samples=lambda: [
        Sample((torch.randn(1, 2, 3, 12, 4), [1, 1, 1]), (3,)), Sample((torch.randn(1, 2, 3, 12, 4), [2, 5, 4]), (3,)),
    ],
)  # fmt: skip
def adaptive_avg_pool(cut: Cutter, x: Value, size: Sequence[int]) -> Value:
    """To one element a mean; to more, means over windows that change from row to row: each rank adds up what it has of
    every window, and the sums are reduced, or, where windows are fewer than a rank's rows, made where they are
    needed."""
    op = cut.operator
    n = len(size)
    where = x.layout.cut
    assert where is not None
    if where.dim < x.ndim - n:
        return along(cut, x, op, list(size))
    dim, shape = where.dim, cut.out_shape
    rows_in, rows_out = x.layout.coarse(dim).size, shape[dim]
    windows = _pooled([rows_out], [rows_in])[0]
    inner: list[Any] = list(shape[x.ndim - n :])
    at = dim - (x.ndim - n)
    counts = [b - a for a, b in windows]
    try:
        bounds: tuple[int, ...] | None = cut.bounds(rows_out)
    except Refused:
        bounds = None
    sums = torch.ops.districompile.window_sums.default
    if bounds is None:
        bounded = x.layout.coarse(dim).bounds
        assert bounded is not None
        spans = [[(max(a, lo) - lo, max(max(a, lo), min(b, hi)) - lo) for a, b in windows]
                 for lo, hi in itertools.pairwise(bounded)]  # fmt: skip
        source = x.node
        layout = Layout.whole(shape)
    else:
        want = [(windows[a][0], windows[b - 1][1]) for a, b in itertools.pairwise(bounds)]
        source = cut.fetch(x, want, kind="resize")
        spans = [[(a - lo, b - lo) for a, b in windows[first:last]]
                 for first, last, (lo, _) in zip(bounds, bounds[1:], want, strict=False)]  # fmt: skip
        layout = Layout.whole(shape).with_dim(dim, (Factor(rows_out, bounds),))
    share = counts if bounds is None else None
    starts: Any = per_rank([a for a, _ in s] for s in spans)
    stops: Any = per_rank([b for _, b in s] for s in spans)
    divide: Any = share or per_rank([b - a for a, b in s] for s in spans)
    node = cut.emit(sums, source, dim, starts, stops, divide)
    if any(shape[d] != x.shape[d] for d in range(x.ndim - n, x.ndim) if d != dim):
        inner[at] = rows_out if bounds is None else per_rank(b - a for a, b in itertools.pairwise(bounds))
        node = cut.emit(op, node, inner)
    return cut.reduce(node, "sum") if bounds is None else cut.value(node, layout)
