# SPDX-License-Identifier: Apache-2.0
"""Choose the collectives that the displaced phase displaces.

Before:

    %conv2d_fetch = dc.fetch(%silu, ...)

After:

    %conv2d_fetch = dc.fetch(%silu, ...)

A displaced collective gives the previous step's values, and sends this step's for the next one. The choice is recorded
on the node (:func:`~districompile.ir.meta.is_displaced`); the graph stays the same. A user's pass may change it
afterwards.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from districompile.ir.collectives import FetchArgs, is_fetch, is_reduce
from districompile.ir.meta import set_displaced
from districompile.ir.unit import DISPLACEABLE, GROUPNORM_MODES, CompilationUnit, Stage


@dataclasses.dataclass(frozen=True)
class ChooseDisplaced:
    """The pass ``choose-displaced``: it displaces fetches of the purposes in ``purposes``.

    Statistics of norms stay exact in the ``sync`` mode. So do reductions, the gathering of outputs, and operators
    computed on gathered inputs.
    """

    purposes: tuple[str, ...] = DISPLACEABLE
    groupnorm: str = GROUPNORM_MODES[0]

    name: ClassVar[str] = "choose-displaced"
    exact: ClassVar[bool] = False
    needs: ClassVar[Stage] = "spmd"
    gives: ClassVar[Stage] = "spmd"

    def run(self, unit: CompilationUnit) -> None:
        for node in unit.graph.nodes:
            if is_fetch(node):
                purpose = FetchArgs.of(node).purpose
                set_displaced(node, purpose in self.purposes and not (purpose == "norm" and self.groupnorm == "sync"))
            elif is_reduce(node):
                set_displaced(node, False)
