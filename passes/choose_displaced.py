"""Mark the collectives that the steady phase displaces: they use the previous step's values and send this step's for
the next.

A mark is ``node.meta["displaced"]``. Passes of the user's own may change marks afterwards.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from districompile.ir.ops import ops
from districompile.unit import DISPLACEABLE, GROUPNORM_MODES, Stage, Unit


@dataclasses.dataclass(frozen=True)
class ChooseDisplaced:
    """Requires the local stage. ``kinds``: which kinds of site. Norm sites in the ``sync`` mode stay exact, as do
    reductions, the gathering of outputs, and operators computed on gathered inputs."""

    kinds: tuple[str, ...] = DISPLACEABLE
    groupnorm: str = GROUPNORM_MODES[0]

    name: ClassVar[str] = "choose-displaced"
    exact: ClassVar[bool] = False
    needs: ClassVar[Stage] = "local"
    gives: ClassVar[Stage] = "local"

    def run(self, unit: Unit) -> None:
        for node in unit.graph.nodes:
            if node.target is ops.fetch.default:
                kind = str(node.args[-1])
                node.meta["displaced"] = kind in self.kinds and not (kind == "norm" and self.groupnorm == "sync")
            elif node.target is ops.reduce.default:
                node.meta["displaced"] = False
