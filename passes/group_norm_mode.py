# SPDX-License-Identifier: Apache-2.0
"""Compute the statistics of displaced group norms in the displaced phase.

Before (``forecast``):

    %group_norm_moments_announced = dc.announce(%group_norm_moments)
    %group_norm_fetch_halo = dc.exchange(%group_norm_moments_announced, ...)
    %group_norm_fetch_rows = dc.assemble(%group_norm_fetch_halo, %group_norm_moments_announced, ...)
    %merge_moments_default = dc.merge_moments(%group_norm_fetch_rows, [32.0, 32.0])

After (``forecast``):

    %group_norm_moments_announced_last_step = input()
    %group_norm_moments_announced = dc.forecast_moments(%group_norm_moments, ...)
    %group_norm_fetch_halo = dc.exchange(%group_norm_moments_announced, ...)
    %group_norm_fetch_rows = dc.assemble(%group_norm_fetch_halo, %group_norm_moments_announced_last_step, ...)
    %merge_moments_default = dc.merge_forecasts(%group_norm_fetch_rows, %group_norm_moments, [32.0, 32.0])

The statistics of the other ranks are those that they sent in the previous step.

- ``forecast`` (the default): each rank sends a forecast of its next statistics: those of this step plus the last
  change. The receiver corrects all others by half of its own forecast's error, takes its own fresh statistics, and
  merges them (docs/decisions/0037). The graph must have gone through ``announce-statistics``.
- ``corrected_async`` (DistriFusion, arXiv 2402.19481, section 4.2): the previous step's statistics of *all* ranks, plus
  this rank's own change since then.
- ``stale``: the previous step's statistics of the others and this rank's own of this step. The graph does not change.
- ``local``: this rank's own statistics alone; nothing is exchanged.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from districompile.ir.graph import eliminate_dead_code, insert_recall
from districompile.ir.meta import is_carried, is_displaced, recalled_value
from districompile.ir.ops import ops
from districompile.ir.unit import GROUPNORM_MODES, CompilationUnit, Stage
from districompile.sharding.builder import ShardingBuilder


@dataclasses.dataclass(frozen=True)
class GroupNormMode:
    """The pass ``group-norm-mode``: it changes the lowered graph of the displaced phase."""

    mode: str = GROUPNORM_MODES[0]

    name: ClassVar[str] = "group-norm-mode"
    exact: ClassVar[bool] = False
    needs: ClassVar[Stage] = "lowered"
    gives: ClassVar[Stage] = "lowered"

    def run(self, unit: CompilationUnit) -> None:
        if unit.phase != "displaced":
            return
        builder = ShardingBuilder.of(unit)
        for merge in [n for n in unit.graph.nodes if n.target is ops.merge_moments.default]:
            gathered = merge.all_input_nodes[0]
            if gathered.target is not ops.assemble.default or not is_displaced(gathered.all_input_nodes[0]):
                continue
            if self.mode == "forecast":
                _forecast(unit.graph, merge, gathered)
            elif self.mode == "corrected_async":
                _correct(builder, merge, gathered)
            elif self.mode == "local":
                merge.args = (_sent(gathered), [1.0])
                builder.set_results(merge)
        eliminate_dead_code(unit.graph)


def _sent(gathered: fx.Node) -> fx.Node:
    """Return the rank's own statistics, which ``assemble`` puts among the received ones."""
    _, sent, *_ = gathered.args
    assert isinstance(sent, fx.Node)
    return sent


def _forecast(graph: fx.Graph, merge: fx.Node, gathered: fx.Node) -> None:
    """Replace ``announce`` by ``forecast_moments``, once for all norms of one value."""
    sent = _sent(gathered)
    if sent.target is ops.announce.default:
        before = insert_recall(graph, sent, f"{sent.name}_last_step", carried=True)
        sent.target, sent.args = ops.forecast_moments.default, (sent.args[0], before)
    elif is_carried(sent):  # another norm of the same value was rewritten first
        sent = next(n for n in graph.nodes if n.name == recalled_value(sent))
    if sent.target is not ops.forecast_moments.default:
        return  # a user's pass displaced it after announce-statistics: the previous step's statistics are used
    moments, last_step = sent.all_input_nodes
    gathered.replace_input_with(sent, last_step)
    merge.target, merge.args = ops.merge_forecasts.default, (gathered, moments, merge.args[1])


def _correct(builder: ShardingBuilder, merge: fx.Node, gathered: fx.Node) -> None:
    fresh = _sent(gathered)
    users = list(merge.users)
    with builder.before(gathered):
        builder.target = merge
        stale = builder.emit(ops.last_step.default, fresh, name=f"{fresh.name}_last_step")
    gathered.replace_input_with(fresh, stale)
    with builder.after(merge):
        corrected = builder.emit(ops.correct_moments.default, merge, stale, fresh, name=f"{merge.name}_corrected")
    for user in users:
        user.replace_input_with(merge, corrected)
