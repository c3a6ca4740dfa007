"""Gated products (GEGLU; Shazeer, arXiv 2002.05202) by one kernel, where that is faster.

Apart, a product of two halves is written and read again by what multiplies one with the GELU of the other: at 2048
rows, 1280 by 2 x 5120, that takes a fifth of the time of both.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, fx

import districompile.ir.ops  # noqa: F401  (defines the library that this adds to)
from districompile.backends.gpu.hopper import GATED_TILES, TILED_GATED_PRODUCT, unusable
from districompile.backends.gpu.launch import blocks_of, launch
from districompile.backends.inductor_direct import plain_slice
from districompile.backends.timing import fastest

_LINEAR = torch.ops.aten.linear.default
_MUL = torch.ops.aten.mul.Tensor
_GELU = torch.ops.aten.gelu.default

_LIB: Any = torch.library.Library("districompile", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIB.define("gated_product(Tensor x, Tensor weight, Tensor? bias, int columns) -> Tensor")


def gated_product(x: Tensor, weight: Tensor, bias: Tensor | None, columns: int) -> Tensor:
    """The first half of ``linear(x, weight, bias)`` times the GELU of the second."""
    value, gate = torch.nn.functional.linear(x, weight, bias).chunk(2, -1)
    return value * torch.nn.functional.gelu(gate)


_LIB.impl("gated_product", gated_product, "CompositeImplicitAutograd")
GATED_PRODUCT = torch.ops.districompile.gated_product.default


def traced(x: Tensor, weight: Tensor, bias: Tensor | None, columns: int) -> Tensor:
    """The same as the compiler for GPUs takes it."""
    if x.device.type != "cuda":
        return gated_product(x, weight, bias, columns)
    result: Tensor = TILED_GATED_PRODUCT(x.reshape(-1, x.shape[-1]).contiguous(), weight, bias, columns)
    return result.reshape(*x.shape[:-1], -1)


def use_gated_products(graph: fx.Graph) -> None:
    """Put gated products of 16 bits in ``graph`` into one operator each, where a kernel for both is faster here."""
    for node in list(graph.nodes):
        product = _product(node)
        if product is None:
            continue
        x, weight, *rest = product.args
        bias = rest[0] if rest else None
        rows = x.meta["val"].numel() // x.meta["val"].shape[-1]
        columns = pays(rows, *reversed(weight.meta["val"].shape), bias is not None, x.meta["val"].dtype)
        if columns is None:
            continue
        with graph.inserting_before(node):
            result = graph.call_function(GATED_PRODUCT, (x, weight, bias, columns))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        for old in (node, *node.all_input_nodes, *_halves(node), product):
            if not old.users and old in graph.nodes:
                graph.erase_node(old)


def _halves(node: fx.Node) -> list[fx.Node]:
    return [x for n in node.all_input_nodes for x in (n.all_input_nodes if n.target is _GELU else [n])]


def _product(node: fx.Node) -> Any:
    """The product whose first half ``node`` multiplies with the GELU of the second, if nothing else reads it."""
    if node.target is not _MUL or len(node.all_input_nodes) != 2 or node.kwargs:
        return None
    operands: list[Any] = list(node.args)
    gelu = next((a for a in operands if a.target is _GELU and not a.kwargs and len(a.users) == 1), None)
    value = next((a for a in operands if a is not gelu), None)
    if gelu is None or value is None:
        return None
    gate = gelu.args[0]
    parts = [plain_slice(value), plain_slice(gate)]
    if None in parts or gate.args[0] is not value.args[0] or any(len(n.users) != 1 for n in (value, gate)):
        return None
    product = value.args[0]
    if product.target is not _LINEAR or product.kwargs or len(product.users) != 2:
        return None
    x, shape = product.args[0].meta["val"], product.meta["val"].shape
    half = shape[-1] // 2
    if parts != [(len(shape) - 1, 0, half), (len(shape) - 1, half, shape[-1])] or shape[-1] % 2:
        return None
    return product if x.dtype in (torch.float16, torch.bfloat16) and x.shape[-1] % 8 == 0 else None


@functools.cache
def pays(rows: int, inner: int, columns: int, bias: bool, dtype: torch.dtype) -> int | None:
    """In tiles of how many columns the kernel is fastest, if it is faster than a product and what reads it, on this
    GPU."""
    tiles = [tile for tile in GATED_TILES if columns // 2 % tile == 0]
    if not tiles or unusable() is not None:
        return None
    x = torch.randn(rows, inner, dtype=dtype, device="cuda")
    weight = torch.randn(columns, inner, dtype=dtype, device="cuda") / math.sqrt(inner)
    added = torch.randn(columns, dtype=dtype, device="cuda") if bias else None
    size, block = rows * columns // 2, 512

    def apart() -> None:
        tensors = {"product": torch.mm(x, weight.t()), "out": x.new_empty(size)}
        sizes = {"COLUMNS": columns // 2, "SIZE": size, "BLOCK": block}
        launch("gate", [blocks_of(size, block)], tensors, sizes, warps=4, stages=1)

    ways = {tile: functools.partial(TILED_GATED_PRODUCT, x, weight, added, tile) for tile in tiles}
    reference = functools.partial(gated_product, x, weight, added, 0)
    return fastest("a kernel for gated products", apart, ways, reference=reference)
