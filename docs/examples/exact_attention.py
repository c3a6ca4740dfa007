"""A made-up pass: keep the attention of chosen layers exact, displace everything else as before."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from districompile.ir.ops import ops
from districompile.unit import Stage, Unit


@dataclasses.dataclass(frozen=True)
class ExactAttention:
    """Takes the displacement mark off attention sites whose module path contains ``layer``."""

    layer: str = ""

    name: ClassVar[str] = "exact-attention"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "local"
    gives: ClassVar[Stage] = "local"

    def run(self, unit: Unit) -> None:
        for node in unit.graph.nodes:
            if node.target is ops.fetch.default:
                *_, site, kind = node.args
                if kind == "attention" and self.layer in str(site):
                    node.meta["displaced"] = False
