# SPDX-License-Identifier: Apache-2.0
"""Insert a node of its own for the norm statistics that a rank sends.

Before:

    %group_norm_moments = dc.moments(%slice_tensor, 2)
    %group_norm_fetch = dc.fetch(%group_norm_moments, ...)

After:

    %group_norm_moments = dc.moments(%slice_tensor, 2)
    %group_norm_moments_announced = dc.announce(%group_norm_moments)
    %group_norm_fetch = dc.fetch(%group_norm_moments_announced, ...)

The exact phase sends the statistics themselves. The displaced phase sends a forecast of the next step's instead (see
``group-norm-mode``). Both phases must use one name for what they send. This pass therefore runs while they share one
graph.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from districompile.ir.collectives import FetchArgs, fetches
from districompile.ir.layout import Factor
from districompile.ir.meta import is_displaced, layout_of, set_layout
from districompile.ir.ops import ops
from districompile.ir.unit import CompilationUnit, Stage
from districompile.sharding.builder import ShardingBuilder


@dataclasses.dataclass(frozen=True)
class AnnounceStatistics:
    """The pass ``announce-statistics``: it runs after ``choose-displaced``.

    It changes only displaced fetches of ``moments``.
    """

    name: ClassVar[str] = "announce-statistics"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "spmd"
    gives: ClassVar[Stage] = "spmd"

    def run(self, unit: CompilationUnit) -> None:
        builder = ShardingBuilder.of(unit)
        for fetch in filter(is_displaced, fetches(unit.graph)):
            moments = FetchArgs.of(fetch).x
            layout = layout_of(moments)
            if moments.target is not ops.moments.default or layout is None:
                continue
            with builder.before(fetch):
                announced = builder.emit(ops.announce.default, moments, name=f"{moments.name}_announced")
            set_layout(announced, layout.with_dim(1, (Factor(4),)))
            fetch.replace_input_with(moments, announced)
