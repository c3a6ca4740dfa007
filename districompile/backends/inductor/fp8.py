# SPDX-License-Identifier: Apache-2.0
"""Compute layers in 8 bits by the custom kernel, where that is faster than the libraries of PyTorch.

A linear in 8 bits is ``torch._scaled_mm``. For float16 models that writes float32, which a second pass reads. A
convolution of more than one pixel has no form in 8 bits there: it is cuDNN's in 16 bits, of weights that are widened at
each call. Each size is timed once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx

from districompile.backends.inductor.autotune import best_config
from districompile.backends.inductor.cache import remembered
from districompile.backends.inductor.fragment import library_fragment
from districompile.backends.inductor.gated import gated_linear_of, replace_gated
from districompile.backends.inductor.kernels import fp8 as kernels
from districompile.backends.inductor.kernels.hopper import unavailable_reason
from districompile.backends.inductor.kernels.launch import blocks_of, launch
from districompile.ir.layer_size import computed_apart
from districompile.ir.ops import ops
from districompile.ir.quantised import fp8_conv, fp8_linear, multiply, quantise_features, to_f8

_MULTIPLE = 16  # of which the tensor memory accelerator and the libraries need the numbers of channels to be
_HALF = (torch.float16, torch.bfloat16)
Call = Callable[[], Tensor]

_LIB = library_fragment()
_LIB.define("kernel_fp8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, bool apart, int columns) -> Tensor")
_LIB.define(
    "kernel_fp8_gated_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, bool apart, int columns) -> Tensor"
)
_LIB.define(
    "kernel_fp8_conv(Tensor x, Tensor weight, Tensor scale, Tensor? input_scale, Tensor? bias, int[] padding,"
    " bool apart, int columns) -> Tensor"
)


def kernel_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, apart: bool, columns: int) -> Tensor:
    """Compute :func:`districompile.ir.quantised.fp8_linear`; on any device.

    ``apart``: ``x`` is rounded to 8 bits by a kernel of its own, as Inductor cannot fuse that into what computes it.
    """
    return fp8_linear(x, weight, scale, bias)


def kernel_gated_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, apart: bool, columns: int
) -> Tensor:
    """Compute the first half of a linear in 8 bits times the GELU of the second; on any device."""
    value, gate = fp8_linear(x, weight, scale, bias).chunk(2, -1)
    return value * torch.nn.functional.gelu(gate)


def kernel_conv(
    x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor | None, bias: Tensor | None, padding: list[int],
    apart: bool, columns: int,
) -> Tensor:  # fmt: skip
    """Compute :func:`districompile.ir.quantised.fp8_conv` of an image with stride 1; on any device."""
    return fp8_conv(x, weight, scale, input_scale, bias, [1, 1], padding, [1, 1], 1)


_LIB.impl("kernel_fp8_linear", kernel_linear, "CompositeImplicitAutograd")
_LIB.impl("kernel_fp8_gated_linear", kernel_gated_linear, "CompositeImplicitAutograd")
_LIB.impl("kernel_fp8_conv", kernel_conv, "CompositeImplicitAutograd")
KERNEL_LINEAR = torch.ops.districompile.kernel_fp8_linear.default
KERNEL_GATED_LINEAR = torch.ops.districompile.kernel_fp8_gated_linear.default
KERNEL_CONV = torch.ops.districompile.kernel_fp8_conv.default
KERNELS = {KERNEL_LINEAR, KERNEL_GATED_LINEAR, KERNEL_CONV}
"""The operators of this module. The last argument of each is the number of columns of a tile, or :data:`LIBRARY`."""

LIBRARY = -1
"""In place of a number of columns: a library multiplies, and a kernel of this package only rounds the input."""


def _quantised(x: Tensor, apart: bool) -> tuple[Tensor, Tensor]:
    """Return the rows of ``x`` in 8 bits as a matrix, and their scales."""
    if not apart:
        values, own = quantise_features(x, -1)
        return values.contiguous().reshape(-1, x.shape[-1]), own.reshape(-1)
    from districompile.backends.inductor.kernels import operators

    found: tuple[Tensor, Tensor] = operators.QUANTISE_ROWS(x.contiguous().reshape(-1, x.shape[-1]))
    return found


def lower_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, apart: bool, columns: int) -> Tensor:
    """Lower :func:`kernel_linear` for Inductor."""
    if x.device.type != "cuda":
        return kernel_linear(x, weight, scale, bias, apart, columns)
    rows, own = _quantised(x, apart)
    if columns == LIBRARY:
        y = multiply(rows, own.reshape(-1, 1), weight, scale, x.dtype)
        return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])
    image, half = rows.reshape(1, 1, *rows.shape), x.dtype == torch.bfloat16
    result: Tensor = kernels.TILED_CONVOLUTION(
        image, weight, own, scale, _as_result(bias, x), [1, 1], [0, 0], columns, half
    )
    return result.reshape(*x.shape[:-1], weight.shape[0])


def lower_gated_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, apart: bool, columns: int
) -> Tensor:
    """Lower :func:`kernel_gated_linear` for Inductor."""
    if x.device.type != "cuda":
        return kernel_gated_linear(x, weight, scale, bias, apart, columns)
    rows, own = _quantised(x, apart)
    result: Tensor = kernels.TILED_GATED_LINEAR(
        rows, weight, own, scale, _as_result(bias, x), columns, x.dtype == torch.bfloat16
    )
    return result.reshape(*x.shape[:-1], -1)


def lower_conv(
    x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor | None, bias: Tensor | None, padding: list[int],
    apart: bool, columns: int,
) -> Tensor:  # fmt: skip
    """Lower :func:`kernel_conv` for Inductor. ``weight`` and the result are channels-last."""
    if x.device.type != "cuda":
        return kernel_conv(x, weight, scale, input_scale, bias, padding, apart, columns)
    if input_scale is None:
        rows = x.permute(0, 2, 3, 1)
        return lower_linear(rows, weight.flatten(1), scale, bias, apart, columns).permute(0, 3, 1, 2)
    pixels = to_f8(x.float() / input_scale).permute(0, 2, 3, 1).contiguous()
    matrix = weight.permute(0, 2, 3, 1).flatten(1)
    result: Tensor = kernels.TILED_CONVOLUTION(
        pixels, matrix, input_scale, scale, _as_result(bias, x), list(weight.shape[2:]), padding, columns,
        x.dtype == torch.bfloat16,
    )  # fmt: skip
    return result.permute(0, 3, 1, 2)


def _as_result(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


def select_fp8_kernels(graph: fx.Graph) -> None:
    """Replace layers in 8 bits in ``graph`` by the custom kernel, where it is faster here."""
    for node in list(graph.nodes):
        linear = gated_linear_of(node, ops.fp8_linear.default)
        if linear is not None and (tile := _tile(linear, gated=True)) is not None:
            replace_gated(node, linear, KERNEL_GATED_LINEAR, (*linear.args, computed_apart(linear.args[0]), tile))
    for node in list(graph.nodes):
        if node.target is ops.fp8_linear.default and (arguments := _linear(node)) is not None:
            node.target, node.args = KERNEL_LINEAR, arguments
        elif node.target is ops.fp8_conv.default and (found := _convolution(node)) is not None:
            node.target, node.args = KERNEL_CONV, found


def _tile(node: fx.Node, *, gated: bool = False) -> int | None:
    """Return the best tile of a linear in 8 bits, or None if the libraries are faster, or the kernel does not fit."""
    x, weight, _, bias = node.args
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    value = x.meta["val"]
    rows = value.numel() // max(1, value.shape[-1])
    return best_linear(rows, *reversed(weight.meta["val"].shape), bias is not None, gated, value.dtype)


def _linear(node: fx.Node) -> tuple[Any, ...] | None:
    """Return the arguments of :func:`kernel_linear`, or None where the library's product alone is faster."""
    x, weight, *_ = cast(tuple[Any, ...], node.args)
    tile, apart, dtype = _tile(node), computed_apart(x), x.meta["val"].dtype
    if tile is None and apart and dtype in _HALF and unavailable_reason() is None:
        fits = all(n and n % _MULTIPLE == 0 for n in weight.meta["val"].shape)
        tile = LIBRARY if fits and x.meta["val"].numel() else None
    return None if tile is None else (*node.args, apart, tile)


