"""Reductions: local where the rows are kept, a partial result and a ``reduce`` over the ranks where they are not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from districompile.cutter import Cutter, Value
from districompile.ir.layout import Layout, Refused
from districompile.passes.rules.common import along, positive
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


@rule(aten.mean.dim, kind="reduction", samples=_samples)
def mean(cut: Cutter, x: Value, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Value:
    dims = _dims(x, dim)
    if x.cut_dim not in dims:
        return cut.call(aten.mean.dim, x, dims, keepdim, dtype=dtype, layout=_kept(x, dims, keepdim))
    count = math.prod(x.shape[d] for d in dims)
    wide = dtype or (torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype)
    total = cut.reduce(cut.emit(aten.sum.dim_IntList, x, dims, keepdim, dtype=wide), "sum")
    node = cut.emit(aten.div.Tensor, total, float(count))
    return cut.whole_value(_as(cut, node, cut.out.dtype))


def _as(cut: Cutter, node: torch.fx.Node, dtype: torch.dtype) -> torch.fx.Node:
    return node if node.meta["local"][0].dtype == dtype else cut.emit(aten._to_copy.default, node, dtype=dtype)


@rule(aten.sum.dim_IntList, kind="reduction", samples=_samples)
def sum_(cut: Cutter, x: Value, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Value:
    dims = _dims(x, dim)
    if x.cut_dim not in dims:
        return cut.call(aten.sum.dim_IntList, x, dims, keepdim, dtype=dtype, layout=_kept(x, dims, keepdim))
    node = cut.reduce(cut.emit(aten.sum.dim_IntList, x, dims, keepdim, dtype=dtype), "sum")
    return node


@rule(aten.amax.default, aten.amin.default, kind="reduction", samples=_samples)
def extremum(cut: Cutter, x: Value, dim: Any = (), keepdim: bool = False) -> Value:
    op: Any = cut.target.target  # type: ignore[union-attr]
    dims = _dims(x, dim)
    if x.cut_dim not in dims:
        return cut.call(op, x, dims, keepdim, layout=_kept(x, dims, keepdim))
    return cut.reduce(cut.emit(op, x, dims, keepdim), "max" if op is aten.amax.default else "min")


@rule(
    aten.linalg_vector_norm.default, kind="reduction",
    samples=lambda: [
        Sample((torch.randn(2, 3, 9, 4), 2, [2, 3], True), (2,)), Sample((torch.randn(2, 3, 9, 4), 2, [1]), (2,)),
    ],
)  # fmt: skip
def vector_norm(cut: Cutter, x: Value, order: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Value:
    dims = _dims(x, dim)
    if x.cut_dim not in dims:
        layout = _kept(x, dims, keepdim)
        return cut.call(aten.linalg_vector_norm.default, x, order, dims, keepdim, layout=layout, **kwargs)
    if order != 2:
        raise Refused(f"vector norm of order {order} over the rows")
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    squares = cut.emit(aten.mul.Tensor, *(cut.emit(aten._to_copy.default, x, dtype=wide),) * 2)
    total = cut.reduce(cut.emit(aten.sum.dim_IntList, squares, dims, keepdim), "sum")
    return cut.whole_value(_as(cut, cut.emit(aten.sqrt.default, total), cut.out.dtype))


@rule(aten.var.dim, kind="reduction", samples=lambda: [Sample((torch.randn(2, 3, 9, 4), [1], False, True), (2,))])
@rule(
    aten.var.correction, kind="reduction",
    samples=lambda: [Sample((torch.randn(2, 3, 9, 4), [1]), (2,), {"correction": 0, "keepdim": True})],
)  # fmt: skip
def var(cut: Cutter, x: Value, dim: Any = None, *args: Any, **kwargs: Any) -> Value:
    dims = _dims(x, dim)
    if x.cut_dim in dims:
        raise Refused("variance over the rows")
    layout = _kept(x, dims, len(cut.out_shape) == x.ndim)
    return cut.call(cut.target.target, x, dims, *args, layout=layout, **kwargs)  # type: ignore[union-attr]


def _softmax_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 9, 4) * 4
    yield Sample((x, -1), (2,))
    yield Sample((x, 2), (2,))


@rule(aten.softmax.int, kind="reduction", samples=_softmax_samples)
@rule(aten._softmax.default, kind="reduction", samples=lambda: [Sample((torch.randn(2, 9, 4), 1, False), (1,))])
def softmax(cut: Cutter, x: Value, dim: int, *args: Any, **kwargs: Any) -> Value:
    """Over the rows: the maximum and the sum of the exponentials are reduced over the ranks."""
    op: Any = cut.target.target  # type: ignore[union-attr]
    dim = positive(dim, x.ndim)
    if dim != x.cut_dim:
        return along(cut, x, op, dim, *args, **kwargs)
    out = cut.out.dtype
    wide = torch.float32 if out in (torch.float16, torch.bfloat16) else out
    y = _as(cut, x.node, wide)
    top = cut.reduce(cut.emit(aten.amax.default, y, [dim], True), "max")
    exps = cut.emit(aten.exp.default, cut.emit(aten.sub.Tensor, y, top))
    total = cut.reduce(cut.emit(aten.sum.dim_IntList, exps, [dim], True), "sum")
    return cut.value(_as(cut, cut.emit(aten.div.Tensor, exps, total), out), x.layout)


@rule(
    aten.adaptive_avg_pool2d.default, kind="reduction",
    samples=lambda: [Sample((torch.randn(2, 3, 9, 4), [1, 1]), (2,))],
)  # fmt: skip
def adaptive_avg_pool2d(cut: Cutter, x: Value, size: Sequence[int]) -> Value:
    """To one element: a mean. To more, windows of changing size: refused."""
    if x.cut_dim is not None and x.cut_dim < x.ndim - 2:
        return along(cut, x, aten.adaptive_avg_pool2d.default, list(size))
    if list(size) != [1, 1]:
        raise Refused("adaptive pooling to more than one row")
    return mean(cut, x, [-1, -2], True)  # type: ignore[no-any-return]
