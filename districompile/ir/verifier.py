"""What must hold after every pass: small checks, one list a stage, each naming the node at fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor, fx

from districompile.errors import ConvertError
from districompile.ir.ops import ops
from districompile.ir.walk import per_ranks_of

if TYPE_CHECKING:
    from districompile.unit import Unit

Check = Callable[["Unit"], Iterator[str]]


def verify(unit: Unit) -> None:
    """Run the checks of the unit's stage; raises :class:`ConvertError` with the first finding of each that fails."""
    findings = [finding for check in CHECKS[unit.stage] for finding in _first(check(unit))]
    if findings:
        raise ConvertError("the graph is not valid: " + "; ".join(findings))


def _first(findings: Iterator[str]) -> list[str]:
    for finding in findings:
        return [finding]
    return []


def _well_formed(unit: Unit) -> Iterator[str]:
    seen: set[fx.Node] = set()
    for node in unit.graph.nodes:
        for source in node.all_input_nodes:
            if source not in seen:
                yield f"{node.name} uses {source.name} before it is computed"
        seen.add(node)
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            yield f"{node.name} is a {node.op} node"


def _has_values(unit: Unit) -> Iterator[str]:
    for node in unit.graph.nodes:
        if node.op != "output" and "val" not in node.meta:
            yield f"{node.name} has no fake value"


def _same_operands_dtype(unit: Unit) -> Iterator[str]:
    for node in unit.graph.nodes:
        if str(node.target) == "aten.cat.default":
            dtypes = {n.meta["val"].dtype for n in node.all_input_nodes}
            if unit.report.get("explicit_casts") and len(dtypes) > 1:
                yield f"{node.name} concatenates {', '.join(sorted(map(str, dtypes)))}"


def _one_result_per_rank(unit: Unit) -> Iterator[str]:
    ranks = unit.options.ranks
    for node in unit.graph.nodes:
        if node.op != "output" and len(node.meta.get("local", ())) != ranks:
            yield f"{node.name} has results for {len(node.meta.get('local', ()))} ranks, not {ranks}"


def _per_rank_lengths(unit: Unit) -> Iterator[str]:
    for node in unit.graph.nodes:
        for value in per_ranks_of(node):
            if len(value.values) != unit.options.ranks:
                yield f"{node.name} has an argument for {len(value.values)} ranks, not {unit.options.ranks}"


def _layouts_hold(unit: Unit) -> Iterator[str]:
    for node in unit.graph.nodes:
        layout = node.meta.get("layout")
        if layout is None:
            continue
        cut = layout.cut
        if cut is not None and (
            cut.bounds[0] < 0 or cut.bounds[-1] > cut.size or list(cut.bounds) != sorted(cut.bounds)
        ):
            yield f"{node.name}: bounds {cut.bounds} do not divide {cut.size} rows"
        for r, t in enumerate(node.meta["local"]):
            if isinstance(t, Tensor) and tuple(t.shape) != layout.local_shape(r):
                yield f"{node.name}: rank {r} holds {tuple(t.shape)}, its layout says {layout.local_shape(r)}"


def _collectives_have_plans(unit: Unit) -> Iterator[str]:
    for node in unit.graph.nodes:
        if node.target is ops.fetch.default:
            yield f"{node.name} was not lowered"
        if node.target in (ops.exchange.default, ops.reduce.default):
            plan = node.meta.get("collective")
            if plan is None:
                yield f"{node.name} has no transfer plan"
            elif plan.name != node.name or plan.source != node.args[0].name:
                yield f"{node.name}: its plan is for {plan.name} of {plan.source}"
        if node.target is ops.previous.default and unit.phase != "steady":
            yield f"{node.name} reads the call before, outside the steady phase"


def _outputs_are_whole(unit: Unit) -> Iterator[str]:
    for i, node in enumerate(unit.graph.output_node().args[0]):  # type: ignore[arg-type]
        shapes = {tuple(t.shape) for t in node.meta["local"]} if isinstance(node, fx.Node) else set()
        if len(shapes) > 1:
            yield f"output {i} differs by rank: {sorted(shapes)}"


_LOCAL: tuple[Check, ...] = (_well_formed, _one_result_per_rank, _per_rank_lengths, _layouts_hold, _outputs_are_whole)
CHECKS: dict[str, tuple[Check, ...]] = {
    "whole": (_well_formed, _has_values, _same_operands_dtype),
    "local": _LOCAL,
    "lowered": (*_LOCAL, _collectives_have_plans),
}
