# SPDX-License-Identifier: Apache-2.0
"""Take what deep levels compute from the last full step, in the reused phase.

Before:

    %conv2d_1 = aten.conv2d(%conv2d, @down.weight, None, [2, 2], ...)
    %silu = aten.silu(%conv2d_1)
    %upsample_nearest2d = aten.upsample_nearest2d.vec(%silu, [4, 4], None)
    %conv2d_2 = aten.conv2d(%upsample_nearest2d, @up.weight, ...)
    %cat = aten.cat([%conv2d_2, %conv2d], 1)

After:

    %conv2d_2_kept = input()
    %cat = aten.cat([%conv2d_2_kept, %conv2d], 1)

Deep features of a UNet change little from step to step (DeepCache, arXiv 2312.00858). A *full* step (exact or
displaced) computes everything and saves the values that cross from the deep levels to the others. A *reused* step reads
them. What only deep levels need is dead code then, transfers included.

A level is a resolution: the number of rows of a map, as ``propagate-shardings`` found it. Where a network has no
levels, the residual of the middle blocks of each stack of equal blocks is kept
(:mod:`districompile.passes.reuse_blocks`):

    %add_7_change_kept = input()
    %add_7_kept = aten.add(%add_1, %add_7_change_kept)

The pass starts from the graph of the displaced phase, so that shallow levels exchange rows as in that phase. It records
in ``unit.report.reuse`` what the full phases have to save (``save-reused``). docs/decisions/0049 has the reasons.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import fx

from districompile.errors import ConvertError
from districompile.ir.flops import flops_of
from districompile.ir.graph import copy_graph, eliminate_dead_code, insert_recall
from districompile.ir.layout import Layout
from districompile.ir.meta import module_path_of, origin_of, recalled_value, set_recalled
from districompile.ir.report_builder import Kept, Reuse
from districompile.ir.unit import CompilationUnit, Stage
from districompile.passes.reuse_blocks import Crossing, block_crossings
from districompile.sharding.builder import ShardedValue, ShardingBuilder

aten = torch.ops.aten
_NEXT_LEVEL = 0.75  # of the rows of a level: maps with fewer rows are the next one (padding changes a few rows)
_LEAST = 0.02  # of the FLOPs: with less, the fresh part of a step is no more than a copy of its input


@dataclasses.dataclass(frozen=True)
class ReuseDeep:
    """The pass ``reuse-deep``: it makes the graph of the reused phase from that of the displaced phase.

    ``level`` is the number of levels (of blocks at either end of a stack) that a reused step computes. 0: the fewest
    with which the step computes at least 2 % of the FLOPs. Raise :class:`ConvertError` where nothing can be kept.
    """

    level: int = 0

    name: ClassVar[str] = "reuse-deep"
    exact: ClassVar[bool] = False
    needs: ClassVar[Stage] = "lowered"
    gives: ClassVar[Stage] = "lowered"

    def run(self, unit: CompilationUnit) -> None:
        if unit.phase != "reused":
            return
        total = _work(unit.graph)
        reasons = []
        for kind, find in (("levels", _level_crossings), ("blocks", block_crossings)):
            found, reason = self._choose(unit, kind, find, total)
            if found is not None:
                unit.graph, unit.report.reuse = found
                return
            reasons.append(reason)
        raise ConvertError(
            f"reuse: this network keeps nothing for later steps: {reasons[0]}, and {reasons[1]}; convert without reuse"
            + (f", or with another number than {self.level} behind the colon" if self.level else "")
        )

    def _choose(self, unit: CompilationUnit, kind: str, find: Any, total: float) -> Any:
        """Return the graph and the record of the first level that works; else None and the reason."""
        cuts: Sequence[Sequence[Crossing]] = find(unit)
        reason = "its maps have one resolution" if kind == "levels" else "it has no stack of at least 3 equal blocks"
        for number, crossings in enumerate(cuts, 1):
            if self.level not in (0, number):
                reason = f"it has {len(cuts)} {kind} to choose from"
                continue
            if not crossings:
                reason = f"its output is made by what level {number} would keep"
                continue
            graph = _reused(unit, crossings)
            share = _work(graph) / total if total else 0.0
            if share < _LEAST and not self.level:
                reason = f"a step that reuses would compute {share:.1%} of the work"
                continue
            kept = tuple(
                Kept(c.value.name, None if c.base is None else c.base.name, module_path_of(c.value)) for c in crossings
            )
            return (graph, Reuse(kind, number, kept, share)), ""
        return None, reason


def _work(graph: fx.Graph) -> float:
    """Return the FLOPs of all ranks."""
    ranks = len(next(iter(graph.nodes)).meta["local"])
    return sum(flops_of(n, r) for n in graph.nodes for r in range(ranks))


def _reused(unit: CompilationUnit, crossings: Sequence[Crossing]) -> fx.Graph:
    """Return a copy of the graph that reads kept values in place of ``crossings``."""
    graph = copy_graph(unit.graph)
    nodes = {n.name: n for n in graph.nodes}
    builder = ShardingBuilder(graph, unit.cut_points, unit.captured.fake_mode)
    for crossing in crossings:
        value = nodes[crossing.value.name]
        if crossing.base is None:
            new = insert_recall(graph, value, f"{value.name}_kept")
        else:
            recall = insert_recall(graph, value, f"{value.name}_change_kept")
            set_recalled(recall, change_name(value.name))
            with builder.before(value):
                base = nodes[crossing.base.name]
                new = builder.emit(aten.add.Tensor, base, recall, name=f"{value.name}_kept")
        value.replace_all_uses_with(new)
    eliminate_dead_code(graph)
    for node in list(graph.nodes):  # states of the part that is gone
        if recalled_value(node) is not None and not node.users:
            graph.erase_node(node)
    return graph


def change_name(value: str) -> str:
    """Return the name of the difference of a value from its base, which full steps save."""
    return f"{value}_change"


def _level_crossings(unit: CompilationUnit) -> list[list[Crossing]]:
    """Return, for each number of computed levels, the values that cross from deeper ones; empty: no output is left."""
    rows = _rows_by_node(unit)
    tallest = max(_input_rows(unit), default=0)
    heights = sorted({n for n in rows.values() if n <= tallest}, reverse=True)
    levels: list[int] = []  # the most rows of each level
    for height in heights:
        if not levels or height < _NEXT_LEVEL * levels[-1]:
            levels.append(height)
    return [_crossings(unit.graph, unit.rows, rows, level) for level in levels[1:]]


def _input_rows(unit: CompilationUnit) -> list[int]:
    return [i.spec.shape[i.rows] for i in unit.captured.inputs if i.rows is not None]


def _rows_by_node(unit: CompilationUnit) -> dict[fx.Node, int]:
    """Return the rows of the maps that nodes of the lowered graph belong to, where they are known.

    Tokens beside the image's that are divided as well are no map.
    """
    tokens = unit.report.tokens
    texts = set(tokens.sequences.values()) if tokens is not None and tokens.divided else set()
    found: dict[fx.Node, int] = {}
    for node in unit.graph.nodes:
        rows = _rows(unit.shardings.get(origin_of(node) or ""))
        if node.op == "call_function" and rows is not None and rows not in texts:
            found[node] = rows
    return found


def _rows(value: Any) -> int | None:
    layout: Layout | None = value.layout if isinstance(value, ShardedValue) else None
    axis = layout.sharded_axis if layout is not None else None
    return axis.rows if axis is not None else None


def _crossings(graph: fx.Graph, inputs: Collection[str], rows: Mapping[fx.Node, int], deepest: int) -> list[Crossing]:
    """Return the kept values that others read, if maps of at most ``deepest`` rows are kept; empty if the output is.

    A value is kept that belongs to such a map, or that is computed from kept values alone. What does not depend on the
    image (the time, the text) is neither.
    """
    images: set[fx.Node] = set()
    kept: set[fx.Node] = set()
    crossings: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.name in inputs:
            images.add(node)
        elif node.op == "call_function":
            sources = [n for n in node.all_input_nodes if n in images]
            if not sources:
                continue
            images.add(node)
            if rows.get(node, deepest + 1) <= deepest or all(n in kept for n in sources):
                kept.add(node)
            else:
                crossings.update(dict.fromkeys(n for n in sources if n in kept))
    outputs = graph.output_node().all_input_nodes
    return [] if any(n in kept for n in outputs) else [Crossing(n) for n in crossings]
