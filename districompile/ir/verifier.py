# SPDX-License-Identifier: Apache-2.0
"""The graph verifier: checks that run after every pass. Each stage has a list of them; each names the node at fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor, fx

from districompile.errors import ConvertError
from districompile.ir.collectives import is_fetch, is_reduce
from districompile.ir.graph import per_ranks_of
from districompile.ir.meta import collective_of, layout_of, local_results
from districompile.ir.ops import ops

if TYPE_CHECKING:
    from districompile.ir.unit import CompilationUnit

Check = Callable[["CompilationUnit"], Iterator[str]]


def verify(unit: CompilationUnit) -> None:
    """Run the checks of the unit's stage. Raise :class:`ConvertError` with the first finding of each that fails."""
    findings = [finding for check in CHECKS[unit.stage] for finding in _first(check(unit))]
    if findings:
        raise ConvertError("the graph is not valid: " + "; ".join(findings))


def _first(findings: Iterator[str]) -> list[str]:
    for finding in findings:
        return [finding]
    return []


def _well_formed(unit: CompilationUnit) -> Iterator[str]:
    seen: set[fx.Node] = set()
    for node in unit.graph.nodes:
        for source in node.all_input_nodes:
            if source not in seen:
                yield f"{node.name} uses {source.name} before it is computed"
        seen.add(node)
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            yield f"{node.name} is a {node.op} node"


def _has_values(unit: CompilationUnit) -> Iterator[str]:
    for node in unit.graph.nodes:
        if node.op != "output" and "val" not in node.meta:
            yield f"{node.name} has no fake value"


def _same_operands_dtype(unit: CompilationUnit) -> Iterator[str]:
    for node in unit.graph.nodes:
        if str(node.target) == "aten.cat.default":
            dtypes = {n.meta["val"].dtype for n in node.all_input_nodes}
            if unit.explicit_casts and len(dtypes) > 1:
                yield f"{node.name} concatenates {', '.join(sorted(map(str, dtypes)))}"


def _one_result_per_rank(unit: CompilationUnit) -> Iterator[str]:
    ranks = unit.options.ranks
    for node in unit.graph.nodes:
        if node.op != "output" and len(local_results(node)) != ranks:
            yield f"{node.name} has results for {len(node.meta.get('local', ()))} ranks, not {ranks}"


def _per_rank_lengths(unit: CompilationUnit) -> Iterator[str]:
    for node in unit.graph.nodes:
        for value in per_ranks_of(node):
            if len(value.values) != unit.options.ranks:
                yield f"{node.name} has an argument for {len(value.values)} ranks, not {unit.options.ranks}"


def _layouts_hold(unit: CompilationUnit) -> Iterator[str]:
    for node in unit.graph.nodes:
        layout = layout_of(node)
        if layout is None:
            continue
        axis = layout.sharded_axis
        if axis is not None and (
            axis.bounds[0] < 0 or axis.bounds[-1] > axis.size or list(axis.bounds) != sorted(axis.bounds)
        ):
            yield f"{node.name}: bounds {axis.bounds} do not divide {axis.size} rows"
        for r, t in enumerate(local_results(node)):
            if isinstance(t, Tensor) and tuple(t.shape) != layout.local_shape(r):
                yield f"{node.name}: rank {r} holds {tuple(t.shape)}, its layout says {layout.local_shape(r)}"


def _collectives_have_plans(unit: CompilationUnit) -> Iterator[str]:
    for node in unit.graph.nodes:
        if is_fetch(node):
            yield f"{node.name} was not lowered"
        if node.target is ops.exchange.default or is_reduce(node):
            plan = collective_of(node)
            if plan is None:
                yield f"{node.name} has no transfer plan"
            elif plan.name != node.name or plan.source != node.all_input_nodes[0].name:
                yield f"{node.name}: its plan is for {plan.name} of {plan.source}"
        if node.target is ops.last_step.default and unit.phase in (None, "exact"):
            yield f"{node.name} reads the previous call, outside the displaced phase"


def _outputs_are_replicated(unit: CompilationUnit) -> Iterator[str]:
    for i, node in enumerate(unit.graph.output_node().args[0]):  # type: ignore[arg-type]
        shapes = {tuple(t.shape) for t in local_results(node)} if isinstance(node, fx.Node) else set()
        if len(shapes) > 1:
            yield f"output {i} differs by rank: {sorted(shapes)}"


_SPMD: tuple[Check, ...] = (
    _well_formed,
    _one_result_per_rank,
    _per_rank_lengths,
    _layouts_hold,
    _outputs_are_replicated,
)
CHECKS: dict[str, tuple[Check, ...]] = {
    "global": (_well_formed, _has_values, _same_operands_dtype),
    "spmd": _SPMD,
    "lowered": (*_SPMD, _collectives_have_plans),
}
