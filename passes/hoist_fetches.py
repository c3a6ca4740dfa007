# SPDX-License-Identifier: Apache-2.0
"""Move fetches up through views and permutations, and fetch neighbouring slices of one value together.

Before:

    %linear_1_part = aten.slice(%linear_default, 2, 4, 8, 1)
    %reshape_default_2 = aten.reshape(%linear_1_part, [1, 16, 2, 2])
    %permute_default_2 = aten.permute(%reshape_default_2, [0, 2, 1, 3])
    %scaled_dot_product_attention_fetch = dc.fetch(%permute_default_2, 2, ...)
    %scaled_dot_product_attention_fetch_1 = dc.fetch(%permute_default_3, 2, ...)

After:

    %scaled_dot_product_attention_fetch_up_parts = aten.slice(%linear_default, 2, 4, 12)
    %scaled_dot_product_attention_fetch_up_joined = dc.fetch(%scaled_dot_product_attention_fetch_up_parts, 1, ...)
    %scaled_dot_product_attention_fetch_up_part = aten.slice(..., 2, 0, 4)
    %reshape_default_6 = aten.reshape(%scaled_dot_product_attention_fetch_up_part, [1, 32, 2, 2])
    %permute_default_6 = aten.permute(%reshape_default_6, [0, 2, 1, 3])
    %scaled_dot_product_attention_fetch_1_up_part = aten.slice(..., 2, 4, 8)

Keys of attention are (batch, heads, rows, channels) where they are read. A rank's rows are one run of memory for each
head there, and fewer runs further up. The number of bytes stays the same.

The normalised input of the projections would be half the bytes. It is not fetched instead, because every rank would
then multiply all rows by the projection's weights, and because displaced transfers cost no time as long as they are
shorter than a step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import fx

from districompile.ir.collectives import FetchArgs, fetches
from districompile.ir.graph import eliminate_dead_code, replace_node
from districompile.ir.layout import PerRank, per_rank
from districompile.ir.meta import copy_displaced, local_tensors
from districompile.ir.unit import CompilationUnit, Stage
from districompile.sharding.builder import ShardingBuilder

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_PERMUTATIONS = {aten.permute.default, aten.transpose.int}


@dataclasses.dataclass(frozen=True)
class HoistFetches:
    """The pass ``hoist-fetches``: it requires the layouts that ``partition`` records."""

    name: ClassVar[str] = "hoist-fetches"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "spmd"
    gives: ClassVar[Stage] = "spmd"

    def run(self, unit: CompilationUnit) -> None:
        builder = ShardingBuilder.of(unit)
        for node in fetches(unit.graph):
            _hoist(builder, node)
        _join(unit.graph, builder)
        eliminate_dead_code(unit.graph)


@dataclasses.dataclass(frozen=True)
class _Position:
    """A place in a chain of views where rows can be fetched: dim ``dim`` of ``node``.

    ``divisor`` elements of the first position's dim are ``scale`` elements of this one's.
    """

    node: fx.Node
    dim: int
    scale: int = 1
    divisor: int = 1

    def rows(self, rows: Sequence[int]) -> tuple[int, ...] | None:
        scaled = [r * self.scale for r in rows]
        return None if any(r % self.divisor for r in scaled) else tuple(r // self.divisor for r in scaled)

    @property
    def runs(self) -> int:
        """The number of contiguous runs of memory that a rank's rows take, in row-major order."""
        return math.prod(local_tensors(self.node)[0].shape[: self.dim])


def _chain(position: _Position) -> list[_Position]:
    """Return ``position`` and the positions above it, through views and permutations."""
    positions = [position]
    while (above := _above(positions[-1])) is not None:
        positions.append(above)
    return positions


def _above(position: _Position) -> _Position | None:
    node, dim = position.node, position.dim
    if node.target in _PERMUTATIONS:
        args: Any = node.args
        source = args[0]
        order = list(range(len(local_tensors(node)[0].shape)))
        if node.target is aten.transpose.int:
            a, b = (d % len(order) for d in args[1:])
            order[a], order[b] = order[b], order[a]
        else:
            order = [d % len(order) for d in args[1]]
        return dataclasses.replace(position, node=source, dim=order[dim])
    if node.target in _VIEWS:
        view: Any = node.args[0]
        return _above_view(position, view)
    return None


