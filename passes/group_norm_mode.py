"""How displaced group norms get their statistics in the steady phase.

At a displaced norm site the statistics of the other ranks are the previous step's. ``stale`` merges them with this
rank's own of this step, which is what the graph does as it stands. ``corrected_async`` (DistriFusion) merges the
previous step's of
*all* ranks and adds this rank's own change since then. ``local`` uses this rank's own alone and exchanges nothing.

    %g = dc.place(%halo, %m, 0, ...)        %old = dc.previous(%m)
    %s = dc.merge_moments(%g, [...])    ->  %g = dc.place(%halo, %old, 0, ...)
                                            %s = dc.merge_moments(%g, [...])
                                            %c = dc.correct_moments(%s, %old, %m)
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from districompile.cutter import Cutter
from districompile.ir.ops import ops
from districompile.unit import GROUPNORM_MODES, Stage, Unit


@dataclasses.dataclass(frozen=True)
class GroupNormMode:
    """Requires the lowered graph of the steady phase."""

    mode: str = GROUPNORM_MODES[0]

    name: ClassVar[str] = "group-norm-mode"
    exact: ClassVar[bool] = False
    needs: ClassVar[Stage] = "lowered"
    gives: ClassVar[Stage] = "lowered"

    def run(self, unit: Unit) -> None:
        emitter = Cutter(unit.graph, unit.fractions, unit.captured.fake_mode)
        for merge in [n for n in unit.graph.nodes if n.target is ops.merge_moments.default]:
            gathered = merge.args[0]
            exchange = gathered.args[0]
            if gathered.target is not ops.place.default or not exchange.meta.get("displaced"):
                continue
            emitter.target = merge
            if self.mode == "corrected_async":
                _correct(unit.graph, emitter, merge, gathered)
            elif self.mode == "local":
                fresh = gathered.args[1]
                merge.args = (fresh, [1.0])
                merge.meta["local"] = emitter.local_results(merge.target, merge.args, {})
        unit.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))


def _correct(graph: fx.Graph, emitter: Cutter, merge: fx.Node, gathered: fx.Node) -> None:
    fresh = gathered.args[1]
    assert isinstance(fresh, fx.Node)
    with graph.inserting_before(gathered):
        stale = emitter.emit(ops.previous.default, fresh, name=f"{fresh.name}_previous")
    gathered.replace_input_with(fresh, stale)
    users = list(merge.users)
    with graph.inserting_after(merge):
        corrected = emitter.emit(ops.correct_moments.default, merge, stale, fresh, name=f"{merge.name}_corrected")
    for user in users:
        user.replace_input_with(merge, corrected)
