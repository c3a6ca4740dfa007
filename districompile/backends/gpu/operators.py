"""The kernels as operators that the compiler for GPUs takes apart. For processes that compile, or time, on a GPU."""

# No annotations from __future__: the operators' schemas are read from them.
import math
from typing import Any

import torch
from torch import Tensor

from districompile.backends.gpu.launch import blocks_of, launch, power_of_two

_GROUP = 8  # blocks of rows that share a block of weights
_SWIZZLED = 128  # bytes of a row of a block, at most, that PyTorch can describe


def product_apart(place: Tensor, x: Tensor, weight: Tensor, split: int, offset: int, blocks: list[int]) -> Tensor:
    """The first ``split`` columns of a product; the others go to ``place``, from its element ``offset`` on."""
    block_m, block_n, block_k, warps, stages = blocks
    rows, columns = x.shape[0], weight.shape[0]
    first = x.new_empty(rows, split)
    launch(
        "product_apart",
        [blocks_of(rows, block_m) * (columns // block_n)],
        {"x": x, "weight": weight, "first": first, "second": place},
        {"ROWS": rows, "SPLIT": split, "COLUMNS": columns, "INNER": x.shape[1], "OFFSET": offset,
         "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP": _GROUP},
        warps=warps, stages=stages, blocks={"x": (block_m, block_k), "weight": (block_n, block_k)},
    )  # fmt: skip
    return first


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: list[int]) -> Tensor:
    """Of (batch, length, heads, width); ``blocks`` are those of queries and of keys (0 for all keys at once), then
    warps and stages."""
    block_m, block_n, warps, stages = blocks
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    out = q.new_empty(q.shape)
    strides = {f"{n}_{dim}": x.stride(i) for n, x in (("Q", q), ("K", k), ("V", v)) for i, dim in enumerate(_DIMS)}
    padded = power_of_two(width)
    constants: dict[str, Any] = {
        **strides, "QUERIES": queries, "KEYS": keys, "HEADS": heads, "WIDTH": width, "PADDED": padded,
        "SCALE": scale * math.log2(math.e), "BLOCK_M": block_m,
    }  # fmt: skip
    kernel, described = "attention_few", dict[str, tuple[int, int]]()
    if block_n == 0:
        constants["FIRST"], constants["REST"] = parts(keys)
    else:
        kernel = "attention_many"
        if padded * q.itemsize <= _SWIZZLED and all(_describable(x) for x in (k, v)):
            described = dict.fromkeys("kv", (block_n, padded))
            k, v = (x.flatten(2).flatten(0, 1) for x in (k, v))
        constants |= {"BLOCK_N": block_n, "DESCRIBED": bool(described)}
    launch(
        kernel, [blocks_of(queries, block_m), heads, batch], {"q": q, "k": k, "v": v, "out": out}, constants,
        warps=warps, stages=stages, blocks=described,
    )  # fmt: skip
    return out


def product_attention(x: Tensor, weight: Tensor, k: Tensor, v: Tensor, scale: float, blocks: list[int]) -> Tensor:
    """Attention to few keys, of queries that are a product of ``x`` (batch, length, inner); ``blocks`` are those of
    queries and of what is summed over, then warps and stages."""
    block_m, block_k, warps, stages = blocks
    batch, queries, inner = x.shape
    keys, heads, width = k.shape[1:]
    out = x.new_empty(batch, queries, heads, width)
    first, rest = parts(keys)
    strides = {f"{n}_{dim}": y.stride(i) for n, y in (("K", k), ("V", v)) for i, dim in enumerate(_DIMS)}
    launch(
        "product_attention",
        [blocks_of(queries, block_m), heads, batch],
        {"x": x.reshape(-1, inner), "weight": weight, "k": k, "v": v, "out": out},
        {**strides, "QUERIES": queries, "KEYS": keys, "HEADS": heads, "WIDTH": width,
         "SCALE": scale * math.log2(math.e), "FIRST": first, "REST": rest, "INNER": inner, "BLOCK_M": block_m,
         "BLOCK_K": block_k},
        warps=warps, stages=stages, blocks={"x": (block_m, block_k), "weight": (width, block_k)},
    )  # fmt: skip
    return out


def _describable(x: Tensor) -> bool:
    """Whether (batch, length, heads, width) are a matrix of rows, at multiples of 16 bytes."""
    batch, length, _, width = x.shape
    plain = x.stride(3) == 1 and x.stride(2) == width and (batch == 1 or x.stride(0) == length * x.stride(1))
    return plain and all(n * x.itemsize % 16 == 0 for n in (x.stride(1), x.storage_offset()))


_DIMS = ("BATCH", "ROW", "HEAD")


def parts(keys: int) -> tuple[int, int]:
    """Two powers of 2, or one and nothing, that hold so many keys and little else."""
    whole = power_of_two(keys)
    half = whole // 2
    rest = power_of_two(keys - half) if half >= 16 else whole
    return (half, rest) if half + rest < whole else (whole, 0)


PRODUCT_APART = torch.library.triton_op("districompile::product_apart_kernel", product_apart, mutates_args={"place"})
ATTENTION = torch.library.triton_op("districompile::attention_kernel", attention, mutates_args=())
PRODUCT_ATTENTION = torch.library.triton_op(
    "districompile::product_attention_kernel", product_attention, mutates_args=()
)
