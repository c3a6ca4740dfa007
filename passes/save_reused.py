# SPDX-License-Identifier: Apache-2.0
"""Compute what the reused phase reads of a full step, in the exact and the displaced phase.

Before:

    %add_1 = aten.add(%add, %conv2d_1)

After:

    %add_1 = aten.add(%add, %conv2d_1)
    %add_1_change = aten.sub(%add_1, %add)

Values that are kept as they are need no node: the schedule saves them. A value of a residual stream is kept as its
change since the stream's value before the kept blocks.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from districompile.errors import ConvertError
from districompile.ir.unit import CompilationUnit, Stage
from districompile.passes.reuse_deep import change_name
from districompile.sharding.builder import ShardingBuilder

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class SaveReused:
    """The pass ``save-reused``: it runs after ``reuse-deep``, which names the values in ``unit.report.reuse``."""

    name: ClassVar[str] = "save-reused"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "lowered"
    gives: ClassVar[Stage] = "lowered"

    def run(self, unit: CompilationUnit) -> None:
        if unit.report.reuse is None or unit.phase == "reused":
            return
        nodes = {n.name: n for n in unit.graph.nodes}
        builder = ShardingBuilder.of(unit)
        for kept in unit.report.reuse.kept:
            gone = next((n for n in (kept.value, kept.base) if n is not None and n not in nodes), None)
            if gone is not None:
                raise ConvertError(
                    f"reuse: the {unit.phase} phase does not compute {gone} ({kept.module_path}), which reused steps "
                    "keep: leave out the pass that removes it, or convert without reuse"
                )
            if kept.base is not None:
                value = nodes[kept.value]
                with builder.after(value):
                    builder.emit(aten.sub.Tensor, value, nodes[kept.base], name=change_name(kept.value))