def _above_view(position: _Position, source: fx.Node) -> _Position | None:
    """Return the position above a view, or None.

    A view keeps rows together where as many elements come before their dim on both sides.
    """
    ratios = set()
    dims = set()
    for before, after in zip(local_tensors(source), local_tensors(position.node), strict=True):
        outer = math.prod(after.shape[: position.dim])
        dim = next((d for d in range(before.ndim) if math.prod(before.shape[:d]) == outer and before.shape[d] != 1), -1)
        if dim < 0 or not after.shape[position.dim] or not before.shape[dim]:
            return None
        dims.add(dim)
        n, m = int(before.shape[dim]), int(after.shape[position.dim])
        common = math.gcd(n, m)
        ratios.add((n // common, m // common))
    if len(ratios) != 1 or len(dims) != 1:
        return None
    ((up, down),) = ratios
    return _Position(source, dims.pop(), position.scale * up, position.divisor * down)


def _hoist(builder: ShardingBuilder, node: fx.Node) -> None:
    fetch = FetchArgs.of(node)
    chain = _chain(_Position(fetch.x, fetch.dim))
    positions = [p for p in chain if all(p.rows(r) is not None for r in (fetch.bounds, fetch.lo, fetch.hi))]
    best = min(reversed(positions), key=lambda p: p.runs)
    if best.node is fetch.x or fetch.edge != "zeros":
        return
    bounds, lo, hi = (best.rows(r) or () for r in (fetch.bounds, fetch.lo, fetch.hi))
    hoisted = dataclasses.replace(fetch, x=best.node, dim=best.dim, bounds=bounds, lo=lo, hi=hi)
    with builder.before(node):
        new = builder.emit(node.target, *hoisted.node_args(), name=f"{node.name}_up")
        copy_displaced(node, new)
        for step in reversed(chain[: chain.index(best)]):
            new = _again(builder, step.node, new, step.dim)
    replace_node(node, new)


def _again(builder: ShardingBuilder, step: fx.Node, source: fx.Node, dim: int) -> fx.Node:
    """Repeat the view or permutation ``step`` on the fetched value ``source``."""
    if step.target in _PERMUTATIONS:
        return builder.emit(step.target, source, *step.args[1:], name=step.name)
    sizes: list[int | PerRank[int]] = []
    for d in range(len(local_tensors(step)[0].shape)):
        if d == dim:
            inner = [math.prod(t.shape[d + 1 :]) for t in local_tensors(step)]
            outer = [math.prod(t.shape[:d]) for t in local_tensors(step)]
            totals = [t.numel() for t in local_tensors(source)]
            sizes.append(per_rank(n // (i * o) for n, i, o in zip(totals, inner, outer, strict=True)))
        else:
            sizes.append(per_rank(int(t.shape[d]) for t in local_tensors(step)))
    return builder.emit(aten.reshape.default, source, sizes, name=step.name)


def _join(graph: fx.Graph, builder: ShardingBuilder) -> None:
    """Replace the fetches of adjoining slices of one value by one: keys and values of a fused projection."""
    groups: dict[Any, list[fx.Node]] = {}
    for node in fetches(graph):
        fetch = FetchArgs.of(node)
        part = fetch.x
        if part.target is not aten.slice.Tensor or len(part.args) < 4 or part.args[1] == fetch.dim:
            continue
        if all(isinstance(a, int) for a in part.args[1:]) and part.args[4:] in ((), (1,)):
            alike = dataclasses.replace(fetch, x=part.all_input_nodes[0], module_path="")
            groups.setdefault((part.args[1], repr(alike)), []).append(node)
    for (dim, _), found in groups.items():
        ordered = sorted(found, key=_span)
        run = [ordered[0]]
        for node in ordered[1:]:
            if _span(node)[0] == _span(run[-1])[1]:
                run.append(node)
            else:
                _join_run(builder, dim, run)
                run = [node]
        _join_run(builder, dim, run)


def _span(fetch: fx.Node) -> tuple[int, int]:
    """Return start and stop of the fetched slice."""
    _, _, start, stop, *_ = FetchArgs.of(fetch).x.args
    return cast(int, start), cast(int, stop)


def _join_run(builder: ShardingBuilder, dim: int, run: list[fx.Node]) -> None:
    if len(run) < 2:
        return
    order = {n: i for i, n in enumerate(builder.graph.nodes)}
    first = min(run, key=order.__getitem__)
    fetch = FetchArgs.of(first)
    source = fetch.x.all_input_nodes[0]
    spans = [_span(n) for n in run]
    start, stop = spans[0][0], spans[-1][1]
    with builder.before(first):
        part = builder.emit(aten.slice.Tensor, source, dim, start, stop, name=f"{first.name}_parts")
        joined = dataclasses.replace(fetch, x=part)
        new = builder.emit(first.target, *joined.node_args(), name=f"{first.name}_joined")
    copy_displaced(first, new)
    for node, (a, b) in zip(run, spans, strict=True):
        with builder.before(node):
            mine = builder.emit(aten.slice.Tensor, new, dim, a - start, b - start, name=f"{node.name}_part")
        replace_node(node, mine)
