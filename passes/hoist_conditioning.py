"""What depends on the conditioning alone is computed in the exact phase, and remembered in the displaced one.

The text, the size and the class of an image stay as they are from step to step, and so do the keys and values that all
cross-attentions make of the text. (DistriFusion keeps those, too.) The runtime compares these inputs with those of the
last exact call, and makes a call exact where they have changed: results stay right, whatever a caller does.

    %kv = aten.linear(%text, @w)             %kv_kept : a state that the exact phase left
    %k = aten.slice(%kv, 2, 0, 640)    ->    %k = aten.slice(%kv_kept, 2, 0, 640)
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import fx

from districompile.ir.ops import ops
from districompile.ir.plan import names_timestep
from districompile.unit import Stage, Unit

aten = torch.ops.aten
_VIEWS = {
    aten.slice.Tensor, aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default,
    aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.select.int,
    aten.unflatten.int, aten.flatten.using_ints,
}  # fmt: skip
_MOVES = {ops.exchange.default, ops.reduce.default, ops.previous.default}


@dataclasses.dataclass(frozen=True)
class HoistConditioning:
    """Requires the lowered graph of the steady phase; ``report["conditioning"]`` names the inputs that must stay."""

    name: ClassVar[str] = "hoist-conditioning"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "lowered"
    gives: ClassVar[Stage] = "lowered"

    def run(self, unit: Unit) -> None:
        inputs = unit.captured.inputs
        if not any(i.rows is None and names_timestep(i.path) for i in inputs):
            return  # every call is exact then
        fixed = {i.value: i.path for i in inputs if i.rows is None and not names_timestep(i.path)}
        reads = _reads(unit.graph, fixed)
        kept: dict[fx.Node, frozenset[str]] = {}
        for node in unit.graph.nodes:
            found = reads.get(node)
            if not found or node.op != "call_function" or all(reads.get(u) is not None for u in node.users):
                continue
            source = node
            while source.target in _VIEWS:
                source = source.all_input_nodes[0]
            if source.op == "call_function" and all(u.op != "output" for u in source.users):
                kept[source] = reads[source] or frozenset()
        for source in kept:
            _recall(unit.graph, source)
        unit.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        unit.report["conditioning"] = sorted(set().union(*kept.values()))


def _reads(graph: fx.Graph, fixed: dict[str, str]) -> dict[fx.Node, frozenset[str] | None]:
    """Which of the ``fixed`` inputs each value is made of, besides weights; None for those that change."""
    reads: dict[fx.Node, frozenset[str] | None] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            reads[node] = frozenset({fixed[node.name]}) if node.name in fixed else None
        elif node.op == "output" or node.target in _MOVES:
            reads[node] = None
        else:
            found: frozenset[str] | None = frozenset()
            for operand in node.all_input_nodes:
                more = reads[operand]
                found = None if found is None or more is None else found | more
            reads[node] = found
    return reads


def _recall(graph: fx.Graph, source: fx.Node) -> None:
    """Read ``source`` from what an earlier call kept."""
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        recalled = graph.placeholder(f"{source.name}_kept")
    recalled.meta = {k: v for k, v in source.meta.items() if k in ("val", "local", "layout", "site")}
    recalled.meta["recalls"] = source.name
    source.replace_all_uses_with(recalled)
