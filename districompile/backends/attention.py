"""Which kernel computes each attention of a graph: PyTorch's choice, FlashAttention-3, or one of our own.

Which is fastest depends on how queries and heads fill the GPU, and on how many keys there are; so they are timed, once
for each size. Kernels of our own (:mod:`districompile.backends.gpu.kernels`) are for few keys, as those of a text,
and for few queries, as many ranks have.
"""

from __future__ import annotations

import functools
import math
from typing import Any

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
_FOR_MANY = ((64, 128, 4, 3), (64, 64, 4, 3), (64, 128, 4, 2))

flash_attention.LIB.define("kernel_attention(Tensor q, Tensor k, Tensor v, float scale, int[] blocks) -> Tensor")


def kernel_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: list[int]) -> Tensor:
    """Attention of (batch, length, heads, elements), and so is the result."""
    return flash_attention.elsewhere(q, k, v, scale, 1)


flash_attention.LIB.impl("kernel_attention", kernel_attention, "CompositeImplicitAutograd")
KERNEL_ATTENTION = torch.ops.districompile.kernel_attention.default


def traced(q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: list[int]) -> Tensor:
    """The same as the compiler for GPUs takes it."""
    if q.device.type != "cuda":
        return kernel_attention(q, k, v, scale, blocks)
    from districompile.backends.gpu import operators

    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    result: Tensor = operators.ATTENTION(q, k, v, scale, blocks)
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


@functools.cache
def choose(
    batch: int, heads: int, queries: int, width: int, keys: int, dtype: torch.dtype, flash: bool, own: bool
) -> tuple[int, ...] | None:
    """In how many parts FlashAttention-3 takes the keys where it is fastest, or in what blocks a kernel of ours takes
    queries and keys where that is; None if PyTorch's kernels are, on this GPU."""
    if not torch.cuda.is_available():
        return None
    q, k, v = (torch.randn(batch, n, heads, width, dtype=dtype, device="cuda") for n in (queries, keys, keys))
    scale = 1 / math.sqrt(width)
    ways: dict[tuple[int, ...], Any] = {}
    if flash:
        ways = {(n,): functools.partial(flash_attention.on_gpu, q, k, v, scale, n) for n in _SPLITS}
    if own and width <= _OWN_WIDEST and unusable() is None:
        from districompile.backends.gpu import operators

        tried = (*(_FOR_FEW if keys <= _FEW else ()), *_FOR_MANY)
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
    return 1 / math.sqrt(width) if scale is None else float(scale)
