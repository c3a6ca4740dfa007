# SPDX-License-Identifier: Apache-2.0
"""Lower operators to the form for which Inductor generates the fewest kernels and passes over memory.

The statistics of a group norm are pairs (mean, variance). Plans hold them stacked in one tensor. Inductor would write
and read the stacked tensor at each step of merging and correction. Two tables therefore map a stacked tensor to the
pairs it was made of, while one graph is traced; the tables hold no reference to the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from districompile.backends.inductor import attention, fp8, gated
from districompile.backends.inductor.convolution import (
    IM2COL_CONVOLUTION,
    KERNEL_CONVOLUTION,
    im2col,
    lower_for_inductor,
)
from districompile.backends.inductor.padding import PADDINGS
from districompile.ir import ops as plain
from districompile.ir.ops import ops

_ROWS = 64  # of one partial sum: the partial sums are then a few per cent of the memory read
_FEW = 32  # rows, up to which loading the weights takes most of the time of a linear layer
_UNROLLED = 16  # ranks, up to which merging is unrolled

Pair = tuple[Tensor, Tensor]
_PAIRS: MutableMapping[Tensor, list[Pair]] = WeakIdKeyDictionary()  # the pairs in a stacked tensor
_PLACED: MutableMapping[Tensor, tuple[Tensor, Tensor, int, int]] = (
    WeakIdKeyDictionary()
)  # an own row between received rows


def _stacked(mean: Tensor, var: Tensor, *, rows: bool = False) -> Tensor:
    """Stack a pair into (2, B, G), or into (1, 2, B, G) with ``rows``, and remember it."""
    both = torch.stack([mean, var])
    both = both.unsqueeze(0) if rows else both
    _PAIRS[both] = [(mean, var)]
    return both


def _pairs(stats: Tensor) -> list[Pair]:
    """Return mean and variance, each (B, G), of every row of (R, 2, B, G), or of (2, B, G)."""
    if stats in _PAIRS:
        return _PAIRS[stats]
    if stats in _PLACED:
        received, own, before, after = _PLACED[stats]
        others = [(row[0], row[1]) for row in received[: before + after]]
        return [*others[:before], *_pairs(own), *others[before:]]
    return [(row[0], row[1]) for row in (stats if stats.ndim == 4 else stats.unsqueeze(0))]


def moments(x: Tensor, groups: int) -> Tensor:
    """Compute :func:`districompile.ir.ops.moments` in one pass over memory.

    Blocks of rows are reduced channel by channel, which reads channels-last memory in order. The few partial
    (mean, variance) pairs are then merged (Chan, Golub and LeVeque), which avoids cancellation.
    """
    batch, channels = x.shape[:2]
    rows = x.to(_wide(x)).flatten(2).transpose(1, 2)
    count = rows.shape[1]
    block = max((d for d in range(1, min(count, _ROWS) + 1) if count % d == 0), default=1)
    if block < 8:
        block = count
    blocks = rows.reshape(batch, count // block, block, channels)
    var, mean = torch.var_mean(blocks, dim=2, correction=0)
    shape = (batch, count // block, groups, channels // groups)
    var, mean = var.reshape(shape), mean.reshape(shape)
    average = mean.mean((1, 3), keepdim=True)
    spread = (var + (mean - average).square()).mean((1, 3))
    return _stacked(average.reshape(batch, groups), spread, rows=True)


def assemble(received: Tensor, x: Tensor, dim: int, before: int, after: int, start: int, stop: int) -> Tensor:
    """Compute :func:`districompile.ir.ops.assemble`, and remember the pairs of statistics of several ranks.

    Read from one tensor of all ranks, each pair would be a selection between two places in memory. Triton 3.6 does not
    compile a kernel with the reduction and that many selections ("operand does not dominate this use").
    """
    whole = plain.assemble(received, x, dim, before, after, start, stop)
    if dim == 0 and x.ndim == 4 and (start, stop) == (0, 1) and x.shape[0] == 1 and before + after < _UNROLLED:
        _PLACED[whole] = received, x, before, after
    return whole


def assemble_into_input(received: Tensor, x: Tensor, dim: int, before: int, start: int, stop: int) -> Tensor:
    """Compute :func:`districompile.ir.ops.assemble_in_place` into an input that nothing else reads.

    ``received`` holds the rows of other ranks, and unused memory for the own rows.
    """
    received.narrow(0, before, stop - start).copy_(x.narrow(dim, start, stop - start).movedim(dim, 0))
    return received.movedim(0, dim)


def merge_moments(parts: Tensor, counts: list[float]) -> Tensor:
    """Compute :func:`districompile.ir.ops.merge_moments` rank by rank."""
    if len(counts) > _UNROLLED:
        return plain.merge_moments(parts, counts)
    return _merged(_pairs(parts), counts)


def _merged(pairs: list[Pair], counts: list[float]) -> Tensor:
    shares = [c / sum(counts) for c in counts]
    whole = _weighted([mean for mean, _ in pairs], shares)
    return _stacked(whole, _weighted([var + (mean - whole).square() for mean, var in pairs], shares))


def _weighted(terms: list[Tensor], shares: list[float]) -> Tensor:
    first, *rest = (term * share for term, share in zip(terms, shares, strict=True))
    for term in rest:
        first = first + term
    return first


def correct_moments(merged: Tensor, stale: Tensor, fresh: Tensor) -> Tensor:
    """Compute :func:`districompile.ir.ops.correct_moments` on pairs."""
    [(mean, var)], [(old_mean, old_var)], [(new_mean, new_var)] = _pairs(merged), _pairs(stale), _pairs(fresh)
    return _stacked(*plain.corrected(mean, var, old_mean, old_var, new_mean, new_var))


def announce(moments: Tensor) -> Tensor:
    """Compute :func:`districompile.ir.ops.announce` on pairs."""
    [(mean, var)] = _pairs(moments)
    return _announced((mean, var), (mean, var))


def forecast_moments(moments: Tensor, previous: Tensor) -> Tensor:
    """Compute :func:`districompile.ir.ops.forecast_moments` on pairs."""
    [(mean, var)] = _pairs(moments)
    return _announced(plain.forecast(mean, var, previous[0, 2], previous[0, 3]), (mean, var))


def _announced(forecast: Pair, fresh: Pair) -> Tensor:
    whole = torch.stack([*forecast, *fresh]).unsqueeze(0)
    _PAIRS[whole] = [forecast]
    return whole


def merge_forecasts(parts: Tensor, fresh: Tensor, counts: list[float]) -> Tensor:
    """Compute :func:`districompile.ir.ops.merge_forecasts` rank by rank."""
    if len(counts) > _UNROLLED:
        return plain.merge_forecasts(parts, fresh, counts)
    own, *others = _pairs(parts)
    [(mean, var)] = _pairs(fresh)
    shift, growth = plain.missed(*own, mean, var)
    return _merged([(mean, var), *((m + shift, v * growth) for m, v in others)], counts)


def normalize(x: Tensor, stats: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Compute :func:`districompile.ir.ops.normalize` as one pointwise expression in the shape and format of ``x``.

    The shift and the scale of each channel are computed first, into one table. Inductor then inlines the expression, as
    it has few operands, into each of its readers: the rows to send, and the padded input of the convolution. This
    avoids a pass over memory.
    """
    [(mean, var)] = _pairs(stats)
    channels, shape = x.shape[1], (-1, x.shape[1], *[1] * (x.ndim - 2))

    def by_channel(t: Tensor) -> Tensor:
        return t.unsqueeze(-1).expand(-1, -1, channels // groups).reshape(-1, channels)

    scale = by_channel(torch.rsqrt(var + eps))
    if weight is not None:
        scale = scale * weight.to(scale.dtype)
    rows = [by_channel(mean), scale, *([] if bias is None else [bias.to(scale.dtype).expand_as(scale)])]
    table = torch.stack(rows)
    table = table.as_strided(table.shape, table.stride())  # Inductor writes to memory what is read with strides
    y = (x.to(stats.dtype) - table[0].reshape(shape)) * table[1].reshape(shape)
    if bias is not None:
        y = y + table[2].reshape(shape)
    return y.to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``aten.linear`` as a matrix product and an addition, which Inductor may fuse into pointwise readers.

    cuBLAS has a separate kernel for a product with a bias: float16 (512, 5120) by (5120, 1280) takes 19.1 us on an
    H100, and 13.9 us without a bias. PyTorch adds the bias inside the product in half precision, to save a rounding.
    The fused addition is in float32 and rounds once, so that there are as many roundings as before if anything else is
    added. Layers of few rows, such as the time embedding, are unchanged.
    """
    rows = x.numel() // max(1, x.shape[-1])
    if bias is None or rows < _FEW or x.dtype not in (torch.float16, torch.bfloat16):
        return torch.nn.functional.linear(x, weight, bias)
    product = torch.mm(x.reshape(-1, x.shape[-1]), weight.t()) + bias
    return product.reshape(*x.shape[:-1], weight.shape[0])


def _wide(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.float64 else torch.float32


LOWERINGS: dict[Any, Callable[..., Any]] = {
    ops.moments.default: moments, ops.assemble.default: assemble, ops.merge_moments.default: merge_moments,
    ops.correct_moments.default: correct_moments, ops.announce.default: announce,
    ops.forecast_moments.default: forecast_moments, ops.merge_forecasts.default: merge_forecasts,
    ops.normalize.default: normalize,
    torch.ops.aten.linear.default: linear, IM2COL_CONVOLUTION: im2col, KERNEL_CONVOLUTION: lower_for_inductor,
    gated.GATED_LINEAR: gated.lower_for_inductor, attention.KERNEL_ATTENTION: attention.lower_for_inductor,
    attention.PROJECTED_ATTENTION: attention.lower_projected_for_inductor, fp8.KERNEL_LINEAR: fp8.lower_linear,
    fp8.KERNEL_GATED_LINEAR: fp8.lower_gated_linear, fp8.KERNEL_CONV: fp8.lower_conv, **PADDINGS,
}  # fmt: skip
