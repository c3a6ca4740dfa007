"""Cut: replace the whole graph by the local graph of all ranks, with ``fetch`` and ``reduce`` where rows are missing.

   %y = aten.conv2d(%x, @w, None, [1, 1], [1, 1])
-> %y_fetch = dc.fetch(%x, 2, [0, 8, 16], [-1, 7], [9, 17], 'zeros', ...) : f32[1, 4, 10, 8]
   %y = aten.conv2d(%y_fetch, @w, None, [1, 1], [0, 1]) : f32[1, 4, 8, 8] @ [1, 4, 16*, 8]
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from districompile.errors import ConvertError
from districompile.ir.layout import scale_bounds
from districompile.propagate import propagate
from districompile.unit import Stage, Unit


@dataclasses.dataclass(frozen=True)
class Localise:
    """Requires an annotated unit. Gives the local stage. With ``strict`` an operator that no rule cuts is an error."""

    name: ClassVar[str] = "localise"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "whole"
    gives: ClassVar[Stage] = "local"

    def run(self, unit: Unit) -> None:
        ranks = unit.options.ranks
        rows = unit.rows if ranks > 1 else {}
        result = propagate(
            unit.graph, rows, unit.fractions, unit.captured.fake_mode, unit.annotation if ranks > 1 else {}
        )
        # The inputs are part of the interface: keep them even where nothing reads them
        result.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        if ranks > 1 and rows and not any("layout" in n.meta and n.meta["layout"].cut for n in result.graph.nodes):
            raise ConvertError(_nothing_cut(result.fallbacks[0].reason if result.fallbacks else "no rule applies"))
        unit.graph = result.graph
        unit.report["fallbacks"] = [dataclasses.asdict(f) for f in result.fallbacks]
        unit.report["replicated"] = result.replicated
        unit.report["flops"] = {"cut": result.flops_cut, "whole": result.flops_whole}
        unit.report["rows"] = {str(n): scale_bounds(unit.fractions, n) for n in unit.row_counts}
        if unit.options.strict and result.fallbacks:
            raise ConvertError(_strict(unit))


def _nothing_cut(reason: str) -> str:
    return f"nothing of this module can be cut ({reason}): check which input and dim rows= names"


def _strict(unit: Unit) -> str:
    first, *more = unit.report["fallbacks"]
    rest = f" and {len(more)} more" if more else ""
    return (
        f"strict: {first['op']} ({first['node']}, {first['source']}) would be computed whole on every rank: "
        f"{first['reason']}{rest}; write a rule for it (docs/writing-a-rule.md) or convert without strict"
    )
