"""How displaced group norms get their statistics in the displaced phase.

At a displaced norm the statistics of the other ranks are those that they sent during the previous step.

- ``forecast`` (the default): each rank sends a forecast of its next statistics, its own of this step moved on by what
  the last step changed. The receiver corrects all others by half of what its own forecast missed, puts its own fresh
  statistics in, and merges (docs/decisions/0037).
- ``corrected_async`` (DistriFusion, arXiv 2402.19481, section 4.2): the previous step's of *all* ranks, plus this
  rank's own whole change since then.
- ``stale``: the previous step's of the others and this rank's own of this step. This is the graph as it stands.
- ``local``: this rank's own alone; nothing is exchanged.

``forecast``, on a graph that ``announce-statistics`` prepared:

    %s = dc.announce(%m)                     %s = dc.forecast_moments(%m, %s_previous)
    %g = dc.place(%halo, %s, 0, ...)     ->  %g = dc.place(%halo, %s_previous, 0, ...)
    %t = dc.merge_moments(%g, [...])         %t = dc.merge_forecasts(%g, %m, [...])

``corrected_async``:

    %g = dc.place(%halo, %m, 0, ...)         %g = dc.place(%halo, %m_previous, 0, ...)
    %t = dc.merge_moments(%g, [...])     ->  %t = dc.merge_moments(%g, [...])
                                             %c = dc.correct_moments(%t, %m_previous, %m)
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import fx

from districompile.cutter import Cutter
from districompile.ir.ops import ops
from districompile.unit import GROUPNORM_MODES, Stage, Unit


@dataclasses.dataclass(frozen=True)
class GroupNormMode:
    """Requires the lowered graph of the displaced phase."""

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
            if self.mode == "forecast":
                _forecast(unit.graph, merge, gathered)
            elif self.mode == "corrected_async":
                _correct(unit.graph, emitter, merge, gathered)
            elif self.mode == "local":
                fresh = gathered.args[1]
                merge.args = (fresh, [1.0])
                merge.meta["local"] = emitter.local_results(merge.target, merge.args, {})
        unit.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))


def _forecast(graph: fx.Graph, merge: fx.Node, gathered: fx.Node) -> None:
    """Norms of one value may share what is announced, which is replaced once."""
    sent: Any = gathered.args[1]
    if sent.target is ops.announce.default:
        before = _carried(graph, sent)
        sent.target, sent.args = ops.forecast_moments.default, (sent.args[0], before)
    elif sent.meta.get("carried"):  # another norm read the same
        sent = next(n for n in graph.nodes if n.name == sent.meta["recalls"])
    if sent.target is not ops.forecast_moments.default:
        return  # a pass of the user's displaced it later: the previous step's statistics, as they stand
    gathered.replace_input_with(sent, sent.args[1])
    merge.target, merge.args = ops.merge_forecasts.default, (gathered, sent.args[0], merge.args[1])


def _carried(graph: fx.Graph, sent: fx.Node) -> fx.Node:
    """What the call before announced: a state that each call leaves for the next one."""
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        state = graph.placeholder(f"{sent.name}_previous")
    state.meta = {k: v for k, v in sent.meta.items() if k in ("val", "local", "layout", "site")}
    state.meta |= {"recalls": sent.name, "carried": True}
    return state


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
