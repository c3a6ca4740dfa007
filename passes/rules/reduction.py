# SPDX-License-Identifier: Apache-2.0
"""Reductions: local where the rows are kept, else a partial result and a ``reduce`` over the ranks."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from districompile.ir.layout import Factor, Layout, Refused, per_rank
from districompile.passes.rules.common import accumulation_dtype, cast, keep_sharding, positive
from districompile.sharding.builder import ShardedValue, ShardingBuilder
from districompile.sharding.registry import Sample, rule

aten = torch.ops.aten


def _dims(x: ShardedValue, dim: int | Sequence[int] | None) -> list[int]:
    if dim is None or (not isinstance(dim, int) and not dim):
        return list(range(x.ndim))
    return [positive(d, x.ndim) for d in ([dim] if isinstance(dim, int) else dim)]


def _kept(x: ShardedValue, dims: Sequence[int], keepdim: bool) -> Layout:
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


@rule(aten.mean.default, samples=lambda: [Sample((torch.randn(2, 9, 4),), (1,))])
@rule(aten.mean.dim, samples=_samples, partially_replicated=True)
def mean(
    builder: ShardingBuilder,
    x: ShardedValue,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> ShardedValue:
    dims = _dims(x, dim)
    if x.sharded_dim not in dims:
        return builder.call(aten.mean.dim, x, dims, keepdim, dtype=dtype, layout=_kept(x, dims, keepdim))
    return builder.replicated_value(
        cast(
            builder,
            _mean(
                builder, builder.drop_replicas(x, any_order=True), dims, keepdim, dtype or accumulation_dtype(x.dtype)
            ),
            builder.out.dtype,
        )
    )


def _mean(
    builder: ShardingBuilder, x: ShardedValue, dims: Sequence[int], keepdim: bool, dtype: torch.dtype
) -> torch.fx.Node:
    total = builder.reduce(builder.emit(aten.sum.dim_IntList, x, list(dims), keepdim, dtype=dtype), "sum")
    return builder.emit(aten.div.Tensor, total, float(math.prod(x.shape[d] for d in dims)))


@rule(aten.sum.default, samples=lambda: [Sample((torch.randn(2, 9, 4),), (1,))])
@rule(aten.sum.dim_IntList, samples=_samples, partially_replicated=True)
def sum_(
    builder: ShardingBuilder,
    x: ShardedValue,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> ShardedValue:
    dims = _dims(x, dim)
    if x.sharded_dim not in dims:
        return builder.call(aten.sum.dim_IntList, x, dims, keepdim, dtype=dtype, layout=_kept(x, dims, keepdim))
    return builder.reduce(
        builder.emit(aten.sum.dim_IntList, builder.drop_replicas(x, any_order=True), dims, keepdim, dtype=dtype), "sum"
    )


@rule(aten.amax.default, aten.amin.default, samples=_samples, partially_replicated=True)
def extremum(builder: ShardingBuilder, x: ShardedValue, dim: Any = (), keepdim: bool = False) -> ShardedValue:
    """Shard a maximum or minimum. Replicated parts may stay: their maximum is the same on every rank."""
    op = builder.operator
    dims = _dims(x, dim)
    if x.sharded_dim not in dims:
        return builder.call(op, x, dims, keepdim, layout=_kept(x, dims, keepdim))
    return builder.reduce(builder.emit(op, x, dims, keepdim), "max" if op is aten.amax.default else "min")


@rule(
    aten.max.default, aten.min.default, partially_replicated=True,
    samples=lambda: [Sample((torch.randn(2, 9, 4),), (1,))],
)  # fmt: skip
def full_extremum(builder: ShardingBuilder, x: ShardedValue) -> ShardedValue:
    """Shard the maximum or minimum of all elements."""
    op = builder.operator
    return builder.reduce(builder.emit(op, x), "max" if op is aten.max.default else "min")


@rule(
    aten.any.default, aten.all.default, partially_replicated=True,
    samples=lambda: [Sample((torch.randn(2, 9, 4) > 2.5,), (1,))],
)  # fmt: skip
def truth(builder: ShardingBuilder, x: ShardedValue) -> ShardedValue:
    """Shard ``any`` and ``all`` by a maximum or minimum of 0 and 1."""
    op = builder.operator
    number = builder.emit(aten._to_copy.default, builder.emit(op, x), dtype=torch.float32)
    found = builder.reduce(number, "max" if op is aten.any.default else "min")
    return builder.replicated_value(builder.emit(aten.gt.Scalar, found, 0.5))


def _norm_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 9, 4)
    yield Sample((x, 2, [2, 3], True), (2,))
    yield Sample((x, 2, [1]), (2,))
    yield Sample((x, 1, [2]), (2,))
    yield Sample((x, float("inf"), [2], True), (2,))


@rule(aten.linalg_vector_norm.default, samples=_norm_samples, partially_replicated=True)
def vector_norm(
    builder: ShardingBuilder, x: ShardedValue, order: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> ShardedValue:
    op, dims = aten.linalg_vector_norm.default, _dims(x, dim)
    if x.sharded_dim not in dims:
        layout = _kept(x, dims, keepdim)
        return builder.call(op, x, order, dims, keepdim, layout=layout, **kwargs)
    if order not in (1, 2, math.inf):
        raise Refused(f"vector norm of order {order} over the rows")
    y = builder.emit(
        op, builder.drop_replicas(x, any_order=True), order, dims, keepdim, dtype=accumulation_dtype(x.dtype)
    )
    if order == 2:
        y = builder.emit(aten.mul.Tensor, y, y)
    total = builder.reduce(y, "max" if order == math.inf else "sum").node
    return builder.replicated_value(
        cast(builder, builder.emit(aten.sqrt.default, total) if order == 2 else total, builder.out.dtype)
    )


def _var_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 9, 4) + 3
    yield Sample((x, [1]), (2,), {"correction": 0, "keepdim": True})
    yield Sample((x, [2, 3]), (2,), {"correction": 1})
    yield Sample((x, [-1, -2]), (2,), {"correction": 0, "keepdim": True})


def _old_var_samples() -> Iterable[Sample]:
    yield Sample((torch.randn(2, 3, 9, 4), [1], False, True), (2,))
    yield Sample((torch.randn(2, 3, 9, 4), [2], True), (2,))


@rule(aten.var.dim, aten.std.dim, samples=_old_var_samples, partially_replicated=True)
def var_dim(
    builder: ShardingBuilder, x: ShardedValue, dim: Any = None, unbiased: bool = True, keepdim: bool = False
) -> ShardedValue:
    return var(builder, x, dim, correction=1 if unbiased else 0, keepdim=keepdim)  # type: ignore[no-any-return]


def _full_var_samples() -> Iterable[Sample]:
    yield Sample((torch.randn(2, 3, 9, 4),), (2,))
    yield Sample((torch.randn(2, 3, 9, 4), False), (2,))


@rule(aten.var.default, aten.std.default, samples=_full_var_samples, partially_replicated=True)
def full_var(builder: ShardingBuilder, x: ShardedValue, unbiased: bool = True) -> ShardedValue:
    return var(builder, x, None, correction=1 if unbiased else 0)  # type: ignore[no-any-return]


@rule(aten.var.correction, aten.std.correction, samples=_var_samples, partially_replicated=True)
def var(
    builder: ShardingBuilder,
    x: ShardedValue,
    dim: Any = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> ShardedValue:
    name = str(builder.operator)
    root, op = ".std" in name, aten.std.correction if ".std" in name else aten.var.correction
    dims = _dims(x, dim)
    if x.sharded_dim not in dims:
        return builder.call(op, x, dims, correction=correction, keepdim=keepdim, layout=_kept(x, dims, keepdim))
    node = variance_over_rows(
        builder, builder.drop_replicas(x, any_order=True), dims, keepdim, 1 if correction is None else correction
    )[0]
    return builder.replicated_value(
        cast(builder, builder.emit(aten.sqrt.default, node) if root else node, builder.out.dtype)
    )


def variance_over_rows(
    builder: ShardingBuilder, x: ShardedValue, dims: Sequence[int], keepdim: bool, correction: float
) -> tuple[torch.fx.Node, torch.fx.Node]:
    """Compute variance and mean over dims that hold the rows, in two passes.

    The mean is subtracted before anything is squared, so that a large mean does not cancel the variance.
    """
    y = builder.value(cast(builder, x.node, accumulation_dtype(x.dtype)), x.layout)
    centre = _mean(builder, y, dims, True, accumulation_dtype(x.dtype))
    away = builder.emit(aten.sub.Tensor, y, centre)
    total = builder.reduce(
        builder.emit(aten.sum.dim_IntList, builder.emit(aten.mul.Tensor, away, away), list(dims), keepdim), "sum"
    )
    count = math.prod(x.shape[d] for d in dims)
    if not keepdim:
        centre = builder.emit(aten.squeeze.dims, centre, list(dims))
    return builder.emit(aten.div.Tensor, total, float(max(0.0, count - correction))), centre


@rule(
    aten.var_mean.correction,
    aten.std_mean.correction,
    samples=_var_samples,
    partially_replicated=True,
)
def var_mean(
    builder: ShardingBuilder,
    x: ShardedValue,
    dim: Any = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> tuple[ShardedValue, ShardedValue]:
    root = "std_mean" in str(builder.operator)
    op = aten.std_mean.correction if root else aten.var_mean.correction
    dims = _dims(x, dim)
    if x.sharded_dim not in dims:
        both = builder.emit(op, x, dims, correction=correction, keepdim=keepdim)
        first, second = (
            builder.value(builder.emit(torch.ops.aten.alias.default, node), _kept(x, dims, keepdim))
            for node in (_item(builder, both, 0), _item(builder, both, 1))
        )
        return first, second
    variance, centre = variance_over_rows(
        builder, builder.drop_replicas(x, any_order=True), dims, keepdim, 1 if correction is None else correction
    )
    variance = builder.emit(aten.sqrt.default, variance) if root else variance
    dtype = x.dtype
    return builder.replicated_value(cast(builder, variance, dtype)), builder.replicated_value(
        cast(builder, centre, dtype)
    )


@rule(aten.var_mean.dim, aten.std_mean.dim, samples=_old_var_samples, partially_replicated=True)
def var_mean_dim(
    builder: ShardingBuilder, x: ShardedValue, dim: Any = None, unbiased: bool = True, keepdim: bool = False
) -> tuple[ShardedValue, ShardedValue]:
    return var_mean(builder, x, dim, correction=1 if unbiased else 0, keepdim=keepdim)  # type: ignore[no-any-return]


@rule(aten.var_mean.default, aten.std_mean.default, samples=_full_var_samples, partially_replicated=True)
def full_var_mean(
    builder: ShardingBuilder, x: ShardedValue, unbiased: bool = True
) -> tuple[ShardedValue, ShardedValue]:
    return var_mean(builder, x, None, correction=1 if unbiased else 0)  # type: ignore[no-any-return]


def _item(builder: ShardingBuilder, node: torch.fx.Node, index: int) -> torch.fx.Node:
    return builder.emit(operator.getitem, node, index)


def _softmax_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 9, 4) * 4
    yield Sample((x, -1), (2,))
    yield Sample((x, 2), (2,))


@rule(aten.softmax.int, samples=_softmax_samples, partially_replicated=True)
@rule(
    aten._softmax.default, partially_replicated=True,
    samples=lambda: [Sample((torch.randn(2, 9, 4), 1, False), (1,))],
)  # fmt: skip
def softmax(builder: ShardingBuilder, x: ShardedValue, dim: int, *args: Any, **kwargs: Any) -> ShardedValue:
    """Shard a softmax. Over the rows, the maximum and the sum of the exponentials are reduced over the ranks."""
    op = builder.operator
    dim = positive(dim, x.ndim)
    if dim != x.sharded_dim:
        return keep_sharding(builder, x, op, dim, *args, **kwargs)
    x = builder.drop_replicas(x, any_order=True)
    y, total, _ = _exponentials(builder, x, dim, accumulation_dtype(builder.out.dtype))
    return builder.value(cast(builder, builder.emit(aten.div.Tensor, y, total), builder.out.dtype), x.layout)


def _exponentials(
    builder: ShardingBuilder, x: ShardedValue, dim: int, dtype: torch.dtype
) -> tuple[torch.fx.Node, torch.fx.Node, torch.fx.Node]:
    """Compute exp(x - max), its sum over the global dim, and x - max."""
    y = cast(builder, x.node, dtype)
    top = builder.reduce(builder.emit(aten.amax.default, y, [dim], True), "max")
    shifted = builder.emit(aten.sub.Tensor, y, top)
    exps = builder.emit(aten.exp.default, shifted)
    return exps, builder.reduce(builder.emit(aten.sum.dim_IntList, exps, [dim], True), "sum").node, shifted


@rule(aten.log_softmax.int, samples=_softmax_samples, partially_replicated=True)
@rule(
    aten._log_softmax.default, partially_replicated=True,
    samples=lambda: [Sample((torch.randn(2, 9, 4), 1, False), (1,))],
)  # fmt: skip
def log_softmax(builder: ShardingBuilder, x: ShardedValue, dim: int, *args: Any, **kwargs: Any) -> ShardedValue:
    op = builder.operator
    dim = positive(dim, x.ndim)
    if dim != x.sharded_dim:
        return keep_sharding(builder, x, op, dim, *args, **kwargs)
    x = builder.drop_replicas(x, any_order=True)
    _, total, shifted = _exponentials(builder, x, dim, accumulation_dtype(builder.out.dtype))
    node = builder.emit(aten.sub.Tensor, shifted, builder.emit(aten.log.default, total))
    return builder.value(cast(builder, node, builder.out.dtype), x.layout)


def _pooled(size_out: Sequence[int], size_in: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Return the windows [start, stop) of adaptive pooling: for each spatial dim, one for each output element."""
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


