# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as operators that Inductor can trace. Import only in processes that compile or time on a GPU.

The registered names are older than the names here. They stay, as stored graphs contain them.
"""

# Without annotations from __future__: torch.library reads the schemas from the annotations.
import math
from typing import Any

import torch
from torch import Tensor

from districompile.backends.inductor.kernels.launch import blocks_of, launch, power_of_two
from districompile.ir.quantised import F8, F8_MAX, TINY

_GROUP = 8  # blocks of rows that share a block of weights in the cache
_SWIZZLED = 128  # the longest row of a block, in bytes, for which PyTorch makes a descriptor


def split_matmul(place: Tensor, x: Tensor, weight: Tensor, split: int, offset: int, blocks: list[int]) -> Tensor:
    """Compute ``x @ weight.T`` (rows, columns): return its first ``split`` columns, write the others to ``place``.

    ``place`` is written contiguously from its element ``offset`` on. ``blocks`` are the sizes of a block of rows, of
    columns and of the inner dimension, then the numbers of warps and stages.
    """
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


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute :func:`districompile.ir.quantised.quantise_features` of the rows of a contiguous matrix, in one pass.

    Returns the values and their scales (rows) in float32.
    """
    rows, inner = x.shape
    values, scales = x.new_empty(x.shape, dtype=F8), x.new_empty(rows, dtype=torch.float32)
    padded = power_of_two(inner)
    launch(
        "quantise", [rows], {"x": x, "values": values, "scales": scales},
        {"INNER": inner, "PADDED": padded, "LARGEST": F8_MAX, "TINY": TINY}, warps=min(8, max(1, padded // 256)),
        stages=1,
    )  # fmt: skip
    return values, scales


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: list[int]) -> Tensor:
    """Compute attention of ``q``, ``k`` and ``v`` (batch, length, heads, width) into the same layout.

    ``blocks`` are the sizes of a block of queries and of keys (0: all keys at once), then the numbers of warps and
    stages.
    """
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


def projected_attention(x: Tensor, weight: Tensor, k: Tensor, v: Tensor, scale: float, blocks: list[int]) -> Tensor:
    """Compute attention to few keys whose queries are ``x @ weight.T``, with ``x`` (batch, length, inner).

    ``blocks`` are the sizes of a block of queries and of the inner dimension, then the numbers of warps and stages.
    """
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
    """Say whether ``x`` (batch, length, heads, width) is a matrix of rows at multiples of 16 bytes."""
    batch, length, _, width = x.shape
    plain = x.stride(3) == 1 and x.stride(2) == width and (batch == 1 or x.stride(0) == length * x.stride(1))
    return plain and all(n * x.itemsize % 16 == 0 for n in (x.stride(1), x.storage_offset()))


_DIMS = ("BATCH", "ROW", "HEAD")


def parts(keys: int) -> tuple[int, int]:
    """Cover ``keys`` by two powers of 2, or by one and 0, with as little padding as possible."""
    whole = power_of_two(keys)
    half = whole // 2
    rest = power_of_two(keys - half) if half >= 16 else whole
    return (half, rest) if half + rest < whole else (whole, 0)


QUANTISE_ROWS = torch.library.triton_op("districompile::quantise_rows_kernel", quantise_rows, mutates_args=())
SPLIT_MATMUL = torch.library.triton_op("districompile::product_apart_kernel", split_matmul, mutates_args={"place"})
ATTENTION = torch.library.triton_op("districompile::attention_kernel", attention, mutates_args=())
PROJECTED_ATTENTION = torch.library.triton_op(
    "districompile::product_attention_kernel", projected_attention, mutates_args=()
)
