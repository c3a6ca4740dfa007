# SPDX-License-Identifier: Apache-2.0
"""Eliminate common subexpressions.

Before:

    %silu = aten.silu(%temb)
    %linear = aten.linear(%silu, @first.weight)
    %silu_1 = aten.silu(%temb)
    %linear_1 = aten.linear(%silu_1, @second.weight)

After:

    %silu = aten.silu(%temb)
    %linear = aten.linear(%silu, @first.weight)
    %linear_1 = aten.linear(%silu, @second.weight)

Every residual block of a UNet applies its activation to the same time embedding, for example.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, cast

import torch
from torch import fx

from districompile.ir.unit import CompilationUnit, Stage


@dataclasses.dataclass(frozen=True)
class EliminateCommonSubexpressions:
    """The pass ``cse``: it requires a functional graph, and leaves random operators alone."""

    name: ClassVar[str] = "cse"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "global"
    gives: ClassVar[Stage] = "global"

    def run(self, unit: CompilationUnit) -> None:
        first: dict[Any, fx.Node] = {}
        for node in list(unit.graph.nodes):
            key = _key(node)
            if key is None:
                continue
            same = first.setdefault(key, node)
            if same is not node:
                node.replace_all_uses_with(same)
                unit.graph.erase_node(node)


def _key(node: fx.Node) -> Any:
    """Return a key of what a node computes, or None where two nodes alike may have different results."""
    if node.op == "get_attr":
        return node.op, node.target
    if node.op != "call_function":
        return None
    if isinstance(node.target, torch._ops.OpOverload) and (
        torch.Tag.nondeterministic_seeded in node.target.tags or node.target._schema.is_mutable
    ):
        return None
    return node.op, node.target, repr(fx.map_arg((node.args, node.kwargs), lambda n: cast(Any, _Name(n))))


class _Name:
    """A stand-in for a node that prints as its name, which is unique in a graph."""

    def __init__(self, node: fx.Node) -> None:
        self._name = node.name

    def __repr__(self) -> str:
        return f"%{self._name}"