@rule(aten.adaptive_avg_pool2d.default, samples=_adaptive_samples, allow_fewer_rows_than_ranks=True)
@rule(
    aten.adaptive_avg_pool1d.default, allow_fewer_rows_than_ranks=True,
    samples=lambda: [Sample((torch.randn(2, 3, 12), [5]), (2,)), Sample((torch.randn(2, 3, 12), [1]), (2,))],
)  # fmt: skip
@rule(
    aten.adaptive_avg_pool3d.default, allow_fewer_rows_than_ranks=True,
    samples=lambda: [
        Sample((torch.randn(1, 2, 3, 12, 4), [1, 1, 1]), (3,)), Sample((torch.randn(1, 2, 3, 12, 4), [2, 5, 4]), (3,)),
    ],
)  # fmt: skip
def adaptive_avg_pool(builder: ShardingBuilder, x: ShardedValue, size: Sequence[int]) -> ShardedValue:
    """Shard an adaptive average pooling, whose windows differ from row to row.

    With enough output rows for all ranks, each rank fetches the rows of its windows. With fewer, each rank sums its
    part of every window, and the sums are reduced.
    """
    op = builder.operator
    n = len(size)
    axis = x.layout.sharded_axis
    assert axis is not None
    if axis.dim < x.ndim - n:
        return keep_sharding(builder, x, op, list(size))
    dim, shape = axis.dim, builder.out_shape
    rows_in, rows_out = x.layout.merged_dim(dim).size, shape[dim]
    windows = _pooled([rows_out], [rows_in])[0]
    inner: list[Any] = list(shape[x.ndim - n :])
    at = dim - (x.ndim - n)
    counts = [b - a for a, b in windows]
    try:
        bounds: tuple[int, ...] | None = builder.bounds(rows_out)
    except Refused:
        bounds = None
    sums = torch.ops.districompile.window_sums.default
    if bounds is None:
        bounded = x.layout.merged_dim(dim).bounds
        assert bounded is not None
        spans = [[(max(a, lo) - lo, max(max(a, lo), min(b, hi)) - lo) for a, b in windows]
                 for lo, hi in itertools.pairwise(bounded)]  # fmt: skip
        source = x.node
        layout = Layout.replicated(shape)
    else:
        want = [(windows[a][0], windows[b - 1][1]) for a, b in itertools.pairwise(bounds)]
        source = builder.fetch(x, want, purpose="resize")
        spans = [[(a - lo, b - lo) for a, b in windows[first:last]]
                 for first, last, (lo, _) in zip(bounds, bounds[1:], want, strict=False)]  # fmt: skip
        layout = Layout.replicated(shape).with_dim(dim, (Factor(rows_out, bounds),))
    share = counts if bounds is None else None
    starts: Any = per_rank([a for a, _ in s] for s in spans)
    stops: Any = per_rank([b for _, b in s] for s in spans)
    divide: Any = share or per_rank([b - a for a, b in s] for s in spans)
    node = builder.emit(sums, source, dim, starts, stops, divide)
    if any(shape[d] != x.shape[d] for d in range(x.ndim - n, x.ndim) if d != dim):
        inner[at] = rows_out if bounds is None else per_rank(b - a for a, b in itertools.pairwise(bounds))
        node = builder.emit(op, node, inner)
    return builder.reduce(node, "sum") if bounds is None else builder.value(node, layout)
