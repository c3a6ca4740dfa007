# SPDX-License-Identifier: Apache-2.0
"""Products in 8-bit floating point (float8_e4m3fn), as plain functions over aten operators.

Weights have a scale for each output channel. The inputs of a linear and of a 1x1 convolution have a scale for each
token or pixel, from its largest feature. The features of one token are never divided among ranks, so every number of
ranks computes the same scales. The input of a larger convolution has one scale, from a calibration (decision 48).

Products of two 8-bit values are exact in float32, and are summed in float32. A device without 8-bit units therefore
computes the same from the values as float32, but for the order of sums. A float64 module has its scales and sums in
float64, in which these sums are exact.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

F8 = torch.float8_e4m3fn
F8_MAX = 448.0  # the largest finite value
TINY = 1e-12  # of a scale: a token of zeros stays zero


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def to_f8(x: Tensor) -> Tensor:
    """Round ``x`` to the nearest 8-bit value, ties to even. What is larger than 448 becomes 448; NaN stays NaN."""
    return x.clamp(-F8_MAX, F8_MAX).to(F8)


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 8-bit values of a weight (O, ...) and its scales by output channel, (O) in float32."""
    wide = weight.detach().float()
    scale = (wide.abs().flatten(1).amax(1) / F8_MAX).clamp_min(TINY)
    return to_f8(wide / _by_channel(scale, wide.ndim)), scale


def read_quantised(read: Callable[[], Tensor], transposed: bool, scale: bool) -> Tensor:
    """Read a weight, (I, O) if it is ``transposed``, and return its 8-bit values, or its scales."""
    weight = read()
    return quantise_weight(weight.t() if transposed else weight)[int(scale)]


def dequantise_weight(values: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 weight (O, ...) of 8-bit values and scales by output channel.

    :func:`quantise_weight` of the result gives the same values and scales again.
    """
    return values.float() * _by_channel(scale, values.ndim)


def _by_channel(scale: Tensor, ndim: int) -> Tensor:
    return scale.reshape(-1, *[1] * (ndim - 1))


def quantise_features(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return 8-bit values of ``x`` and their scales: one for all features along ``dim``, which is kept as 1.

    The scales are float32, or float64 where ``x`` is.
    """
    wide = _wide(x)
    scale = (wide.abs().amax(dim, keepdim=True) / F8_MAX).clamp_min(TINY)
    return to_f8(wide / scale), scale


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a linear in 8 bits: ``x`` (..., I), ``weight`` (O, I) in 8 bits, ``scale`` (O) -> (..., O) as ``x``."""
    values, own = quantise_features(x, -1)
    if own.dtype == torch.float32 and has_f8_units(x.device) and _fits_units(weight):
        rows = values.reshape(-1, weight.shape[1])
        y = multiply(rows, own.reshape(-1, 1), weight, scale, x.dtype).reshape(*x.shape[:-1], weight.shape[0])
    else:
        y = torch.nn.functional.linear(values.to(own.dtype), weight.to(own.dtype)) * own * scale
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


def fp8_conv(
    x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor | None, bias: Tensor | None, stride: list[int],
    padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """Compute a convolution in 8 bits: ``x`` (N, I, ...), ``weight`` (O, I / groups, ...) in 8 bits, ``scale`` (O).

    ``input_scale`` (1) is that of ``x``. Without it each pixel has its own, which needs a kernel of one pixel.
    """
    ndim = weight.ndim - 2
    if input_scale is None:
        if math.prod(weight.shape[2:]) != 1 or any(padding) or groups != 1:
            raise ValueError("a scale for each pixel needs a kernel of one pixel, without padding or groups")
        taken = x
        for dim, step in enumerate(stride, 2):
            if step > 1:
                taken = torch.ops.aten.slice.Tensor(taken, dim, 0, taken.shape[dim], step)
        if has_f8_units(x.device):  # a matrix product of pixels, which channels-last memory holds as rows
            return fp8_linear(taken.movedim(1, -1), weight.flatten(1), scale, bias).movedim(-1, 1)
        values, own = quantise_features(taken, 1)
        stride = [1] * ndim
    else:
        values, own = to_f8(_wide(x) / input_scale), input_scale.to(_wide(x).dtype)
    convolve = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[ndim]
    operands, factor = _as_floats(values, weight, x)
    y = convolve(*operands, None, stride, padding, dilation, groups).to(own.dtype)
    y = y * (own * factor) * scale.reshape(-1, *[1] * ndim)
    if bias is not None:
        y = y + bias.to(y.dtype).reshape(-1, *[1] * ndim)
    return y.to(x.dtype)


def _as_floats(values: Tensor, weight: Tensor, x: Tensor) -> tuple[tuple[Tensor, Tensor], float]:
    """Return 8-bit operands as floating-point numbers of the same values, and the factor of their product.

    A GPU multiplies 16-bit values with float32 sums, and these hold any 8-bit value. Its result has 16 bits, too, which
    float16 needs a factor for: 1/256 of each operand.
    """
    if x.device.type != "cuda" or x.dtype not in (torch.float16, torch.bfloat16):
        wide = _wide(x).dtype
        return (values.to(wide), weight.to(wide)), 1.0
    return (values.to(x.dtype) / 256, weight.to(x.dtype) / 256), 65536.0


def multiply(rows: Tensor, own: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply ``rows`` (M, I) with scales ``own`` (M, 1) by ``weight`` (O, I) with ``scale`` (O), on a GPU.

    Rows and weight are in 8 bits. The sums are in float32, not in the shorter accumulators of the units
    (``use_fast_accum``). The units multiply by the scales themselves where the result is bfloat16, the one type that
    they do it for.

    The result is bfloat16 for ``dtype`` bfloat16, and otherwise float32.
    """
    if dtype != torch.bfloat16:
        return multiply_unscaled(rows, weight) * own * scale
    rows = _by_rows(rows)
    return torch._scaled_mm(rows, weight.t(), own, scale.reshape(1, -1), out_dtype=dtype, use_fast_accum=False)


def multiply_unscaled(rows: Tensor, weight: Tensor) -> Tensor:
    """Multiply values alone by the 8-bit units of a GPU: ``rows`` (M, I), ``weight`` (O, I) -> (M, O) in float32."""
    one = torch.ones((), dtype=torch.float32, device=rows.device)
    return torch._scaled_mm(_by_rows(rows), weight.t(), one, one, out_dtype=torch.float32, use_fast_accum=False)


def _by_rows(rows: Tensor) -> Tensor:
    """Return the same, row by row in memory. An image that is not channels-last lies by columns, which units refuse."""
    return rows if rows.stride(-1) == 1 else rows.clone(memory_format=torch.contiguous_format)


def has_f8_units(device: torch.device) -> bool:
    """Return whether a device multiplies 8-bit floating-point values (an NVIDIA GPU from sm_89 on)."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return _capability(device.index or 0) >= (8, 9)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _fits_units(weight: Tensor) -> bool:
    """Return whether the units take a weight (O, I): both sizes in multiples of 16."""
    return weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0
