# SPDX-License-Identifier: Apache-2.0
"""Attention: queries stay sharded, keys and values are gathered."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from districompile.ir.layout import Factor, Layout, Refused
from districompile.sharding.builder import ShardedValue, ShardingBuilder
from districompile.sharding.registry import Sample, rule

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default


def _samples() -> Iterable[Sample]:
    q, k, v = (torch.randn(2, 2, 9, 4) for _ in range(3))
    yield Sample((q, k, v), (2, 2, 2))
    yield Sample((q, torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)), (2, None, None))
    yield Sample((q, k, v, torch.randn(9, 9)), (2, 2, 2, None))
    yield Sample((q, k, v, torch.randn(2, 1, 9, 9)), (2, 2, 2, 2))
    yield Sample((q, k, v, torch.randn(1, 9)), (2, 2, 2, None))
    yield Sample((torch.randn(2, 2, 5, 4), k, v), (None, 2, 2))
    yield Sample(tuple(torch.randn(9, 2, 5, 4) for _ in range(3)), (0, 0, 0))
    yield Sample((q, k, v), (2, 2, 2), {"scale": 0.7})
    across = [torch.randn(2, 2, n, 9) for n in (4, 5, 5)]
    yield Sample(tuple(across), (3, 3, 3))
    yield Sample((*across, torch.randn(4, 5)), (3, 3, None, None), {"scale": 0.7})
    yield Sample((*across, torch.rand(4, 5) > 0.2), (3, 3, 3, 0))
    batch = [torch.randn(n, 2, 5, 4) for n in (9, 1, 1)]
    yield Sample(tuple(batch), (0, None, None))
    yield Sample((batch[0], batch[0], batch[0], torch.randn(9, 1, 5, 5)), (0, 0, 0, None))
    yield Sample((q, k, v, None, 0.0, True), (2, 2, 2))
    yield Sample((q, k[:, :, :7], v[:, :, :7], None, 0.0, True), (2, None, None))
    yield Sample((q, k, v, None, 0.0, True), (None, 2, 2))
    yield Sample((*(torch.randn(9, 2, 5, 4) for _ in range(3)), None, 0.0, True), (0, 0, 0))


@rule(_SDPA, samples=_samples, partially_replicated=True)
def attention(
    builder: ShardingBuilder,
    q: ShardedValue,
    k: ShardedValue,
    v: ShardedValue,
    mask: ShardedValue | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> ShardedValue:
    """Shard attention. Without a mask, keys may have any order: own keys come first, and ranks share one graph."""
    nd = q.ndim
    if is_causal and q.sharded_dim == nd - 2:
        q = builder.drop_replicas(q)
        mask, is_causal = _causal(builder, q, k.shape[-2]), False
    dim = q.sharded_dim
    if dim == nd - 1:
        return _over_rows(builder, q, k, v, mask, is_causal, **kwargs)
    if dim is None or dim == nd - 2:
        free = mask is None and dim is not None and _same_rows(k, v)
        held = None if is_causal or free else _segments(k, v)
        k, v = (builder.gather(t, purpose="attention", any_order=free, held=held is not None) for t in (k, v))
        if mask is not None:
            mask = builder.gather(mask) if dim is None else _mask(builder, q, mask)
            if held is not None and mask.shape[-1] != 1:
                mask = builder.held_order(mask, mask.ndim - 1, held)
        return builder.call(_SDPA, q, k, v, mask, 0.0, is_causal, layout=_layout(builder, q), **kwargs)
    factors = q.layout.dims[dim]
    if mask is not None:
        at = mask.ndim - (nd - dim)
        mask = builder.gather(mask) if at < 0 or mask.shape[at] == 1 else builder.redistribute(mask, at, factors)
    k, v = (builder.gather(t) if t.shape[dim] == 1 else builder.redistribute(t, dim, factors) for t in (k, v))
    return builder.call(_SDPA, q, k, v, mask, 0.0, is_causal, layout=_layout(builder, q), **kwargs)


def _over_rows(
    builder: ShardingBuilder,
    q: ShardedValue,
    k: ShardedValue,
    v: ShardedValue,
    mask: ShardedValue | None,
    is_causal: bool,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> ShardedValue:
    """Shard attention of channels: the rows are contracted in the scores, and stay sharded in the values."""
    if is_causal or enable_gqa or q.shape[-1] != v.shape[-1]:
        raise Refused("the channels of the queries are sharded")
    q = builder.drop_replicas(q)
    factors = q.layout.dims[q.ndim - 1]
    k, v = builder.redistribute(k, k.ndim - 1, factors), builder.redistribute(v, v.ndim - 1, factors)
    part = builder.emit(aten.matmul.default, q, builder.emit(aten.transpose.int, k, -2, -1))
    scores = builder.emit(aten.mul.Tensor, builder.reduce(part, "sum"), q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        mask = builder.gather(mask)
        if mask.dtype == torch.bool:
            scores = builder.emit(
                aten.masked_fill.Scalar, scores, builder.emit(aten.logical_not.default, mask), -math.inf
            )
        else:
            scores = builder.emit(aten.add.Tensor, scores, mask)
    weights = builder.emit(aten.softmax.int, scores, -1)
    return builder.call(
        aten.matmul.default, weights, v, layout=Layout.replicated(builder.out_shape).with_dim(q.ndim - 1, factors)
    )


def _same_rows(k: ShardedValue, v: ShardedValue) -> bool:
    """Return whether keys and values that are fetched own rows first come in the same order."""
    a, b = k.layout.sharded_axis, v.layout.sharded_axis
    return a is not None and a == b and a.index == 0 and k.replicated is None and v.replicated is None


def _segments(k: ShardedValue, v: ShardedValue) -> Factor | None:
    """Return how keys and values alike are segmented, or None. A mask's columns are then reordered instead of them."""
    a, b = k.layout.sharded_axis, v.layout.sharded_axis
    if a is None or b is None or not a.segments or a.dim != k.ndim - 2 or len(k.layout.dims[a.dim]) != 1:
        return None
    return a.factor if (a, len(k.layout.dims[a.dim])) == (b, len(v.layout.dims[b.dim])) else None


def _causal(builder: ShardingBuilder, q: ShardedValue, keys: int) -> ShardedValue:
    """Build the causal mask of each rank's queries: query i attends to the keys up to i."""
    dim, factor = q.ndim - 2, q.layout.merged_dim(q.ndim - 2)
    assert factor.bounds is not None
    device = q.node.meta["local"][0].device
    start, stop = builder.own(factor.bounds)
    rows = builder.emit(aten.arange.start, start, stop, device=device, pin_memory=False)
    seen = builder.emit(aten.arange.default, keys, device=device, pin_memory=False)
    node = builder.emit(aten.ge.Tensor, builder.emit(aten.unsqueeze.default, rows, 1), seen)
    return builder.value(node, Layout.replicated((q.shape[dim], keys)).with_dim(0, q.layout.dims[dim]))


def _mask(builder: ShardingBuilder, q: ShardedValue, mask: ShardedValue) -> ShardedValue:
    if mask.ndim < 2 or mask.shape[-2] == 1:
        return builder.gather(mask)
    if mask.is_sharded and mask.sharded_dim != mask.ndim - 2:
        mask = builder.gather(mask)
    return builder.redistribute(mask, mask.ndim - 2, q.layout.dims[q.ndim - 2])


def _layout(builder: ShardingBuilder, q: ShardedValue) -> Layout:
    shape = builder.out_shape
    layout = Layout.replicated(shape)
    return layout if q.sharded_dim is None else layout.with_dim(q.sharded_dim, q.layout.dims[q.sharded_dim])
