"""Compute equal things once: every residual block of a UNet applies its activation to the same time embedding.

%a = aten.silu(%t)                     %a = aten.silu(%t)
%b = aten.linear(%a, @w1)         ->   %b = aten.linear(%a, @w1)
%c = aten.silu(%t)                     %d = aten.linear(%a, @w2)
%d = aten.linear(%c, @w2)
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, cast

import torch
from torch import fx

from districompile.unit import Stage, Unit


@dataclasses.dataclass(frozen=True)
class ShareSubexpressions:
    """Requires a functional graph. Gives the same graph without repeated operators; random ones are left alone."""

    name: ClassVar[str] = "share-subexpressions"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "whole"
    gives: ClassVar[Stage] = "whole"

    def run(self, unit: Unit) -> None:
        first: dict[Any, fx.Node] = {}
        for node in list(unit.graph.nodes):
            key = _key(node)
            if key is None:
                continue
            twin = first.setdefault(key, node)
            if twin is not node:
                node.replace_all_uses_with(twin)
                unit.graph.erase_node(node)


def _key(node: fx.Node) -> Any:
    """What a node computes, or None where two of them may differ."""
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
    """A node among printed arguments: names are unique in a graph."""

    def __init__(self, node: fx.Node) -> None:
        self._name = node.name

    def __repr__(self) -> str:
        return f"%{self._name}"
