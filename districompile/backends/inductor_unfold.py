"""Convolutions as matrix products, or by a kernel of our own, where those are faster.

A product reads each pixel with its neighbours as a row (Chellapilla et al., 2006; "im2col"), which costs a pass over
memory. Of few pixels and many channels it is faster nevertheless: cuDNN's convolutions leave much of a GPU idle that
cuBLAS, which has more shapes of tiles to choose from, does not. Our kernel reads the neighbours where they are, and has
tiles that fill a GPU at 320, 640 and 1280 channels. All are measured, once for each size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

import districompile.ir.ops  # noqa: F401  (defines the library that this adds to)
from districompile.backends.gpu.hopper import TILED_CONVOLUTION, TILES, unusable
from districompile.backends.timing import fastest

_GAIN = 0.95  # of cuDNN's time: what a product's pass over memory takes is estimated
_MOST = 256 * 2**20  # bytes of rows with neighbours, memory that a convolution does not need
_CONV = torch.ops.aten.conv2d.default

_LIB: Any = torch.library.Library("districompile", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIB.define("product_convolution(Tensor x, Tensor weight, int[] stride, int[] padding) -> Tensor")


def product_convolution(x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """A convolution of ``x`` (B, C, H, W) with ``weight`` (O, C, h, w); without a bias."""
    return torch.nn.functional.conv2d(x, weight, None, stride, padding)


_LIB.impl("product_convolution", product_convolution, "CompositeImplicitAutograd")
PRODUCT_CONVOLUTION = torch.ops.districompile.product_convolution.default


_LIB.define("kernel_convolution(Tensor x, Tensor weight, int[] stride, int[] padding, int[] tile) -> Tensor")


def kernel_convolution(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], tile: list[int]) -> Tensor:
    """The same by our own kernel; ``stride`` is 1."""
    return torch.nn.functional.conv2d(x, weight, None, stride, padding)


_LIB.impl("kernel_convolution", kernel_convolution, "CompositeImplicitAutograd")
KERNEL_CONVOLUTION = torch.ops.districompile.kernel_convolution.default


def traced(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], tile: list[int]) -> Tensor:
    """The same as the compiler for GPUs takes it. ``weight`` has its channels innermost in memory, and so has the
    result."""
    if x.device.type != "cuda":
        return kernel_convolution(x, weight, stride, padding, tile)
    matrix = weight.permute(0, 2, 3, 1).flatten(1)
    pixels = x.permute(0, 2, 3, 1).contiguous()
    result: Tensor = TILED_CONVOLUTION(pixels, matrix, list(weight.shape[2:]), padding, tile)
    return result.permute(0, 3, 1, 2)


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


def use_fastest(graph: fx.Graph, products: bool, kernels: bool) -> None:
    """Replace convolutions in ``graph`` by ``products``, or by ``kernels`` of our own, where those are faster here."""
    for node in list(graph.nodes):
        found = _operands(node) if node.target is _CONV else None
        if found is None:
            continue
        x, weight, bias, stride, padding = found
        images: Any = x.meta["val"].shape, weight.meta["val"].shape
        sizes = (*(tuple(s) for s in images), tuple(stride), tuple(padding), x.meta["val"].dtype)
        way = choose(*sizes, products, kernels)
        if way is None:
            continue
        with graph.inserting_before(node):
            last = [] if way == () else [list(way)]
            target = KERNEL_CONVOLUTION if last else PRODUCT_CONVOLUTION
            result = graph.call_function(target, (x, weight, stride, padding, *last))
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
def choose(
    image: tuple[int, ...], weight: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...],
    dtype: torch.dtype, products: bool, kernels: bool,
) -> tuple[int, ...] | None:  # fmt: skip
    """How a convolution is computed fastest on this GPU: in tiles of our own kernel, or () for a product and writing
    what it reads; None for cuDNN's way."""
    kernels = kernels and set(stride) == {1} and unusable() is None
    if not torch.cuda.is_available() or not (products or kernels):
        return None
    options: dict[str, Any] = {"dtype": dtype, "device": "cuda"}
    inner = math.prod(weight[1:])
    sides = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(image[2:], padding, weight[2:], stride, strict=True)]
    rows = image[0] * math.prod(sides)
    x = torch.randn(image, **options).to(memory_format=torch.channels_last)
    filters = torch.randn(weight, **options).to(memory_format=torch.channels_last)
    pixels, columns = x.permute(0, 2, 3, 1), filters.permute(0, 2, 3, 1).flatten(1)
    ways: dict[tuple[int, ...], Callable[[], object]] = {}
    if products and rows * inner * dtype.itemsize <= _MOST:
        matrix = torch.randn(rows, inner, **options)

        def product() -> None:
            if weight[2:] != (1, 1) or set(stride) != {1} or any(padding):
                matrix.zero_()  # what reads each pixel several times is limited by what it writes
            torch.mm(matrix, columns.t())

        ways[()] = product
    if kernels:
        ways |= {
            tile: functools.partial(TILED_CONVOLUTION, pixels, columns, list(weight[2:]), list(padding), list(tile))
            for tile in TILES
            if weight[0] % math.prod(tile) == 0 and weight[1] % 8 == 0
        }
    if not ways:
        return None
    usual = functools.partial(torch.nn.functional.conv2d, x, filters, None, stride, padding)
    return fastest("another convolution", usual, ways, _GAIN, lambda: usual().permute(0, 2, 3, 1))
