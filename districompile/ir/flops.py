# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a node, for shares and balance.

Convolutions, matrix products and attention are counted. All other operators count 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def flops_of(node: fx.Node, rank: int | None = None) -> float:
    """Return the FLOPs of a node: in the global graph (``rank`` None), or on one rank in the SPMD graph."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return 0.0
    out = _tensor(node, rank)
    if out is None:
        return 0.0
    name = target._schema.name
    if name in ("aten::linear", "districompile::fp8_linear"):
        return 2.0 * out.numel() * _arg(node, 1, rank).shape[1]
    if name.startswith(("aten::conv", "districompile::fp8_conv")) and out.ndim > 2:
        per_output = math.prod(_arg(node, 1, rank).shape[1:])
        source = _arg(node, 0, rank) if "transpose" in name else out
        return 2.0 * source.numel() * per_output
    if name == "aten::scaled_dot_product_attention":
        q, k, v = (_arg(node, i, rank) for i in range(3))
        return 2.0 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])
    if name in ("aten::matmul", "aten::bmm", "aten::mm"):
        return 2.0 * out.numel() * _arg(node, 0, rank).shape[-1]
    if name in ("aten::baddbmm", "aten::addmm"):
        return 2.0 * out.numel() * _arg(node, 1, rank).shape[-1]
    if name == "aten::einsum":
        return _einsum_flops(node, rank)
    return 0.0


def _einsum_flops(node: fx.Node, rank: int | None) -> float:
    equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    sizes: dict[str | int, int] = {}
    for term, operand in zip(equation.split("->")[0].split(","), operands, strict=True):
        tensor = _tensor(operand, rank)
        if tensor is not None:
            before, dots, after = term.partition("...")
            hidden = range(len(before) + len(after) - tensor.ndim, 0) if dots else ()  # counted from the last
            for letter, size in zip((*before, *hidden, *after), tensor.shape, strict=True):
                sizes[letter] = max(size, sizes.get(letter, 1))
    return 2.0 * math.prod(sizes.values())


def _tensor(node: Any, rank: int | None) -> torch.Tensor | None:
    if not isinstance(node, fx.Node):
        return None
    value = node.meta.get("val") if rank is None else node.meta.get("local", [None] * (rank + 1))[rank]
    return value if isinstance(value, torch.Tensor) else None


def _arg(node: fx.Node, position: int, rank: int | None) -> torch.Tensor:
    value = _tensor(node.args[position], rank)
    assert value is not None, f"{node.name}: argument {position} is no tensor"
    return value