def _convolution(node: fx.Node) -> tuple[Any, ...] | None:
    """Return the arguments of :func:`kernel_conv`, or None where it does not fit or is slower."""
    given: Any = node.args
    x, weight, scale, input_scale, bias, stride, padding, dilation, groups = given
    image, filters = x.meta["val"], weight.meta["val"]
    if image.ndim != 4 or groups != 1 or {*stride, *dilation} != {1} or not image.numel():
        return None
    padding = [padding[0], padding[-1]]
    if input_scale is None:
        rows = image.numel() // image.shape[1]
        tile = best_linear(rows, image.shape[1], filters.shape[0], bias is not None, False, image.dtype)
    else:
        tile = best_convolution(tuple(image.shape), tuple(filters.shape), tuple(padding), bias is not None, image.dtype)
    return None if tile is None else (x, weight, scale, input_scale, bias, padding, computed_apart(x), tile)


def tiles_of(inner: int, columns: int, gated: bool, dtype: torch.dtype) -> list[int]:
    """Return the tiles that fit the sizes of a layer; none where the kernel cannot be used."""
    offered, width = (kernels.GATED_TILES, columns // 2) if gated else (kernels.TILES, columns)
    fits = inner % _MULTIPLE == 0 and columns % _MULTIPLE == 0 and dtype in _HALF
    tiles = [t for t in offered if width % t == 0] if fits else []
    return tiles if tiles and unavailable_reason() is None else []


@remembered
def best_linear(rows: int, inner: int, columns: int, bias: bool, gated: bool, dtype: torch.dtype) -> int | None:
    """Return the number of columns of a tile with which the kernel is fastest, or None if the libraries are faster.

    ``rows``, ``inner`` and ``columns`` are the sizes of a linear in 8 bits on this GPU, whose result is gated or not.
    """
    if not rows or not tiles_of(inner, columns, gated, dtype):
        return None
    separate, calls, reference = linear_calls(rows, inner, columns, bias, gated, dtype)
    return best_config("a kernel for linear layers in 8 bits", separate, calls, reference=reference)


def linear_calls(
    rows: int, inner: int, columns: int, bias: bool, gated: bool, dtype: torch.dtype
) -> tuple[Call, dict[int, Call], Call]:
    """Return what :func:`best_linear` compares, on random operands, and what all of it should compute."""
    tiles = tiles_of(inner, columns, gated, dtype)
    x, weight = _random(rows, inner), _random(columns, inner)
    own, scale, added = _scales(rows, columns, bias, dtype)
    size, block = rows * columns // 2, 512
    one = torch.ones((), device="cuda")  # which a program makes once

    def separate() -> Tensor:
        """What the libraries do, and one pass over their result, which adds the bias, gates, and rounds."""
        scaled = dtype == torch.bfloat16
        if scaled:
            product = multiply(x, own[:, None], weight, scale, dtype)
        else:
            product = torch._scaled_mm(x, weight.t(), one, one, out_dtype=torch.float32, use_fast_accum=False)
        if not gated:
            return product.to(dtype)
        out = torch.empty(size, dtype=dtype, device="cuda")
        sizes = {"COLUMNS": columns // 2, "SIZE": size, "BLOCK": block}
        launch("gate", [blocks_of(size, block)], {"product": product, "out": out}, sizes, warps=4, stages=1)
        return out

    def reference() -> Tensor:
        y = multiply(x, own[:, None], weight, scale, torch.float32)
        y = y if added is None else y + added.float()
        if gated:
            value, gate = y.chunk(2, -1)
            y = value * torch.nn.functional.gelu(gate)
        return y.to(dtype)

    def by_kernel(tile: int) -> Tensor:
        half = dtype == torch.bfloat16
        if gated:
            return kernels.tiled_gated_linear(x, weight, own, scale, added, tile, half)
        return kernels.tiled_convolution(x[None, None], weight, own, scale, added, [1, 1], [0, 0], tile, half)[0, 0]

    calls: dict[int, Call] = {tile: functools.partial(by_kernel, tile) for tile in tiles}
    return separate, calls, reference


@remembered
def best_convolution(
    image: tuple[int, ...], weight: tuple[int, ...], padding: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> int | None:
    """Return the number of columns of a tile with which the kernel is fastest, or None if cuDNN is, in 16 bits.

    ``image`` (B, C, H, W) and ``weight`` (O, C, h, w) are the sizes of a convolution in 8 bits on this GPU.
    """
    if not tiles_of(weight[1], weight[0], False, dtype):
        return None
    cudnn, calls, reference = convolution_calls(image, weight, padding, bias, dtype)
    return best_config("a kernel for convolutions in 8 bits", cudnn, calls, reference=reference)


def convolution_calls(
    image: tuple[int, ...], weight: tuple[int, ...], padding: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> tuple[Call, dict[int, Call], Call]:
    """Return what :func:`best_convolution` compares, on random operands, and what all of it should compute."""
    tiles = tiles_of(weight[1], weight[0], False, dtype)
    pixels = _random(image[0], *image[2:], image[1])
    filters = _random(weight[0], *weight[2:], weight[1])
    own, scale, added = _scales(1, weight[0], bias, dtype)
    x, w = pixels.permute(0, 3, 1, 2), filters.permute(0, 3, 1, 2)
    wide = x.to(dtype)

    def cudnn() -> Tensor:
        """Widen the weights and convolve. Inductor fuses scales and bias into what follows."""
        return torch.nn.functional.conv2d(wide, w.to(dtype), None, 1, padding)

    def reference() -> Tensor:
        factor = own * scale * 65536
        y = torch.nn.functional.conv2d(wide / 256, w.to(dtype) / 256, None, 1, padding).permute(0, 2, 3, 1)
        y = y.float() * factor
        return (y if added is None else y + added.float()).to(dtype)

    half, matrix = dtype == torch.bfloat16, filters.flatten(1)
    calls: dict[int, Call] = {
        tile: functools.partial(
            kernels.tiled_convolution, pixels, matrix, own, scale, added, list(weight[2:]), list(padding), tile, half
        )
        for tile in tiles
    }
    return cudnn, calls, reference


def _random(*shape: int) -> Tensor:
    """Return random values in 8 bits on the GPU, of a size that layers have."""
    return to_f8(torch.randn(shape, device="cuda") * 64)


def _scales(rows: int, columns: int, bias: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return scales of ``rows`` and of columns with which a result has about the size of its bias, and the bias."""
    own = torch.rand(rows, device="cuda") / 4096 + 1 / 4096
    scale = (torch.rand(columns, device="cuda") + 1) / 64
    return own, scale, torch.randn(columns, device="cuda", dtype=dtype) if bias else None
