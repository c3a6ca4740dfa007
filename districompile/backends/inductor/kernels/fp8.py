# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel ``products.cu`` for operands in 8 bits (float8_e4m3fn), as operators.

A library multiplies by scales of tokens and channels itself only where the result is bfloat16. Otherwise it writes
float32, and another pass reads that. This kernel multiplies by the scales as it writes 16 bits. It also has
convolutions, which no library of PyTorch has in 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from districompile.backends.inductor.fragment import library_fragment, register_fake
from districompile.backends.inductor.kernels.hopper import Kernel, aligned, launch_tiles, output_shape

TILES = (160, 128, 80)
"""Columns of a tile. A thread holds the sums of one step beside all sums, so that more columns do not fit."""

GATED_TILES = (80, 64)
"""Columns of a tile in each half of a gated linear layer."""

_LIB = library_fragment()
_LIB.define(
    "tiled_fp8_convolution(Tensor x, Tensor weight, Tensor own, Tensor scale, Tensor? bias, int[] kernel,"
    " int[] padding, int columns, bool bfloat16) -> Tensor"
)
_LIB.define(
    "tiled_fp8_gated_product(Tensor x, Tensor weight, Tensor own, Tensor scale, Tensor? bias, int columns,"
    " bool bfloat16) -> Tensor"
)


def fp8_kernel(columns: int, gated: bool, bias: bool, dtype: torch.dtype) -> Kernel:
    """Return the variant that :func:`tiled_convolution`, or :func:`tiled_gated_linear` if ``gated``, calls."""
    return Kernel(columns, 2 if gated else 1, gated, bias, dtype, 8)


def tiled_convolution(
    x: Tensor, weight: Tensor, own: Tensor, scale: Tensor, bias: Tensor | None, kernel: Sequence[int],
    padding: Sequence[int], columns: int, bfloat16: bool,
) -> Tensor:  # fmt: skip
    """Convolve ``x`` (batch, height, width, channels) with a matrix (columns, pixels of the kernel x channels), both in
    8 bits. The stride is 1.

    The sums are multiplied by ``scale`` (columns) and by ``own``, which has one element, or one for each pixel of the
    result; both are float32. Returns (batch, height, width, columns) in bfloat16 or float16, the type of ``bias``.
    """
    dtype = _result(bfloat16)
    out = x.new_empty(output_shape(x.shape, weight.shape[0], kernel, padding), dtype=dtype)
    _launch(fp8_kernel(columns, False, bias is not None, dtype), x, weight, own, scale, bias, out, kernel, padding)
    return out


def tiled_gated_linear(
    x: Tensor, weight: Tensor, own: Tensor, scale: Tensor, bias: Tensor | None, columns: int, bfloat16: bool
) -> Tensor:
    """Compute the first half of a linear layer in 8 bits times the GELU of the second, for matrices.

    The operands are those of :func:`tiled_convolution`. ``columns`` is the width of a tile in each half.
    """
    dtype = _result(bfloat16)
    out = x.new_empty(x.shape[0], weight.shape[0] // 2, dtype=dtype)
    kernel = fp8_kernel(columns, True, bias is not None, dtype)
    _launch(kernel, x[None, None], weight, own, scale, bias, out, (1, 1), (0, 0))
    return out


def _launch(
    kernel: Kernel, x: Tensor, weight: Tensor, own: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor,
    taps: Sequence[int], padding: Sequence[int],
) -> None:  # fmt: skip
    pixels = out.numel() // out.shape[-1]
    if own.numel() not in (1, pixels):
        raise ValueError(f"{own.numel()} scales for {pixels} pixels: give one, or one for each")
    bias = None if bias is None else aligned(bias)
    launch_tiles(
        kernel, aligned(x), aligned(weight), bias, out, taps, padding, aligned(own.reshape(-1)), aligned(scale)
    )


def _result(bfloat16: bool) -> torch.dtype:
    return torch.bfloat16 if bfloat16 else torch.float16


_LIB.impl("tiled_fp8_convolution", tiled_convolution, "CUDA")
_LIB.impl("tiled_fp8_gated_product", tiled_gated_linear, "CUDA")
register_fake(
    "tiled_fp8_convolution",
    lambda x, w, own, scale, bias, kernel, padding, columns, bfloat16: x.new_empty(
        output_shape(x.shape, w.shape[0], kernel, padding), dtype=_result(bfloat16)
    ),
    _LIB,
)
register_fake(
    "tiled_fp8_gated_product",
    lambda x, w, own, scale, bias, columns, bfloat16: x.new_empty(x.shape[0], w.shape[0] // 2, dtype=_result(bfloat16)),
    _LIB,
)
TILED_CONVOLUTION = torch.ops.districompile.tiled_fp8_convolution.default
TILED_GATED_LINEAR = torch.ops.districompile.tiled_fp8_gated_product.default
