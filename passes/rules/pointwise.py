# SPDX-License-Identifier: Apache-2.0
"""Pointwise operators, and operators that read only a dtype or a shape."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from districompile.ir.graph import replace
from districompile.ir.layout import Layout, Refused
from districompile.sharding.builder import ShardedValue, ShardingBuilder, values_in
from districompile.sharding.registry import Sample, rule

aten = torch.ops.aten


@rule("pointwise", partially_replicated=True)
def pointwise(builder: ShardingBuilder, *args: Any, **kwargs: Any) -> ShardedValue:
    """Shard a pointwise operator: the largest sharded operand leads, the others are sliced or resharded to match."""
    shape = builder.out_shape

    def unbroadcast(v: ShardedValue) -> ShardedValue:
        """Gather an operand of one row that is broadcast to many; only one rank can have it "sharded"."""
        at = v.sharded_dim
        return v if at is None or v.shape[at] == shape[at + len(shape) - v.ndim] else builder.gather(v)

    args, kwargs = replace((args, kwargs), ShardedValue, unbroadcast)
    operands = list(values_in((args, kwargs)))
    op = builder.operator
    if not any(v.is_sharded for v in operands):
        return builder.replicated_value(builder.emit(op, *args, **kwargs))
    sharded = [v for v in operands if v.is_sharded]
    if any(_plain(v) for v in sharded):
        # Dropping replicated parts is free; sending them to all ranks is not
        args, kwargs = replace((args, kwargs), ShardedValue, lambda v: builder.drop_replicas(v, any_order=True))
        operands = list(values_in((args, kwargs)))
    leader = max((v for v in operands if v.is_sharded), key=_leads)
    axis = leader.layout.sharded_axis
    assert axis is not None
    dim = axis.dim + len(shape) - leader.ndim
    factors = leader.layout.dims[axis.dim]

    def operand(v: ShardedValue) -> ShardedValue:
        k = dim - (len(shape) - v.ndim)
        if k < 0 or v.shape[k] == 1:
            return builder.gather(v)
        return builder.redistribute(v, k, factors)

    local, named = replace((args, kwargs), ShardedValue, operand)
    result = builder.call(op, *local, layout=Layout.replicated(shape).with_dim(dim, factors), **named)
    if builder.out.dtype.is_complex and all(v.replicated is not None or not v.is_sharded for v in operands):
        # Between two Fourier transforms every rank has the replicated value: it is computed on each, not sent
        args, kwargs = replace((args, kwargs), ShardedValue, lambda v: v.replicated or v.node)
        return builder.value(result.node, result.layout, builder.emit(op, *args, **kwargs))
    return result


def _plain(v: ShardedValue) -> bool:
    """Return whether each rank owns one run of rows, and nothing else."""
    axis = v.layout.sharded_axis
    return axis is not None and not axis.partially_replicated and not axis.segments


def _leads(v: ShardedValue) -> tuple[int, bool, bool, int]:
    """Order operands by which should keep its layout: what others then have to send is least for the largest."""
    axis = v.layout.sharded_axis
    assert axis is not None
    return v.ndim, not axis.partially_replicated, not axis.segments, v.node.meta["local"][0].numel()


def _prelu_samples() -> Iterable[Sample]:
    for rows in (0, 2, 3):  # as many columns as channels: the slopes belong to the channels
        yield Sample((torch.randn(7, 8, 9, 8), torch.randn(8)), (rows, None))
    yield Sample((torch.randn(2, 8, 9), torch.randn(1)), (2, None))
    yield Sample((torch.randn(2, 8, 9), torch.randn(8)), (1, None))


@rule(aten.prelu.default, samples=_prelu_samples, partially_replicated=True)
def prelu(builder: ShardingBuilder, x: ShardedValue, weight: ShardedValue) -> ShardedValue:
    """Shard ``prelu``. Its slopes lie along dim 1, unlike operands that are broadcast."""
    axis = x.layout.sharded_axis
    if axis is None:
        raise Refused("the slopes are sharded")
    weight = builder.gather(weight)
    if axis.dim == 1 and weight.shape[0] > 1:
        weight = builder.redistribute(weight, 0, x.layout.dims[1])
    return builder.call(aten.prelu.default, x, weight, layout=x.layout)


@rule(
    aten.isin.Tensor_Tensor, partially_replicated=True,
    samples=lambda: [Sample((torch.randint(0, 20, (2, 9)), torch.randint(0, 20, (9,))), (1, 0))],
)  # fmt: skip
@rule(
    aten.isin.Tensor_Scalar, partially_replicated=True,
    samples=lambda: [Sample((torch.randint(0, 5, (2, 9)), 3), (1,))],
)  # fmt: skip
def isin(builder: ShardingBuilder, x: ShardedValue, among: Any, *args: Any, **kwargs: Any) -> ShardedValue:
    """Shard ``isin``: each element is compared with all of ``among``, which is gathered."""
    op = builder.operator
    others = builder.gather(among) if isinstance(among, ShardedValue) else among
    return builder.call(op, x, others, *args, layout=x.layout, **kwargs)


@rule(
    aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default,
    aten.dropout.default, aten.feature_dropout.default, aten.native_dropout.default,
    partially_replicated=True,
)  # fmt: skip
def identity(builder: ShardingBuilder, x: ShardedValue, *args: Any, **kwargs: Any) -> ShardedValue:
    """Return the operand: these operators change no value (dropout in eval mode, copies)."""
    return x


@rule(
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
    partially_replicated=True,
)
def factory(builder: ShardingBuilder, x: ShardedValue, *args: Any, **kwargs: Any) -> ShardedValue:
    """Create a replicated tensor; only the dtype and the device of ``x`` are read."""
    return builder.replicated_value(builder.emit(builder.operator, x, *args, **kwargs))


def _embedding_samples() -> Iterable[Sample]:
    yield Sample((torch.randn(11, 6), torch.randint(0, 11, (2, 9))), (None, 1))


@rule(aten.embedding.default, samples=_embedding_samples, partially_replicated=True)
def embedding(
    builder: ShardingBuilder, weight: ShardedValue, indices: ShardedValue, *args: Any, **kwargs: Any
) -> ShardedValue:
    """Shard an embedding, which is local: the result has the rows of the indices."""
    layout = indices.layout.insert(indices.ndim, Layout.replicated(weight.shape).dims[1])
    return builder.call(aten.embedding.default, builder.gather(weight), indices, *args, layout=layout, **kwargs)
