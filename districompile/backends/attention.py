"""Which kernel computes each attention of a graph: PyTorch's choice, FlashAttention-3, or one of our own.

Which is fastest depends on how queries and heads fill the GPU, and on how many keys there are; so they are timed, once
for each size. Kernels of our own (:mod:`districompile.backends.gpu.kernels`) are for few keys, as those of a text,
and for few queries, as many ranks have.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from districompile.backends import flash_attention
from districompile.backends.gpu.launch import unusable
from districompile.backends.timing import fastest

_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_TRANSPOSE = torch.ops.aten.transpose.int
_WIDEST = 256  # of a head, in elements
_OWN_WIDEST = 128
_SPLITS = (1, 2, 3)  # parts of the keys that are worked on at once, where queries alone leave the GPU idle
_FEW = 128  # keys
# Blocks of queries, of keys (0 for all keys at once); warps, stages
_FOR_FEW = ((64, 0, 4, 1), (128, 0, 8, 1))
_FOR_MANY = ((64, 128, 4, 3), (64, 64, 4, 3))
# Blocks of queries, and of what their product sums over; warps, stages
_WITH_PRODUCT = ((128, 64, 4, 4), (64, 64, 4, 4))
_WIDTHS = (16, 32, 64, 128)  # of heads whose queries are made where they are needed
_LINEAR = torch.ops.aten.linear.default

flash_attention.LIB.define("kernel_attention(Tensor q, Tensor k, Tensor v, float scale, int[] blocks) -> Tensor")


def kernel_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: list[int]) -> Tensor:
    """Attention of (batch, length, heads, elements), and so is the result."""
    return flash_attention.elsewhere(q, k, v, scale, 1)


flash_attention.LIB.impl("kernel_attention", kernel_attention, "CompositeImplicitAutograd")
flash_attention.LIB.define(
    "product_attention(Tensor x, Tensor weight, Tensor k, Tensor v, float scale, int[] blocks) -> Tensor"
)


def product_attention(x: Tensor, weight: Tensor, k: Tensor, v: Tensor, scale: float, blocks: list[int]) -> Tensor:
    """The same with ``linear(x, weight)`` as queries."""
    q = torch.nn.functional.linear(x, weight).reshape(*x.shape[:2], *k.shape[2:])
    return flash_attention.elsewhere(q, k, v, scale, 1)


flash_attention.LIB.impl("product_attention", product_attention, "CompositeImplicitAutograd")
PRODUCT_ATTENTION = torch.ops.districompile.product_attention.default
KERNEL_ATTENTION = torch.ops.districompile.kernel_attention.default


def traced(q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: list[int]) -> Tensor:
    """The same as the compiler for GPUs takes it."""
    if q.device.type != "cuda":
        return kernel_attention(q, k, v, scale, blocks)
    from districompile.backends.gpu import operators

    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    result: Tensor = operators.ATTENTION(q, k, v, scale, blocks)
    return result


def traced_product(x: Tensor, weight: Tensor, k: Tensor, v: Tensor, scale: float, blocks: list[int]) -> Tensor:
    """The same as the compiler for GPUs takes it."""
    if x.device.type != "cuda":
        return product_attention(x, weight, k, v, scale, blocks)
    from districompile.backends.gpu import operators

    k, v = (y if y.stride(3) == 1 else y.contiguous() for y in (k, v))
    result: Tensor = operators.PRODUCT_ATTENTION(x.contiguous(), weight, k, v, scale, blocks)
    return result


def use_fastest(graph: fx.Graph, asked: str, own: bool) -> bool:
    """Replace attention in ``graph`` by what is fastest here; whether any is FlashAttention-3's. ``asked``: one of
    :data:`districompile.backends.flash_attention.KERNELS`. ``own``: whether kernels of our own are tried.

    What can be replaced is plain attention (no mask, not causal) of 16-bit heads of up to 256 elements, a multiple
    of 8. The operands of what replaces it are (batch, length, heads, elements), with elements next to each other.
    """
    found = False
    for node in list(graph.nodes):
        scale = _scale(node) if node.target is _SDPA else None
        if scale is None:
            continue
        q, k = (x.meta["val"] for x in node.args[:2])
        way = (1,) if asked == "flash3" else choose(*q.shape, k.shape[2], q.dtype, asked == "auto", own)
        if own and asked != "flash3" and _with_product(graph, node, scale, way):
            continue
        if way is None:
            continue
        flash = len(way) == 1
        with graph.inserting_before(node):
            swapped = [graph.call_function(_TRANSPOSE, (x, 1, 2)) for x in node.args[:3]]
            target, how = (flash_attention.FLASH, way[0]) if flash else (KERNEL_ATTENTION, list(way))
            result = graph.call_function(_TRANSPOSE, (graph.call_function(target, (*swapped, scale, how)), 1, 2))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        found |= flash
    return found


def _with_product(graph: fx.Graph, node: fx.Node, scale: float, way: tuple[int, ...] | None) -> bool:
    """Put attention to few keys and the product that its queries are into one, where that is faster here than both."""
    chain = _queries(node)
    if chain is None:
        return False
    product: Any = chain[-1]
    x, weight = product.args[:2]
    q, k = (cast(fx.Node, y).meta["val"].shape for y in node.args[:2])
    blocks = product_pays(*q, k[2], weight.meta["val"].shape[1], x.meta["val"].dtype, way)
    if blocks is None:
        return False
    with graph.inserting_before(node):
        k, v = (graph.call_function(_TRANSPOSE, (y, 1, 2)) for y in node.args[1:3])
        call = graph.call_function(PRODUCT_ATTENTION, (x, weight, k, v, scale, list(blocks)))
        result = graph.call_function(_TRANSPOSE, (call, 1, 2))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    for old in (node, *chain):
        graph.erase_node(old)
    return True


def _queries(node: fx.Node) -> tuple[fx.Node, ...] | None:
    """The queries of attention to few keys, if they are heads of a product without a bias and read nowhere else: nodes
    from there up to that product."""
    swapped, keys, values, *_ = cast(Sequence[Any], node.args)
    turns = {torch.ops.aten.permute.default: ([0, 2, 1, 3],), _TRANSPOSE: (1, 2)}
    turned = turns.get(swapped.target) == swapped.args[1:] and swapped not in (keys, values)
    if not turned or keys.meta["val"].shape[2] > _FEW:
        return None
    heads = swapped.args[0]
    if heads.target not in (torch.ops.aten.reshape.default, torch.ops.aten.view.default):
        return None
    product = heads.args[0]
    if product.target is not _LINEAR or any(a is not None for a in product.args[2:]) or product.kwargs:
        return None
    x, shape, width = product.args[0].meta["val"], heads.meta["val"].shape, swapped.meta["val"].shape[3]
    whole = x.ndim == 3 and shape == (*x.shape[:2], *shape[2:]) and x.shape[2] % 8 == 0
    alone = all(len(n.users) == 1 for n in (swapped, heads, product))
    return (swapped, heads, product) if whole and alone and width in _WIDTHS else None


@functools.cache
def product_pays(
    batch: int, heads: int, queries: int, width: int, keys: int, inner: int, dtype: torch.dtype,
    way: tuple[int, ...] | None,
) -> tuple[int, ...] | None:  # fmt: skip
    """In what blocks one kernel takes queries that are a product, if it is faster here than a product and attention in
    the ``way`` chosen."""
    if unusable() is not None:
        return None
    from districompile.backends.gpu import operators

    x = torch.randn(batch, queries, inner, dtype=dtype, device="cuda")
    weight = torch.randn(heads * width, inner, dtype=dtype, device="cuda") / math.sqrt(inner)
    scale = 1 / math.sqrt(width)
    k, v = (torch.randn(batch, keys, heads, width, dtype=dtype, device="cuda") for _ in range(2))

    def apart() -> Tensor:
        q = torch.nn.functional.linear(x, weight).view(batch, queries, heads, width)
        if way is None:
            return flash_attention.elsewhere(q, k, v, scale, 1)
        if len(way) == 1:
            return flash_attention.on_gpu(q, k, v, scale, way[0])
        return operators.attention(q, k, v, scale, list(way))

    ways = {w: functools.partial(operators.product_attention, x, weight, k, v, scale, list(w)) for w in _WITH_PRODUCT}
    return fastest("a kernel for attention with the product before it", apart, ways)


@functools.cache
def choose(
    batch: int, heads: int, queries: int, width: int, keys: int, dtype: torch.dtype, flash: bool, own: bool
) -> tuple[int, ...] | None:
    """In how many parts FlashAttention-3 takes the keys where it is fastest, or in what blocks a kernel of ours takes
    queries and keys where that is; None if PyTorch's kernels are, on this GPU."""
    own = own and width <= _OWN_WIDEST and unusable() is None
    if not torch.cuda.is_available() or not (flash or own):
        return None
    q, k, v = (torch.randn(batch, n, heads, width, dtype=dtype, device="cuda") for n in (queries, keys, keys))
    scale = 1 / math.sqrt(width)
    ways: dict[tuple[int, ...], Any] = {}
    if flash:
        ways = {(n,): functools.partial(flash_attention.on_gpu, q, k, v, scale, n) for n in _SPLITS}
    if own:
        from districompile.backends.gpu import operators

        tried = _FOR_FEW if keys <= _FEW else _FOR_MANY
        ways |= {way: functools.partial(operators.attention, q, k, v, scale, list(way)) for way in tried}
    usual = functools.partial(flash_attention.elsewhere, q, k, v, scale, 1)
    return fastest(f"another kernel of attention for heads of {width} {dtype}", usual, ways)


def _scale(node: fx.Node) -> float | None:
    """What scores are multiplied with, of attention that the library can do."""
    names = ("q", "k", "v", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if (
        given.get("attn_mask") is not None
        or given.get("dropout_p")
        or given.get("is_causal")
        or given.get("enable_gqa")
    ):
        return None
    values: list[Any] = [x.meta.get("val") for x in node.args[:3] if isinstance(x, fx.Node)]
    if len(values) != 3 or not all(isinstance(x, Tensor) and x.ndim == 4 for x in values):
        return None
    q, k, v = values
    width = q.shape[-1]
    same = k.shape == v.shape and k.shape[:2] == q.shape[:2] and k.shape[-1] == width
    fits = width <= _WIDEST and width % 8 == 0
    if not same or not fits or q.dtype not in (torch.float16, torch.bfloat16):
        return None
    scale = given.get("scale")
    scale = 1 / math.sqrt(width) if scale is None else float(scale)
    return scale if scale > 0 else None  # kernels take the largest score before they scale
