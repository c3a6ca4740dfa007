# SPDX-License-Identifier: Apache-2.0
"""Compute what depends on the conditioning alone in the exact phase, and reuse it in displaced steps.

Before:

    %linear = aten.linear(%text, @key.weight)
    %split = aten.split(%linear, 4, -1)
    %getitem = %split[0]

After:

    %getitem_kept = input()
    %scaled_dot_product_attention = aten.scaled_dot_product_attention(%permute_default, %getitem_kept, ...)

The text, the size and the class of an image are the same in all steps, and so are the keys and values that all
cross-attentions compute from the text. (DistriFusion keeps those, too.) The runtime compares these inputs with those of
the last exact call, and makes a call exact where they have changed. Results are therefore right for any caller.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import fx

from districompile.ir.graph import eliminate_dead_code, insert_recall
from districompile.ir.ops import ops
from districompile.ir.spec import names_timestep
from districompile.ir.unit import CompilationUnit, Stage

aten = torch.ops.aten
_VIEWS = {
    aten.slice.Tensor, aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default,
    aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.select.int,
    aten.unflatten.int, aten.flatten.using_ints,
}  # fmt: skip
_MOVES = {ops.exchange.default, ops.reduce.default, ops.last_step.default}


@dataclasses.dataclass(frozen=True)
class CacheConditioning:
    """The pass ``cache-conditioning``: it changes the lowered graph of the displaced phase.

    ``report.conditioning`` names the inputs that must stay the same.
    """

    name: ClassVar[str] = "cache-conditioning"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "lowered"
    gives: ClassVar[Stage] = "lowered"

    def run(self, unit: CompilationUnit) -> None:
        if unit.phase != "displaced":
            return
        inputs = unit.captured.inputs
        named = unit.options.timestep
        if not any(i.rows is None and names_timestep(i.path, named) for i in inputs):
            return  # without a timestep every call is exact
        fixed = {i.value: i.path for i in inputs if i.rows is None and not names_timestep(i.path, named)}
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
            source.replace_all_uses_with(insert_recall(unit.graph, source, f"{source.name}_kept"))
        eliminate_dead_code(unit.graph)
        unit.report.conditioning = tuple(sorted(set().union(*kept.values())))


def _reads(graph: fx.Graph, fixed: dict[str, str]) -> dict[fx.Node, frozenset[str] | None]:
    """Return which of the ``fixed`` inputs each value is computed from; None for a value that changes at each step.

    A value of weights alone has the empty set.
    """
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
