# SPDX-License-Identifier: Apache-2.0
"""Select a kernel for each attention of a graph: PyTorch's, that of a library, or a custom kernel.

The fastest depends on how queries and heads fill the GPU, and on the number of keys. Each size is timed once. The
custom kernels (:mod:`districompile.backends.inductor.kernels.triton_kernels`) are for few keys, such as those of a
text, and for few queries, as each of many ranks has.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from districompile.backends.inductor import flash_attention
from districompile.backends.inductor.autotune import best_config
from districompile.backends.inductor.cache import remembered
from districompile.backends.inductor.kernels.launch import unavailable_reason

_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_TRANSPOSE = torch.ops.aten.transpose.int
MAX_WIDTH = 256  # of a head, in elements, for the libraries
_CUSTOM_MAX_WIDTH = 128
_FEW = 128  # keys
# Sizes of a block of queries and of keys (0: all keys at once); warps, stages
_FOR_FEW = ((64, 0, 4, 1), (128, 0, 8, 1))
_FOR_MANY = ((64, 128, 4, 3), (64, 64, 4, 3))
# Sizes of a block of queries and of the inner dimension of their projection; warps, stages
_PROJECTED_CONFIGS = ((128, 64, 4, 4), (64, 64, 4, 4))
_PROJECTED_WIDTHS = (16, 32, 64, 128)  # of heads, for the kernel that fuses the projection
_LINEAR = torch.ops.aten.linear.default

flash_attention.LIB.define("kernel_attention(Tensor q, Tensor k, Tensor v, float scale, int[] blocks) -> Tensor")


def kernel_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: list[int]) -> Tensor:
    """Compute attention of (batch, length, heads, width) into the same layout; on any device."""
    return flash_attention.sdpa_fallback(q, k, v, scale)


flash_attention.LIB.impl("kernel_attention", kernel_attention, "CompositeImplicitAutograd")
flash_attention.LIB.define(
    "product_attention(Tensor x, Tensor weight, Tensor k, Tensor v, float scale, int[] blocks) -> Tensor"
)


def projected_attention(x: Tensor, weight: Tensor, k: Tensor, v: Tensor, scale: float, blocks: list[int]) -> Tensor:
    """Compute attention with ``linear(x, weight)`` as queries; on any device."""
    q = torch.nn.functional.linear(x, weight).reshape(*x.shape[:2], *k.shape[2:])
    return flash_attention.sdpa_fallback(q, k, v, scale)


flash_attention.LIB.impl("product_attention", projected_attention, "CompositeImplicitAutograd")
PROJECTED_ATTENTION = torch.ops.districompile.product_attention.default
KERNEL_ATTENTION = torch.ops.districompile.kernel_attention.default


def lower_for_inductor(q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: list[int]) -> Tensor:
    """Lower :func:`kernel_attention` for Inductor."""
    if q.device.type != "cuda":
        return kernel_attention(q, k, v, scale, blocks)
    from districompile.backends.inductor.kernels import operators

    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    result: Tensor = operators.ATTENTION(q, k, v, scale, blocks)
    return result


def lower_projected_for_inductor(
    x: Tensor, weight: Tensor, k: Tensor, v: Tensor, scale: float, blocks: list[int]
) -> Tensor:
    """Lower :func:`projected_attention` for Inductor."""
    if x.device.type != "cuda":
        return projected_attention(x, weight, k, v, scale, blocks)
    from districompile.backends.inductor.kernels import operators

    k, v = (y if y.stride(3) == 1 else y.contiguous() for y in (k, v))
    result: Tensor = operators.PROJECTED_ATTENTION(x.contiguous(), weight, k, v, scale, blocks)
    return result


def autotune_attention(
    graph: fx.Graph, libraries: tuple[int, ...], custom_kernels: bool, *, forced: bool = False
) -> set[int]:
    """Replace each attention in ``graph`` by the fastest kernel on this GPU. Return the libraries that are called.

    ``libraries`` are versions of FlashAttention, of which the only one is used for all if ``forced``;
    ``custom_kernels`` says whether custom kernels take part. Only plain attention (no mask, not causal) of 16-bit heads
    of up to 256 elements, a multiple of 8, can be replaced. The operands of the replacement are (batch, length, heads,
    width), with a stride of 1 in the last dim.
    """
    found = set()
    for node in list(graph.nodes):
        scale = _scale(node) if node.target is _SDPA else None
        if scale is None:
            continue
        q, k = (x.meta["val"] for x in node.args[:2])
        tried = libraries, custom_kernels
        config = (*libraries, 1) if forced else best_attention(*q.shape, k.shape[2], q.dtype, *tried)
        if custom_kernels and not forced and _fuse_projection(graph, node, scale, config):
            continue
        if config is None:
            continue
        flash = len(config) == 2
        with graph.inserting_before(node):
            swapped = [graph.call_function(_TRANSPOSE, (x, 1, 2)) for x in node.args[:3]]
            target, last = (flash_attention.FLASH, config) if flash else (KERNEL_ATTENTION, (list(config),))
            result = graph.call_function(_TRANSPOSE, (graph.call_function(target, (*swapped, scale, *last)), 1, 2))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        found |= {config[0]} if flash else set()
    return found


def _fuse_projection(graph: fx.Graph, node: fx.Node, scale: float, config: tuple[int, ...] | None) -> bool:
    """Fuse attention to few keys with the projection of its queries, if that is faster; return whether it is."""
    chain = _queries(node)
    if chain is None:
        return False
    product: Any = chain[-1]
    x, weight = product.args[:2]
    q, k = (cast(fx.Node, y).meta["val"].shape for y in node.args[:2])
    blocks = best_projection_config(*q, k[2], weight.meta["val"].shape[1], x.meta["val"].dtype, config)
    if blocks is None:
        return False
    with graph.inserting_before(node):
        k, v = (graph.call_function(_TRANSPOSE, (y, 1, 2)) for y in node.args[1:3])
        call = graph.call_function(PROJECTED_ATTENTION, (x, weight, k, v, scale, list(blocks)))
        result = graph.call_function(_TRANSPOSE, (call, 1, 2))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    for old in (node, *chain):
        graph.erase_node(old)
    return True


def _queries(node: fx.Node) -> tuple[fx.Node, ...] | None:
    """Return the nodes from the queries of attention to few keys up to their projection.

    None if the queries are not heads of a linear layer without bias, or if anything else reads them.
    """
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
    return (swapped, heads, product) if whole and alone and width in _PROJECTED_WIDTHS else None


@remembered
def best_projection_config(
    batch: int, heads: int, queries: int, width: int, keys: int, inner: int, dtype: torch.dtype,
    config: tuple[int, ...] | None,
) -> tuple[int, ...] | None:  # fmt: skip
    """Return the fastest configuration of the kernel that fuses the projection of queries with attention.

    None if no configuration is faster on this GPU than the projection and then attention with ``config``, which is a
    result of :func:`best_attention`.
    """
    if unavailable_reason() is not None:
        return None
    from districompile.backends.inductor.kernels import operators

    x = torch.randn(batch, queries, inner, dtype=dtype, device="cuda")
    weight = torch.randn(heads * width, inner, dtype=dtype, device="cuda") / math.sqrt(inner)
    scale = 1 / math.sqrt(width)
    k, v = (torch.randn(batch, keys, heads, width, dtype=dtype, device="cuda") for _ in range(2))

    def unfused() -> Tensor:
        q = torch.nn.functional.linear(x, weight).view(batch, queries, heads, width)
        if config is None:
            return flash_attention.sdpa_fallback(q, k, v, scale)
        if len(config) == 2:
            return flash_attention.by_library(q, k, v, scale, *config)
        return operators.attention(q, k, v, scale, list(config))

    configs = {
        w: functools.partial(operators.projected_attention, x, weight, k, v, scale, list(w)) for w in _PROJECTED_CONFIGS
    }
    return best_config("a kernel for attention with its projection", unfused, configs)


def configs_of(width: int, keys: int) -> tuple[tuple[int, ...], ...]:
    """Return the configurations of the custom kernel to try for heads of ``width`` elements and so many keys."""
    if width > _CUSTOM_MAX_WIDTH:
        return ()
    return _FOR_FEW if keys <= _FEW else _FOR_MANY


@remembered
def best_attention(
    batch: int, heads: int, queries: int, width: int, keys: int, dtype: torch.dtype, libraries: tuple[int, ...],
    custom: bool,
) -> tuple[int, ...] | None:  # fmt: skip
    """Return the fastest kernel for this size on this GPU.

    (version, number of parts of the keys) is a FlashAttention; (block of queries, block of keys, warps, stages) is a
    custom kernel; None is PyTorch's. ``libraries`` and ``custom`` say which take part.
    """
    custom = custom and bool(configs_of(width, keys)) and unavailable_reason() is None
    if not torch.cuda.is_available() or not (libraries or custom):
        return None
    q, k, v = (torch.randn(batch, n, heads, width, dtype=dtype, device="cuda") for n in (queries, keys, keys))
    scale = 1 / math.sqrt(width)
    configs: dict[tuple[int, ...], Callable[[], object]] = {
        (version, n): functools.partial(flash_attention.by_library, q, k, v, scale, version, n)
        for version in libraries
        for n in flash_attention.LIBRARIES[version].offered_splits()
    }
    if custom:
        from districompile.backends.inductor.kernels import operators

        tried = configs_of(width, keys)
        configs |= {config: functools.partial(operators.attention, q, k, v, scale, list(config)) for config in tried}
    baseline = functools.partial(flash_attention.sdpa_fallback, q, k, v, scale, 1)
    return best_config(f"another kernel of attention for heads of {width} {dtype}", baseline, configs)


def _scale(node: fx.Node) -> float | None:
    """Return the scale of an attention that can be replaced, or None."""
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
    fits = width <= MAX_WIDTH and width % 8 == 0
    if not same or not fits or q.dtype not in (torch.float16, torch.bfloat16):
        return None
    scale = given.get("scale")
    scale = 1 / math.sqrt(width) if scale is None else float(scale)
    return scale if scale > 0 else None  # kernels take the largest score before they scale
