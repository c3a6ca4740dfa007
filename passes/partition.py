# SPDX-License-Identifier: Apache-2.0
"""Partition the global graph: one SPMD graph of all ranks, with ``fetch`` and ``reduce`` where rows are missing.

Before:

    %conv2d = aten.conv2d(%silu, @conv.weight, None, [1, 1], [1, 1])

After:

    %conv2d_fetch = dc.fetch(%silu, dim=2, want=[-1..5, 3..9], edge=zeros)
    %conv2d = aten.conv2d(%conv2d_fetch, @conv.weight, None, [1, 1], [0, 1], ...)
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from districompile.errors import ConvertError
from districompile.ir.graph import eliminate_dead_code
from districompile.ir.layout import scale_bounds
from districompile.ir.meta import layout_of
from districompile.ir.report_builder import Flops
from districompile.ir.unit import CompilationUnit, Stage
from districompile.sharding.propagate import propagate


@dataclasses.dataclass(frozen=True)
class Partition:
    """The pass ``partition``: it requires ``unit.shardings``.

    With the option ``strict``, an operator that no rule shards is an error.
    """

    name: ClassVar[str] = "partition"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "global"
    gives: ClassVar[Stage] = "spmd"

    def run(self, unit: CompilationUnit) -> None:
        ranks = unit.options.ranks
        rows = unit.rows if ranks > 1 else {}
        result = unit.partitioned or propagate(
            unit.graph, rows, unit.cut_points, unit.captured.fake_mode, unit.shardings if ranks > 1 else {}, unit.tokens
        )
        unit.partitioned = None
        eliminate_dead_code(result.graph)
        if ranks > 1 and rows and not any(map(_is_sharded, result.graph.nodes)):
            raise ConvertError(_nothing_cut(result.fallbacks[0].reason if result.fallbacks else "no rule applies"))
        unit.graph = result.graph
        unit.report.fallbacks = result.fallbacks
        unit.report.replicated = result.replicated
        unit.report.flops = Flops(result.flops_cut, result.flops_whole)
        unit.report.rows = {str(n): scale_bounds(unit.cut_points, n) for n in unit.row_counts}
        if unit.options.strict and result.fallbacks:
            raise ConvertError(_strict(unit))


def _is_sharded(node: fx.Node) -> bool:
    layout = layout_of(node)
    return layout is not None and layout.sharded_axis is not None


def _nothing_cut(reason: str) -> str:
    return f"nothing of this module can be cut ({reason}): check which input and dim rows= names"


def _strict(unit: CompilationUnit) -> str:
    first, *more = unit.report.fallbacks
    rest = f" and {len(more)} more" if more else ""
    return (
        f"strict: {first.op} ({first.node}, {first.source}) would be computed whole on every rank: "
        f"{first.reason}{rest}; write a rule for it (docs/extending/rule.md) or convert without strict"
    )
