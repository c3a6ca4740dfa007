"""Pointwise operators, and those that only look at dtype or shape."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from districompile.cutter import Cutter, Value, values_in
from districompile.ir.layout import Layout, Refused
from districompile.ir.walk import replace
from districompile.registry import Sample, rule

aten = torch.ops.aten


@rule("pointwise", kind="pointwise", mixed=True)
def pointwise(cut: Cutter, *args: Any, **kwargs: Any) -> Value:
    """Broadcasting follows the largest cut operand; the others are sliced or re-cut to match it."""
    shape = cut.out_shape

    def unbroadcast(v: Value) -> Value:
        """One row, which only one rank can have "cut", stands beside many as whole."""
        at = v.cut_dim
        return v if at is None or v.shape[at] == shape[at + len(shape) - v.ndim] else cut.gather(v)

    args, kwargs = replace((args, kwargs), Value, unbroadcast)
    operands = list(values_in((args, kwargs)))
    op = cut.operator
    if not any(v.is_cut for v in operands):
        return cut.whole_value(cut.emit(op, *args, **kwargs))
    cuts = [v for v in operands if v.is_cut]
    if any(not v.layout.cut.mixed for v in cuts):  # type: ignore[union-attr]
        # To drop replicated parts costs nothing, to spread them does
        args, kwargs = replace((args, kwargs), Value, cut.unmixed)
        operands = list(values_in((args, kwargs)))
    leader = max((v for v in operands if v.is_cut), key=lambda v: (v.ndim, v.node.meta["local"][0].numel()))
    where = leader.layout.cut
    assert where is not None
    dim = where.dim + len(shape) - leader.ndim
    factors = leader.layout.dims[where.dim]

    def operand(v: Value) -> Value:
        k = dim - (len(shape) - v.ndim)
        if k < 0 or v.shape[k] == 1:
            return cut.gather(v)
        return cut.align(v, k, factors)

    local, named = replace((args, kwargs), Value, operand)
    result = cut.call(op, *local, layout=Layout.whole(shape).with_dim(dim, factors), **named)
    if cut.out.dtype.is_complex and all(v.whole is not None or not v.is_cut for v in operands):
        # Between two Fourier transforms every rank has all of it: what the second one needs is computed, not sent
        args, kwargs = replace((args, kwargs), Value, lambda v: v.whole or v.node)
        return cut.value(result.node, result.layout, cut.emit(op, *args, **kwargs))
    return result


def _prelu_samples() -> Iterable[Sample]:
    for rows in (0, 2, 3):  # as many columns as channels: the slopes belong to the channels
        yield Sample((torch.randn(7, 8, 9, 8), torch.randn(8)), (rows, None))
    yield Sample((torch.randn(2, 8, 9), torch.randn(1)), (2, None))
    yield Sample((torch.randn(2, 8, 9), torch.randn(8)), (1, None))


@rule(aten.prelu.default, kind="pointwise", samples=_prelu_samples, mixed=True)
def prelu(cut: Cutter, x: Value, weight: Value) -> Value:
    """The slopes stand along dim 1, which is not how operands are broadcast."""
    where = x.layout.cut
    if where is None:
        raise Refused("the slopes are cut")
    weight = cut.gather(weight)
    if where.dim == 1 and weight.shape[0] > 1:
        weight = cut.align(weight, 0, x.layout.dims[1])
    return cut.call(aten.prelu.default, x, weight, layout=x.layout)


@rule(
    aten.isin.Tensor_Tensor, kind="pointwise", mixed=True,
    samples=lambda: [Sample((torch.randint(0, 20, (2, 9)), torch.randint(0, 20, (9,))), (1, 0))],
)  # fmt: skip
@rule(
    aten.isin.Tensor_Scalar, kind="pointwise", mixed=True,
    samples=lambda: [Sample((torch.randint(0, 5, (2, 9)), 3), (1,))],
)  # fmt: skip
def isin(cut: Cutter, x: Value, among: Any, *args: Any, **kwargs: Any) -> Value:
    """Each element is looked for among all of the others."""
    op = cut.operator
    others = cut.gather(among) if isinstance(among, Value) else among
    return cut.call(op, x, others, *args, layout=x.layout, **kwargs)


@rule(
    aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default,
    aten.dropout.default, aten.feature_dropout.default, aten.native_dropout.default,
    kind="pointwise", mixed=True,
)  # fmt: skip
def identity(cut: Cutter, x: Value, *args: Any, **kwargs: Any) -> Value:
    return x


@rule(
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
    kind="pointwise",
    mixed=True,
)
def factory(cut: Cutter, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Takes dtype and device of ``x`` only; the new tensor is whole."""
    return cut.whole_value(cut.emit(cut.operator, x, *args, **kwargs))


def _embedding_samples() -> Iterable[Sample]:
    yield Sample((torch.randn(11, 6), torch.randint(0, 11, (2, 9))), (None, 1))


@rule(aten.embedding.default, kind="pointwise", samples=_embedding_samples, mixed=True)
def embedding(cut: Cutter, weight: Value, indices: Value, *args: Any, **kwargs: Any) -> Value:
    layout = indices.layout.insert(indices.ndim, Layout.whole(weight.shape).dims[1])
    return cut.call(aten.embedding.default, cut.gather(weight), indices, *args, layout=layout, **kwargs)
