# SPDX-License-Identifier: Apache-2.0
"""Products in 8 bits: the rules of the linear and the convolution that they replace.

A scale of a token comes from all of its features, so these are never sharded here. The scale of a convolution's input
is a constant. Each rank therefore quantises its rows, and the rows that it fetches, as one device does.

The other rules are of products in modules that come in 8 bits. Their scales are values of the graph like any other: the
largest value of a whole tensor is reduced over the ranks by the rule of ``amax``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from districompile.ir.layout import Factor, Layout, Refused
from districompile.ir.ops import ops
from districompile.ir.quantised import F8, quantise_weight
from districompile.passes.rules.linear import matmul
from districompile.passes.rules.window import window
from districompile.sharding.builder import ShardedValue, ShardingBuilder
from districompile.sharding.registry import Sample, rule

aten = torch.ops.aten


def _linear_samples() -> Iterable[Sample]:
    yield Sample((torch.randn(2, 9, 6), *quantise_weight(torch.randn(5, 6)), torch.randn(5)), (1, None, None, None))
    yield Sample((torch.randn(2, 9, 4, 6), *quantise_weight(torch.randn(5, 6)), None), (1, None, None))
    yield Sample((torch.randn(2, 3, 9), *quantise_weight(torch.randn(7, 9)), torch.randn(7)), (2, None, None, None))
    yield Sample((torch.randn(2, 3, 9), *quantise_weight(torch.randn(1, 9)), None), (2, None, None))


@rule(ops.fp8_linear.default, partially_replicated=True, samples=_linear_samples)
def fp8_linear(
    builder: ShardingBuilder, x: ShardedValue, weight: ShardedValue, scale: ShardedValue, bias: ShardedValue | None
) -> ShardedValue:
    """Shard a linear in 8 bits: local, unless the rows are the features.

    These are then gathered, and each rank computes some features of the result.
    """
    if any(v is not None and v.is_sharded for v in (weight, scale, bias)):
        raise Refused("the weight is sharded")
    op = ops.fp8_linear.default
    if x.sharded_dim != x.ndim - 1:
        layout = x.layout.with_dim(x.ndim - 1, Layout.replicated(weight.shape).dims[0])
        return builder.call(op, x, weight, scale, bias, layout=layout)
    x = builder.gather(x, purpose="attention")
    layout = Layout.replicated(builder.out_shape)
    try:
        bounds = builder.bounds(weight.shape[0])
    except Refused:
        return builder.call(op, x, weight, scale, bias, layout=layout)
    factor = (Factor(weight.shape[0], bounds),)
    weight = builder.slice_local(weight, Layout.replicated(weight.shape).with_dim(0, factor))
    scale, bias = (None if v is None else builder.slice_local(v, Layout((factor,))) for v in (scale, bias))  # type: ignore[assignment]
    return builder.call(op, x, weight, scale, bias, layout=layout.with_dim(x.ndim - 1, factor))


def _conv_samples() -> Iterable[Sample]:
    x, one = torch.randn(2, 4, 13, 6), torch.tensor([0.01])

    def w(o: int, i: int, *k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return quantise_weight(torch.randn(o, i, *k))

    bias = torch.randn(3)
    yield Sample((x, *w(3, 4, 3, 3), one, bias, [1, 1], [1, 1], [1, 1], 1), (2, None, None, None, None))
    yield Sample((x, *w(3, 4, 3, 3), one, None, [2, 2], [1, 1], [1, 1], 1), (2, None, None, None))
    yield Sample((x, *w(3, 4, 3, 3), one, None, [1, 1], [2, 2], [2, 2], 1), (2, None, None, None))
    yield Sample((x, *w(4, 1, 3, 3), one, None, [1, 1], [1, 1], [1, 1], 4), (3, None, None, None))
    yield Sample((x, *w(3, 4, 1, 1), None, bias, [1, 1], [0, 0], [1, 1], 1), (2, None, None, None))
    yield Sample((x, *w(3, 4, 1, 1), None, None, [2, 2], [0, 0], [1, 1], 1), (2, None, None))
    yield Sample((torch.randn(9, 4, 5, 5), *w(3, 4, 3, 3), one, None, [1, 1], [1, 1], [1, 1], 1), (0, None, None, None))
    yield Sample((torch.randn(2, 4, 13), *w(3, 4, 3), one, None, [1], [1], [1], 1), (2, None, None, None))


@rule(ops.fp8_conv.default, samples=_conv_samples)
def fp8_conv(
    builder: ShardingBuilder, x: ShardedValue, weight: ShardedValue, scale: ShardedValue,
    input_scale: ShardedValue | None, bias: ShardedValue | None, stride: Any, padding: Any, dilation: Any, groups: int,
) -> ShardedValue:  # fmt: skip
    """Shard a convolution in 8 bits as any other: ranks fetch a halo, and quantise it themselves."""
    if not x.is_sharded or any(v is not None and v.is_sharded for v in (weight, scale, input_scale, bias)):
        raise Refused("the weight is sharded")
    n = weight.ndim - 2
    if x.sharded_dim == x.ndim - n - 1:
        raise Refused("the channels are sharded")
    op = ops.fp8_conv.default

    def local(v: Any, q: list[int]) -> Any:
        return builder.emit(op, v, weight, scale, input_scale, bias, stride, q, dilation, groups)

    return window(builder, x, n, weight.shape[2:], stride, padding, dilation, local)


def _int8(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@rule(
    aten._int_mm.default, partially_replicated=True,
    samples=lambda: [
        Sample((_int8(9, 6), _int8(6, 4)), (0, None)), Sample((_int8(6, 9), _int8(9, 8)), (1, 0)),
        Sample((_int8(3, 6), _int8(6, 9)), (None, 1)),
    ],
)  # fmt: skip
def int_mm(builder: ShardingBuilder, a: ShardedValue, b: ShardedValue) -> ShardedValue:
    """Shard a product of int8 matrices as any other. Partial sums are int32, and exact."""
    product: ShardedValue = matmul(builder, a, b)
    return product


def _scaled_samples() -> Iterable[Sample]:
    a, b = torch.randn(9, 16).to(F8), torch.randn(32, 16).to(F8).t()
    one, by_row, by_column = torch.tensor(0.5), torch.rand(9, 1) + 0.5, torch.rand(1, 32) + 0.5
    yield Sample((a, b, one, one), (0, None, None, None), {"out_dtype": torch.float32})
    yield Sample((a, b, one, one, torch.randn(32)), (0, None, None, None, None), {"out_dtype": torch.float32})
    yield Sample((a, b, by_row, by_column), (0, None, 0, None), {"out_dtype": torch.bfloat16})


@rule(aten._scaled_mm.default, samples=_scaled_samples)
def scaled_mm(
    builder: ShardingBuilder, a: ShardedValue, b: ShardedValue, scale_a: ShardedValue, scale_b: ShardedValue,
    bias: ShardedValue | None = None, scale_result: ShardedValue | None = None, out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> ShardedValue:  # fmt: skip
    """Shard a product of 8-bit matrices: local where the rows of ``a`` are sharded.

    ``scale_a`` is one number, which is the same on all ranks, or has one for each row. All ranks are refused a sum of
    products that have different scales.
    """
    if a.sharded_dim != 0 or any(v is not None and v.is_sharded for v in (b, scale_b, bias)):
        raise Refused("the features of an 8-bit product are sharded, and its scales hold for all of them")
    if scale_result is not None:
        raise Refused("it scales its result")
    rows = a.layout.dims[0]
    if math.prod(scale_a.shape) == a.shape[0] > 1:
        scale_a = builder.redistribute(scale_a, 0, rows)
    elif math.prod(scale_a.shape) != 1 or scale_a.is_sharded:
        raise Refused("its scales are of blocks")
    layout = Layout.replicated(builder.out_shape).with_dim(0, rows)
    return builder.call(
        aten._scaled_mm.default, a, b, scale_a, scale_b, bias, None, out_dtype, use_fast_accum, layout=layout
    )
