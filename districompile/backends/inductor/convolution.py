# SPDX-License-Identifier: Apache-2.0
"""Compute convolutions as matrix products (im2col) or by a custom kernel, where that is faster.

im2col (Chellapilla et al., 2006) writes each pixel with its neighbours as a row of a matrix, which costs a pass over
memory. At few pixels and many channels it is faster nevertheless: cuDNN's convolutions leave much of a GPU idle, and
cuBLAS, which has more shapes of tiles, does not. The custom kernel reads the neighbours in place, and has tiles that
fill a GPU at 320, 640 and 1280 channels. Each size is timed once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from districompile.backends.inductor.autotune import best_config
from districompile.backends.inductor.cache import remembered
from districompile.backends.inductor.fragment import library_fragment
from districompile.backends.inductor.kernels.hopper import TILED_CONVOLUTION, TILES, unavailable_reason

_GAIN = 0.95  # of cuDNN's time: the time of im2col's pass over memory is an estimate
_MOST = 256 * 2**20  # bytes of the matrix of im2col, at most: memory that a convolution does not need
_CONV = torch.ops.aten.conv2d.default

_LIB = library_fragment()
_LIB.define("product_convolution(Tensor x, Tensor weight, int[] stride, int[] padding) -> Tensor")


def im2col_convolution(x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """Convolve ``x`` (B, C, H, W) with ``weight`` (O, C, h, w), without a bias. :func:`im2col` is its lowering."""
    return torch.nn.functional.conv2d(x, weight, None, stride, padding)


_LIB.impl("product_convolution", im2col_convolution, "CompositeImplicitAutograd")
IM2COL_CONVOLUTION = torch.ops.districompile.product_convolution.default


_LIB.define("kernel_convolution(Tensor x, Tensor weight, int[] stride, int[] padding, int[] tile) -> Tensor")


def kernel_convolution(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], tile: list[int]) -> Tensor:
    """Convolve as :func:`im2col_convolution` does; ``stride`` is 1. :func:`lower_for_inductor` is its lowering."""
    return torch.nn.functional.conv2d(x, weight, None, stride, padding)


_LIB.impl("kernel_convolution", kernel_convolution, "CompositeImplicitAutograd")
KERNEL_CONVOLUTION = torch.ops.districompile.kernel_convolution.default


def lower_for_inductor(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], tile: list[int]) -> Tensor:
    """Lower :func:`kernel_convolution` for Inductor. ``weight`` and the result are channels-last."""
    if x.device.type != "cuda":
        return kernel_convolution(x, weight, stride, padding, tile)
    matrix = weight.permute(0, 2, 3, 1).flatten(1)
    pixels = x.permute(0, 2, 3, 1).contiguous()
    result: Tensor = TILED_CONVOLUTION(pixels, matrix, list(weight.shape[2:]), padding, tile)
    return result.permute(0, 3, 1, 2)


def im2col(x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """Compute :func:`im2col_convolution` as a matrix product. ``weight`` and the result are channels-last."""
    pixels = x.permute(0, 2, 3, 1).contiguous()
    pixels = pixels.as_strided(
        pixels.shape, pixels.stride()
    )  # Inductor writes to memory: each pixel is read once for each neighbour
    pixels = torch.nn.functional.pad(pixels, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    height, width = weight.shape[2:]
    windows = pixels.unfold(1, height, stride[0]).unfold(2, width, stride[1])  # (B, H', W', C, h, w)
    rows = windows.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 2)
    product = torch.mm(rows, weight.permute(0, 2, 3, 1).flatten(1).t())
    return product.reshape(*windows.shape[:3], weight.shape[0]).permute(0, 3, 1, 2)


def autotune_convolutions(graph: fx.Graph, *, im2col: bool, custom_kernels: bool) -> None:
    """Replace each convolution in ``graph`` by im2col or by the custom kernel, where one of them is faster here."""
    for node in list(graph.nodes):
        found = _operands(node) if node.target is _CONV else None
        if found is None:
            continue
        x, weight, bias, stride, padding = found
        images: Any = x.meta["val"].shape, weight.meta["val"].shape
        sizes = (*(tuple(s) for s in images), tuple(stride), tuple(padding), x.meta["val"].dtype)
        config = best_convolution(*sizes, im2col, custom_kernels)
        if config is None:
            continue
        with graph.inserting_before(node):
            last = [] if config == () else [list(config)]
            target = KERNEL_CONVOLUTION if last else IM2COL_CONVOLUTION
            result = graph.call_function(target, (x, weight, stride, padding, *last))
            if bias is not None:
                result.meta = dict(node.meta)
                column = graph.call_function(torch.ops.aten.reshape.default, (bias, [-1, 1, 1]))
                result = graph.call_function(torch.ops.aten.add.Tensor, (result, column))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _operands(node: fx.Node) -> tuple[Any, Any, Any, list[int], list[int]] | None:
    """Return input, weight, bias, stride and padding of a 16-bit convolution without dilation and groups, or None."""
    given: tuple[Any, ...] = node.args
    defaults: tuple[Any, ...] = (None, (1, 1), (0, 0), (1, 1), 1)
    if node.kwargs or len(given) < 2:
        return None
    x, weight, bias, stride, padding, dilation, groups = (*given, *defaults[len(given) - 2 :])
    values: list[Any] = [v.meta.get("val") if isinstance(v, fx.Node) else None for v in (x, weight)]
    if any(not isinstance(v, Tensor) or v.ndim != 4 for v in values):
        return None
    if values[0].dtype not in (torch.float16, torch.bfloat16) or values[0].dtype != values[1].dtype:
        return None
    if groups != 1 or set(dilation) != {1}:
        return None
    return x, weight, bias, _both(stride), _both(padding)


def _both(sizes: Any) -> list[int]:
    return [sizes[0], sizes[-1]]


@remembered
def best_convolution(
    image: tuple[int, ...], weight: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...],
    dtype: torch.dtype, im2col: bool, custom_kernels: bool,
) -> tuple[int, ...] | None:  # fmt: skip
    """Return the fastest computation of a convolution of this size on this GPU.

    A tile is the custom kernel, () is im2col, None is cuDNN. ``im2col`` and ``custom_kernels`` say which take part.
    """
    if not torch.cuda.is_available():
        return None
    baseline, configs = candidates(image, weight, stride, padding, dtype, im2col, custom_kernels)
    if not configs:
        return None
    return best_config("another convolution", baseline, configs, _GAIN, lambda: baseline().permute(0, 2, 3, 1))


def candidates(
    image: tuple[int, ...], weight: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...],
    dtype: torch.dtype, im2col: bool, custom_kernels: bool,
) -> tuple[Callable[[], Tensor], dict[tuple[int, ...], Callable[[], object]]]:  # fmt: skip
    """Return what :func:`best_convolution` compares, on random operands: cuDNN, and the others by its results."""
    custom_kernels = custom_kernels and set(stride) == {1} and unavailable_reason() is None
    options: dict[str, Any] = {"dtype": dtype, "device": "cuda"}
    inner = math.prod(weight[1:])
    sides = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(image[2:], padding, weight[2:], stride, strict=True)]
    rows = image[0] * math.prod(sides)
    x = torch.randn(image, **options).to(memory_format=torch.channels_last)
    filters = torch.randn(weight, **options).to(memory_format=torch.channels_last)
    pixels, columns = x.permute(0, 2, 3, 1), filters.permute(0, 2, 3, 1).flatten(1)
    configs: dict[tuple[int, ...], Callable[[], object]] = {}
    if im2col and rows * inner * dtype.itemsize <= _MOST:
        matrix = torch.randn(rows, inner, **options)

        def matmul() -> None:
            if weight[2:] != (1, 1) or set(stride) != {1} or any(padding):
                matrix.zero_()  # stands for writing the matrix, whose time its size limits
            torch.mm(matrix, columns.t())

        configs[()] = matmul
    if custom_kernels:
        configs |= {
            tile: functools.partial(TILED_CONVOLUTION, pixels, columns, list(weight[2:]), list(padding), list(tile))
            for tile in TILES
            if weight[0] % math.prod(tile) == 0 and weight[1] % 8 == 0
        }
    return functools.partial(torch.nn.functional.conv2d, x, filters, None, stride, padding), configs
