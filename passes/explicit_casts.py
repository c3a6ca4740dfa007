"""Make every implicit type promotion an explicit cast: engines are strongly typed.

%y = aten.cat([%half, %float], -1)     ->     %half_f32 = aten._to_copy(%half, dtype=f32)
                                              %y = aten.cat([%half_f32, %float], -1)
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, fx

from districompile.ir.walk import of_type
from districompile.registry import is_pointwise
from districompile.unit import Stage, Unit

aten = torch.ops.aten

_COMPARE = {"eq", "ne", "lt", "le", "gt", "ge"}
_KEEP = {"where", "masked_fill", "_to_copy", "bitwise_not", "logical_not", "isnan", "isinf", "copy"}


@dataclasses.dataclass(frozen=True)
class ExplicitCasts:
    """Requires fake values on all nodes. Gives a graph in which operands of pointwise operators, ``cat`` and
    ``stack`` agree in dtype."""

    name: ClassVar[str] = "explicit-casts"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "whole"
    gives: ClassVar[Stage] = "whole"

    def run(self, unit: Unit) -> None:
        for node in list(unit.graph.nodes):
            if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
                continue
            name = node.target._schema.name.removeprefix("aten::")
            if name in ("cat", "concat", "stack") or (is_pointwise(node.target) and name not in _KEEP):
                _promote(unit.graph, node, name)
            elif name == "where":
                _promote(unit.graph, node, name, skip=1)
        unit.report["explicit_casts"] = True


def _promote(graph: fx.Graph, node: fx.Node, name: str, skip: int = 0) -> None:
    operands = [n for n in of_type(node.args[skip:], fx.Node) if isinstance(n.meta.get("val"), Tensor)]
    dtypes = {n.meta["val"].dtype for n in operands}
    if len(dtypes) < 2:
        return
    target = node.meta["val"].dtype
    if name in _COMPARE:
        target = operands[0].meta["val"].dtype
        for n in operands[1:]:
            target = torch.result_type(torch.empty((), dtype=target), torch.empty((), dtype=n.meta["val"].dtype))
    casts: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(node):
        for n in operands:
            if n.meta["val"].dtype != target and n not in casts:
                casts[n] = _cast(graph, node, n, target)
    keep = node.args[:skip]
    node.args = (*keep, *fx.map_arg(node.args[skip:], lambda n: casts.get(n, n)))


def _cast(graph: fx.Graph, user: fx.Node, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    cast = graph.call_function(aten._to_copy.default, (x,), {"dtype": dtype})
    value = x.meta["val"]
    with value.fake_mode:
        cast.meta["val"] = value.to(dtype)
    for key in ("stack_trace", "site", "nn_module_stack"):
        if key in user.meta:
            cast.meta[key] = user.meta[key]
    return cast
