# SPDX-License-Identifier: Apache-2.0
"""Tell whether 8 bits make a layer faster on this GPU: the fastest of each in turns, with the rounding of its input."""

from __future__ import annotations

from collections.abc import Callable

import torch

from districompile.backends.inductor import convolution, fp8
from districompile.backends.inductor.autotune import best_config
from districompile.backends.inductor.cache import remembered
from districompile.backends.inductor.kernels.hopper import unavailable_reason
from districompile.ir.layer_size import LayerSize


def faster_in_8_bits(size: LayerSize) -> bool | None:
    """Return whether a layer is faster in 8 bits here. None: it is not a 16-bit one, or the kernels do not run here."""
    if size.dtype not in (torch.float16, torch.bfloat16) or unavailable_reason() is not None:
        return None
    if size.image is None or _is_linear(size):
        rows, bias = size.rows, size.bias
        return bool(_faster_linear(rows, size.inner, size.columns, bias, size.apart, size.dtype))
    if len(size.image) != 4 or size.groups != 1 or {*size.stride, *size.dilation} != {1}:
        return False  # no kernel convolves these in 8 bits: they are computed in 16, of weights widened in each call
    return bool(_faster_convolution(size.image, size.kernel, size.padding, size.bias, size.dtype))


def _is_linear(size: LayerSize) -> bool:
    """Return whether a convolution is a linear layer of its pixels."""
    return {*size.kernel[2:], *size.stride} <= {1} and not any(size.padding) and size.groups == 1


def quantise_rows(x: torch.Tensor) -> None:
    """Round rows by the kernel, which needs Triton."""
    from districompile.backends.inductor.kernels import operators

    operators.quantise_rows(x)


@remembered
def _faster_linear(rows: int, inner: int, columns: int, bias: bool, apart: bool, dtype: torch.dtype) -> int:
    """Compare a linear layer. ``apart``: a kernel of its own rounds the input; otherwise what computes it does so."""
    if not rows or not fp8.tiles_of(inner, columns, False, dtype):
        return 0
    tile = fp8.best_linear(rows, inner, columns, bias, False, dtype)
    separate, calls, _ = fp8.linear_calls(rows, inner, columns, bias, False, dtype)
    product = separate if tile is None else calls[tile]
    x, weight = (torch.randn(n, inner, dtype=dtype, device="cuda") for n in (rows, columns))
    added = torch.randn(columns, dtype=dtype, device="cuda") if bias else None

    def eight() -> None:
        if apart:
            quantise_rows(x)
        product()

    return _compare(lambda: torch.nn.functional.linear(x, weight, added), eight)


@remembered
def _faster_convolution(
    image: tuple[int, ...], weight: tuple[int, ...], padding: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> int:
    """Compare a convolution of stride 1. What computes its input rounds it, too."""
    tile = fp8.best_convolution(image, weight, padding, bias, dtype)
    if tile is None:
        return 0
    stride = (1,) * len(padding)
    chosen = convolution.best_convolution(image, weight, stride, padding, dtype, True, True)
    cudnn, others = convolution.candidates(image, weight, stride, padding, dtype, True, True)
    _, calls, _ = fp8.convolution_calls(image, weight, padding, bias, dtype)
    return _compare(cudnn if chosen is None else others[chosen], calls[tile])


def _compare(sixteen: Callable[[], object], eight: Callable[[], object]) -> int:
    """Return 1 if ``eight`` takes less time, else 0. Their operands differ, so that their results are not compared."""

    def silent(call: Callable[[], object]) -> Callable[[], None]:
        def timed() -> None:
            call()

        return timed

    return best_config("8 bits for a layer", silent(sixteen), {1: silent(eight)}) or 0
