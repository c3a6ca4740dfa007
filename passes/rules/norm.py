# SPDX-License-Identifier: Apache-2.0
"""Normalisation: statistics over rows are merged over the ranks; everything else is local."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from districompile.ir.layout import Factor, Layout, Refused, per_rank
from districompile.ir.ops import ops
from districompile.passes.rules.common import accumulation_dtype, cast, keep_sharding
from districompile.passes.rules.reduction import variance_over_rows
from districompile.sharding.builder import ShardedValue, ShardingBuilder
from districompile.sharding.registry import Sample, rule

aten = torch.ops.aten


def _group_norm_samples() -> Iterable[Sample]:
    w, b = torch.randn(6), torch.randn(6)
    yield Sample((torch.randn(2, 6, 9, 4) * 3 + 5, 3, w, b), (2, None, None))
    yield Sample((torch.randn(2, 6, 9), 2, w, b, 1e-6), (2, None, None))
    yield Sample((torch.randn(1, 6, 2, 9, 4), 3), (3,))
    yield Sample((torch.randn(9, 6, 5), 3, w, b), (0, None, None))


@rule(aten.group_norm.default, samples=_group_norm_samples)
def group_norm(
    builder: ShardingBuilder,
    x: ShardedValue,
    groups: int,
    weight: ShardedValue | None = None,
    bias: ShardedValue | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> ShardedValue:
    """Shard a group norm: mean and biased variance by group are merged over the ranks, in float32."""
    axis = x.layout.sharded_axis
    if axis is None or (weight is not None and weight.is_sharded):
        raise Refused("the affine parameters are sharded")
    if axis.dim == 0:
        return keep_sharding(builder, x, aten.group_norm.default, groups, weight, bias, eps, cudnn_enabled)
    if axis.dim == 1:
        raise Refused("the channels are sharded")
    moments = builder.emit(ops.moments.default, x, groups, name=f"{builder.target.name}_moments")  # type: ignore[union-attr]
    stats = merge(builder, x, moments, x.shape[1] // groups)
    node = builder.emit(ops.normalize.default, x, stats, groups, weight, bias, eps, name=builder.target.name)  # type: ignore[union-attr]
    return builder.value(node, x.layout)


def merge(builder: ShardingBuilder, x: ShardedValue, moments: torch.fx.Node, channels: int) -> torch.fx.Node:
    """Merge each rank's ``moments`` (1, 2, B, G) into those of the global tensor (2, B, G).

    The moments are gathered along their first dim, the rank's own first.
    """
    ranks = builder.ranks
    shape = (ranks, *moments.meta["local"][0].shape[1:])
    stats = builder.value(moments, Layout.replicated(shape).with_dim(0, (Factor(ranks, tuple(range(ranks + 1))),)))
    gathered = builder.fetch(stats, [(0, ranks)] * ranks, purpose="norm", any_order=True)
    counts = [float(channels * math.prod(x.layout.local_shape(r)[2:])) for r in range(ranks)]
    mine: Any = per_rank([counts[r:] + counts[:r] for r in range(ranks)])  # the own first, as in the gathered moments
    return builder.emit(ops.merge_moments.default, gathered, mine)


@rule(
    aten.instance_norm.default,
    samples=lambda: [
        Sample(
            (torch.randn(2, 6, 9, 4), torch.randn(6), torch.randn(6), None, None, True, 0.1, 1e-5, False),
            (2, None, None),
        ),
        Sample((torch.randn(2, 6, 9, 4), None, None, None, None, True, 0.1, 1e-5, False), (2,)),
    ],
)
def instance_norm(
    builder: ShardingBuilder,
    x: ShardedValue,
    weight: ShardedValue | None,
    bias: ShardedValue | None,
    mean: ShardedValue | None,
    var: ShardedValue | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn: bool,
) -> ShardedValue:
    """Shard an instance norm as a group norm with one group for each channel."""
    if not use_input_stats:
        raise Refused("instance norm over running statistics")
    return group_norm(builder, x, x.shape[1], weight, bias, eps)  # type: ignore[no-any-return]


@rule(
    aten.batch_norm.default,
    samples=lambda: [
        Sample(
            (torch.randn(2, 6, 9, 4), torch.randn(6), torch.randn(6), torch.randn(6), torch.rand(6) + 0.5, False, 0.1,
             1e-5, False),
            (2, None, None, None, None),
        )
    ],
)  # fmt: skip
def batch_norm(
    builder: ShardingBuilder,
    x: ShardedValue,
    weight: ShardedValue | None,
    bias: ShardedValue | None,
    mean: ShardedValue | None,
    var: ShardedValue | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool,
) -> ShardedValue:
    """Shard batch norm by running statistics, which is local."""
    if training or x.sharded_dim == 1:
        raise Refused("batch norm in training mode, or over sharded channels")
    return keep_sharding(builder, x, aten.batch_norm.default, weight, bias, mean, var, False, momentum, eps, cudnn)


def _layer_norm_samples() -> Iterable[Sample]:
    yield Sample((torch.randn(2, 9, 6), [6]), (1,))
    yield Sample(
        (torch.randn(2, 3, 9, 4) * 3 + 5, [3, 9, 4], torch.randn(3, 9, 4), torch.randn(3, 9, 4)), (2, None, None)
    )
    yield Sample((torch.randn(2, 9, 4), [9, 4], torch.randn(9, 4), None, 1e-3), (1, 0))
    yield Sample((torch.randn(9, 4), [9, 4]), (0,))


@rule(aten.layer_norm.default, partially_replicated=True, samples=_layer_norm_samples)
def layer_norm(
    builder: ShardingBuilder,
    x: ShardedValue,
    shape: Sequence[int],
    weight: ShardedValue | None = None,
    bias: ShardedValue | None = None,
    eps: float = 1e-5,
    *args: Any,
) -> ShardedValue:
    """Shard a layer norm: local where the normalised dims are replicated, else by statistics of all ranks."""
    first = x.ndim - len(shape)
    if x.sharded_dim is None:
        raise Refused("the affine parameters are sharded")
    if x.sharded_dim < first:
        parameters = [None if v is None else builder.gather(v) for v in (weight, bias)]
        return keep_sharding(builder, x, aten.layer_norm.default, list(shape), *parameters, eps, *args)
    x = builder.drop_replicas(x, any_order=True)
    count = math.prod(x.shape[:first])
    merged = x.layout.regrouped((count, 1, math.prod(shape)))
    y = builder.call(aten.reshape.default, x, builder.local_sizes(merged), layout=merged)
    stats = merge(builder, y, builder.emit(ops.moments.default, y, 1), 1)
    node = builder.emit(ops.normalize.default, y, stats, 1, None, None, eps)
    return _scaled(builder, builder.emit(aten.reshape.default, node, builder.local_sizes(x.layout)), x, weight, bias)


def _scaled(
    builder: ShardingBuilder, node: Any, x: ShardedValue, weight: ShardedValue | None, bias: ShardedValue | None
) -> ShardedValue:
    """Multiply ``node``, which has the layout of ``x``, by ``weight`` and add ``bias``; both have its last dims."""
    dim = x.sharded_dim
    assert dim is not None
    for op, v in ((aten.mul.Tensor, weight), (aten.add.Tensor, bias)):
        if v is not None:
            node = builder.emit(op, node, builder.redistribute(v, dim - (x.ndim - v.ndim), x.layout.dims[dim]))
    return builder.value(node, x.layout)


def _rms_samples() -> Iterable[Sample]:
    yield Sample((torch.randn(2, 9, 6), [6]), (1,))
    yield Sample((torch.randn(2, 3, 9, 4), [3, 9, 4], torch.randn(3, 9, 4), 1e-3), (2, None))
    yield Sample((torch.randn(2, 9, 4), [9, 4]), (1,))


@rule(aten.rms_norm.default, partially_replicated=True, samples=_rms_samples)
def rms_norm(
    builder: ShardingBuilder,
    x: ShardedValue,
    shape: Sequence[int],
    weight: ShardedValue | None = None,
    eps: float | None = None,
) -> ShardedValue:
    """Shard an RMS norm as :func:`layer_norm` does a layer norm, without a mean."""
    first = x.ndim - len(shape)
    if x.sharded_dim is None:
        raise Refused("the weight is sharded")
    if x.sharded_dim < first:
        return keep_sharding(
            builder, x, aten.rms_norm.default, list(shape), None if weight is None else builder.gather(weight), eps
        )
    x = builder.drop_replicas(x, any_order=True)
    y = cast(builder, x.node, accumulation_dtype(x.dtype))
    squares = builder.emit(aten.sum.dim_IntList, builder.emit(aten.mul.Tensor, y, y), list(range(first, x.ndim)), True)
    mean = builder.emit(aten.div.Tensor, builder.reduce(squares, "sum"), float(math.prod(shape)))
    small = torch.finfo(x.dtype).eps if eps is None else eps
    scale = builder.emit(aten.rsqrt.default, builder.emit(aten.add.Tensor, mean, small))
    return _scaled(builder, cast(builder, builder.emit(aten.mul.Tensor, y, scale), builder.out.dtype), x, weight, None)


def _batch_statistics_samples() -> Iterable[Sample]:
    w, b = torch.randn(6), torch.randn(6)
    yield Sample((torch.randn(2, 6, 9, 4) + 3, w, b, True, 0.1, 1e-5), (2, None, None))
    yield Sample((torch.randn(9, 6, 4), None, None, True, 0.1, 1e-3), (0,))


@rule(aten._native_batch_norm_legit.no_stats, samples=_batch_statistics_samples)
def batch_statistics(
    builder: ShardingBuilder,
    x: ShardedValue,
    weight: ShardedValue | None,
    bias: ShardedValue | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[ShardedValue, ShardedValue, ShardedValue]:
    """Shard batch norm by the statistics of this batch over all ranks. Return mean and 1 / deviation, too."""
    if x.sharded_dim is None or x.sharded_dim == 1 or not training:
        raise Refused("the channels are sharded")
    dims = [d for d in range(x.ndim) if d != 1]
    variance, centre = variance_over_rows(builder, x, dims, True, 0)
    scale = builder.emit(aten.rsqrt.default, builder.emit(aten.add.Tensor, variance, eps))
    node = builder.emit(
        aten.mul.Tensor,
        builder.emit(aten.sub.Tensor, cast(builder, x.node, accumulation_dtype(x.dtype)), centre),
        scale,
    )
    for op, v in ((aten.mul.Tensor, weight), (aten.add.Tensor, bias)):
        if v is not None:
            sizes = [-1 if d == 1 else 1 for d in range(x.ndim)]
            node = builder.emit(op, node, builder.emit(aten.reshape.default, builder.gather(v), sizes))
    saved = [builder.replicated_value(builder.emit(aten.reshape.default, v, [-1])) for v in (centre, scale)]
    return builder.value(cast(builder, node, x.dtype), x.layout), saved[0], saved[1]
