# SPDX-License-Identifier: Apache-2.0
"""The kernels that one rank runs in one call, counted from a graph: FLOPs, bytes and shapes.

A compiler fuses elementwise operators into the kernel that reads their result. So an elementwise result counts as a
kernel of its own only where a matrix product, a convolution, attention or a transfer reads it, or where several
operators do. Views cost nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor, fx

from districompile.ir.flops import flops_of
from districompile.ir.meta import is_view, operator_name

KernelKind = Literal["matmul", "conv", "attention", "memory"]
# They read all of their input before they write: a compiler makes each a kernel of its own
_REDUCTIONS = (
    "norm",
    "moments",
    "softmax",
    "sum",
    "mean",
    "amax",
    "amin",
    "var",
    "std",
    "pool",
    "cumsum",
    "sort",
    "topk",
)
# Transfers, and what a backend writes in place
_UNCOUNTED = (
    "districompile::exchange", "districompile::reduce", "districompile::fetch", "districompile::assemble_in_place",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class KernelWork:
    """One kernel of a rank.

    ``m``, ``n``, ``k`` and ``batch`` are the sizes of a product; of a convolution those of the product it is computed
    as (output positions, output channels, inputs of one output). Of attention ``m`` is the queries, ``n`` the keys,
    ``k`` the width of a head and ``batch`` the heads of all samples. Of ``memory`` they are 0. ``flops`` counts a
    multiplication and an addition as two; ``nbytes`` is what is read and written at least. ``itemsize``: bytes of an
    element of the result.
    """

    kind: KernelKind
    flops: float
    nbytes: float
    itemsize: int
    m: int = 0
    n: int = 0
    k: int = 0
    batch: int = 1
    name: str = ""


def kernels_of(nodes: Iterable[fx.Node], rank: int | None = None, epilogues: bool = False) -> list[KernelWork]:
    """Return the kernels of ``rank`` in an SPMD graph, or those of one device in a global graph (``rank`` None).

    ``epilogues``: an elementwise kernel that is the only reader of a product is computed by the product's kernel.
    """
    found: dict[fx.Node, KernelWork] = {}
    reads: dict[fx.Node, dict[fx.Node, int]] = {}
    for node in nodes:
        out = _value(node, rank)
        if out is None or node.op != "call_function" or is_view(node) or operator_name(node) in _UNCOUNTED:
            continue
        if flops_of(node, rank):
            found[node] = _product(node, out, rank)
            reads[node] = dict.fromkeys(_sources(node, rank), 0)
        elif _is_kernel(node):
            reads[node] = _sources(node, rank)
            moved = sum(reads[node].values()) + _nbytes(out)
            found[node] = KernelWork("memory", 0.0, moved, out.element_size(), name=operator_name(node))
    return _fused(found, reads, rank) if epilogues else list(found.values())


def _fused(
    found: dict[fx.Node, KernelWork], reads: dict[fx.Node, dict[fx.Node, int]], rank: int | None
) -> list[KernelWork]:
    """Join elementwise kernels with the products that they alone read: what is between them is not written."""
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node, sources in reads.items():
        for source in sources:
            readers.setdefault(source, []).append(node)
    for source in [n for n, k in found.items() if k.kind in ("matmul", "conv")]:
        (reader, *others) = readers.get(source, [None])
        if others or reader is None or reader not in found or found[reader].kind != "memory" or _reduces(reader):
            continue
        product, after = found[source], found.pop(reader)
        between = _nbytes(_value(source, rank)) + reads[reader][source]
        found[source] = dataclasses.replace(product, nbytes=product.nbytes + after.nbytes - between)
    return list(found.values())


def _product(node: fx.Node, out: Tensor, rank: int | None) -> KernelWork:
    name, flops = operator_name(node), flops_of(node, rank)
    operands = [v for a in node.all_input_nodes if (v := _value(a, rank)) is not None]
    nbytes = float(_nbytes(out) + sum(map(_nbytes, operands)))
    if "attention" in name:
        q, keys = operands[0], operands[1]
        sizes = (q.shape[-2], keys.shape[-2], q.shape[-1], math.prod(q.shape[:-2]))
        return KernelWork("attention", flops, nbytes, out.element_size(), *sizes, name=name)
    if name.startswith("aten::conv") and out.ndim > 2:
        channels = out.shape[1]
        positions = out.numel() // max(1, channels)
        return KernelWork(
            "conv", flops, nbytes, out.element_size(), positions, channels,
            round(flops / 2 / max(1, out.numel())), name=name,
        )  # fmt: skip
    batch = 1 if name in ("aten::linear", "aten::addmm", "aten::mm") else math.prod(out.shape[:-2])
    n = out.shape[-1]
    m = out.numel() // max(1, n * batch)
    k = round(flops / 2 / max(1, out.numel()))
    return KernelWork("matmul", flops, nbytes, out.element_size(), m, n, k, batch, name=name)


def _is_kernel(node: fx.Node) -> bool:
    """Whether the result of an operator without products is written to memory."""
    if _reduces(node):
        return True
    readers = _readers(node)
    return len(readers) != 1 or any(
        r.op != "call_function" or flops_of(r) or flops_of(r, 0) or operator_name(r) in _UNCOUNTED for r in readers
    )


def _readers(node: fx.Node) -> list[fx.Node]:
    """The users of a value, through views."""
    found: list[fx.Node] = []
    for user in node.users:
        found += _readers(user) if is_view(user) else [user]
    return found


def _sources(node: fx.Node, rank: int | None) -> dict[fx.Node, int]:
    """What a kernel reads, in bytes by the kernel or input that wrote it: through views, and through what is fused."""
    found: dict[fx.Node, int] = {}
    waiting = [(source, _size(source, rank)) for source in node.all_input_nodes]
    seen: set[tuple[fx.Node, int]] = set()
    while waiting:
        source, part = waiting.pop()
        if (source, part) in seen or not _size(source, rank):
            continue
        seen.add((source, part))
        if source.op == "call_function" and is_view(source):
            waiting += ((below, min(part, _size(below, rank))) for below in source.all_input_nodes)
        elif _is_fused(source, rank):
            waiting += ((below, _size(below, rank)) for below in source.all_input_nodes)
        else:
            found[source] = min(found.get(source, 0) + part, _size(source, rank))
    return found


def _is_fused(node: fx.Node, rank: int | None) -> bool:
    """Whether a value is computed by the kernels that read it."""
    return node.op == "call_function" and not (
        flops_of(node, rank) or operator_name(node) in _UNCOUNTED or _is_kernel(node)
    )


def _reduces(node: fx.Node) -> bool:
    return any(word in operator_name(node) for word in _REDUCTIONS)


def _size(node: fx.Node, rank: int | None) -> int:
    value = _value(node, rank)
    return 0 if value is None else _nbytes(value)


def _value(node: Any, rank: int | None) -> Tensor | None:
    value = node.meta.get("val") if rank is None else node.meta.get("local", [None] * (rank + 1))[rank]
    return value if isinstance(value, Tensor) else None


def _nbytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
