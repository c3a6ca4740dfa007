"""Convolutions as matrix products, where those are faster.

A product reads each pixel with its neighbours as a row (Chellapilla et al., 2006; "im2col"), which costs a pass over
memory. Of few pixels and many channels it is faster nevertheless: cuDNN's convolutions leave much of a GPU idle that
cuBLAS, which has more shapes of tiles to choose from, does not. Both are measured, once for each size.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, fx

import districompile.ir.ops  # noqa: F401  (defines the library that this adds to)
from districompile.backends.timing import milliseconds

_GAIN = 0.92  # of cuDNN's time: what the pass over memory takes is estimated
_MOST = 256 * 2**20  # bytes of rows with neighbours, memory that a convolution does not need
_CONV = torch.ops.aten.conv2d.default

_LIB: Any = torch.library.Library("districompile", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIB.define("product_convolution(Tensor x, Tensor weight, int[] stride, int[] padding) -> Tensor")


def product_convolution(x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """A convolution of ``x`` (B, C, H, W) with ``weight`` (O, C, h, w); without a bias."""
    return torch.nn.functional.conv2d(x, weight, None, stride, padding)


_LIB.impl("product_convolution", product_convolution, "CompositeImplicitAutograd")
PRODUCT_CONVOLUTION = torch.ops.districompile.product_convolution.default


def unfolded(x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """The same as a product. ``weight`` has its channels innermost in memory, and so has the result."""
    pixels = x.permute(0, 2, 3, 1).contiguous()
    pixels = pixels.as_strided(pixels.shape, pixels.stride())  # written to memory: each is read for each neighbour
    pixels = torch.nn.functional.pad(pixels, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    height, width = weight.shape[2:]
    windows = pixels.unfold(1, height, stride[0]).unfold(2, width, stride[1])  # (B, H', W', C, h, w)
    rows = windows.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 2)
    product = torch.mm(rows, weight.permute(0, 2, 3, 1).flatten(1).t())
    return product.reshape(*windows.shape[:3], weight.shape[0]).permute(0, 3, 1, 2)


def use_products(graph: fx.Graph) -> None:
    """Replace convolutions in ``graph`` by products, where those are faster here."""
    for node in list(graph.nodes):
        found = _operands(node) if node.target is _CONV else None
        if found is None:
            continue
        x, weight, bias, stride, padding = found
        images: Any = x.meta["val"].shape, weight.meta["val"].shape
        if not product_pays(*(tuple(s) for s in images), tuple(stride), tuple(padding), x.meta["val"].dtype):
            continue
        with graph.inserting_before(node):
            result = graph.call_function(PRODUCT_CONVOLUTION, (x, weight, stride, padding))
            if bias is not None:
                result.meta = dict(node.meta)
                column = graph.call_function(torch.ops.aten.reshape.default, (bias, [-1, 1, 1]))
                result = graph.call_function(torch.ops.aten.add.Tensor, (result, column))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _operands(node: fx.Node) -> tuple[Any, Any, Any, list[int], list[int]] | None:
    """Input, weight, bias, stride and padding of a convolution of 16 bits that is neither dilated nor in groups."""
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


@functools.cache
def product_pays(
    image: tuple[int, ...], weight: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...],
    dtype: torch.dtype,
) -> bool:  # fmt: skip
    """Whether a product, and writing what it reads, is faster than a convolution, on this GPU."""
    if not torch.cuda.is_available():
        return False
    options: dict[str, Any] = {"dtype": dtype, "device": "cuda"}
    inner = math.prod(weight[1:])
    sides = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(image[2:], padding, weight[2:], stride, strict=True)]
    rows = image[0] * math.prod(sides)
    if rows * inner * dtype.itemsize > _MOST:
        return False
    x = torch.randn(image, **options).to(memory_format=torch.channels_last)
    kernels = torch.randn(weight, **options).to(memory_format=torch.channels_last)
    matrix, columns = torch.randn(rows, inner, **options), kernels.permute(0, 2, 3, 1).flatten(1).t()
    usual = milliseconds(lambda: torch.nn.functional.conv2d(x, kernels, None, stride, padding))
    product = milliseconds(lambda: torch.mm(matrix, columns))
    if weight[2:] != (1, 1) or set(stride) != {1} or any(padding):
        product += milliseconds(matrix.zero_)  # what reads each pixel several times is limited by what it writes
    return product < _GAIN * usual
