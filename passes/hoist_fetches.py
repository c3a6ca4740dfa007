"""Fetch where rows are contiguous: move a fetch up through views and permutations, and fetch neighbouring parts of one
value together.

%k = aten.slice(%m, 2, 640, 1280)      %kv = aten.slice(%m, 2, 640, 1920)
%v = aten.slice(%m, 2, 1280, 1920)     %f = dc.fetch(%kv, 1, ...)
%a = aten.view(%k, [1, 512, 10, 64])   %k = aten.slice(%f, 2, 0, 640)
%b = aten.transpose(%a, 1, 2)      ->  %a = aten.view(%k, [1, 1024, 10, 64])
%c = dc.fetch(%b, 2, ...)              %b = aten.transpose(%a, 1, 2)
... and so for %v, %d, %e, %g          ... and so for %v, %d, %e

Keys of attention are (batch, heads, rows, channels) where they are read: a rank's rows are one piece of memory for each
head there, and one piece in all further up. What travels stays the same number of bytes.

The normed input that keys and values are made of would be half the bytes. It is not fetched instead: every rank would
then multiply everybody's rows by the weights of the projections, and transfers that are displaced cost no time as long
as they are shorter than a step.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import fx

from districompile.cutter import Cutter
from districompile.ir.layout import PerRank, per_rank
from districompile.ir.ops import ops
from districompile.unit import Stage, Unit

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_PERMUTATIONS = {aten.permute.default, aten.transpose.int}


@dataclasses.dataclass(frozen=True)
class HoistFetches:
    """Requires the local stage with the layouts that localising leaves. Gives the local stage."""

    name: ClassVar[str] = "hoist-fetches"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "local"
    gives: ClassVar[Stage] = "local"

    def run(self, unit: Unit) -> None:
        emitter = Cutter(unit.graph, unit.fractions, unit.captured.fake_mode)
        for node in [n for n in unit.graph.nodes if n.target is ops.fetch.default]:
            _hoist(unit.graph, emitter, node)
        _join(unit.graph, emitter)
        unit.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where along a chain of views a fetch may be: of ``node``, along ``dim``, an element of the first place's dim
    being ``scale`` elements of this one's (or the other way round, for ``divisor``)."""

    node: fx.Node
    dim: int
    scale: int = 1
    divisor: int = 1

    def rows(self, rows: Any) -> list[int] | None:
        scaled = [r * self.scale for r in rows]
        return None if any(r % self.divisor for r in scaled) else [r // self.divisor for r in scaled]

    @property
    def pieces(self) -> int:
        """How many runs of memory a rank's rows are, in row-major order."""
        return math.prod(self.node.meta["local"][0].shape[: self.dim])


def _chain(place: _Place) -> list[_Place]:
    """``place`` and what is above it, through views and permutations."""
    places = [place]
    while (above := _above(places[-1])) is not None:
        places.append(above)
    return places


def _above(place: _Place) -> _Place | None:
    node, dim = place.node, place.dim
    if node.target in _PERMUTATIONS:
        args: Any = node.args
        source = args[0]
        order = list(range(len(node.meta["local"][0].shape)))
        if node.target is aten.transpose.int:
            a, b = (d % len(order) for d in args[1:])
            order[a], order[b] = order[b], order[a]
        else:
            order = [d % len(order) for d in args[1]]
        return dataclasses.replace(place, node=source, dim=order[dim])
    if node.target in _VIEWS:
        view: Any = node.args[0]
        return _above_view(place, view)
    return None


def _above_view(place: _Place, source: fx.Node) -> _Place | None:
    """A view keeps rows together where as many elements come before their dim on both sides."""
    ratios = set()
    dims = set()
    for before, after in zip(source.meta["local"], place.node.meta["local"], strict=True):
        outer = math.prod(after.shape[: place.dim])
        dim = next((d for d in range(before.ndim) if math.prod(before.shape[:d]) == outer and before.shape[d] != 1), -1)
        if dim < 0 or not after.shape[place.dim] or not before.shape[dim]:
            return None
        dims.add(dim)
        n, m = int(before.shape[dim]), int(after.shape[place.dim])
        common = math.gcd(n, m)
        ratios.add((n // common, m // common))
    if len(ratios) != 1 or len(dims) != 1:
        return None
    ((up, down),) = ratios
    return _Place(source, dims.pop(), place.scale * up, place.divisor * down)


def _hoist(graph: fx.Graph, emitter: Cutter, node: fx.Node) -> None:
    args: Any = node.args
    x, dim, bounds, lo, hi, edge, *rest = args
    chain = _chain(_Place(x, dim))
    places = [p for p in chain if all(p.rows(r) is not None for r in (bounds, lo, hi))]
    best = min(reversed(places), key=lambda p: p.pieces)
    if best.node is x or edge != "zeros":
        return
    emitter.target = node
    moved = [best.rows(r) for r in (bounds, lo, hi)]
    with graph.inserting_before(node):
        new = emitter.emit(ops.fetch.default, best.node, best.dim, *moved, edge, *rest, name=f"{node.name}_up")
        _copy_meta(node, new)
        for step in reversed(chain[: chain.index(best)]):
            new = _again(emitter, step.node, new, step.dim)
    node.replace_all_uses_with(new)
    if "layout" in node.meta:
        new.meta["layout"] = node.meta["layout"]
    graph.erase_node(node)


def _again(emitter: Cutter, step: fx.Node, source: fx.Node, dim: int) -> fx.Node:
    """The view or permutation ``step``, of what was fetched."""
    if step.target in _PERMUTATIONS:
        return emitter.emit(step.target, source, *step.args[1:], name=step.name)
    sizes: list[int | PerRank[int]] = []
    for d in range(len(step.meta["local"][0].shape)):
        if d == dim:
            inner = [math.prod(t.shape[d + 1 :]) for t in step.meta["local"]]
            outer = [math.prod(t.shape[:d]) for t in step.meta["local"]]
            totals = [t.numel() for t in source.meta["local"]]
            sizes.append(per_rank(n // (i * o) for n, i, o in zip(totals, inner, outer, strict=True)))
        else:
            sizes.append(per_rank(int(t.shape[d]) for t in step.meta["local"]))
    return emitter.emit(aten.reshape.default, source, sizes, name=step.name)


def _copy_meta(old: fx.Node, new: fx.Node) -> None:
    for key in ("site", "stack_trace", "nn_module_stack", "displaced"):
        if key in old.meta:
            new.meta[key] = old.meta[key]


def _join(graph: fx.Graph, emitter: Cutter) -> None:
    """One fetch for slices of one value that follow each other: keys and values of a merged projection."""
    groups: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target is not ops.fetch.default:
            continue
        args: Any = node.args
        part = args[0]
        if part.target is not aten.slice.Tensor or len(part.args) < 4 or part.args[1] == args[1]:
            continue
        if all(isinstance(a, int) for a in part.args[1:]) and part.args[4:] in ((), (1,)):
            key = part.args[0], part.args[1], repr(args[1:9]), args[10]
            groups.setdefault(key, []).append(node)
    for (source, dim, *_), fetches in groups.items():
        ordered = sorted(fetches, key=_span)
        run = [ordered[0]]
        for node in ordered[1:]:
            if _span(node)[0] == _span(run[-1])[1]:
                run.append(node)
            else:
                _join_run(graph, emitter, source, dim, run)
                run = [node]
        _join_run(graph, emitter, source, dim, run)


def _span(fetch: fx.Node) -> tuple[int, int]:
    """Start and stop of the slice that is fetched."""
    part: Any = fetch.args[0]
    return part.args[2], part.args[3]


def _join_run(graph: fx.Graph, emitter: Cutter, source: fx.Node, dim: int, run: list[fx.Node]) -> None:
    if len(run) < 2:
        return
    order = {n: i for i, n in enumerate(graph.nodes)}
    first = min(run, key=order.__getitem__)
    spans = [_span(n) for n in run]
    start, stop = spans[0][0], spans[-1][1]
    emitter.target = first
    with graph.inserting_before(first):
        part = emitter.emit(aten.slice.Tensor, source, dim, start, stop, name=f"{first.name}_parts")
        new = emitter.emit(ops.fetch.default, part, *first.args[1:], name=f"{first.name}_joined")
    _copy_meta(first, new)
    for node, (a, b) in zip(run, spans, strict=True):
        emitter.target = node
        with graph.inserting_before(node):
            mine = emitter.emit(aten.slice.Tensor, new, dim, a - start, b - start, name=f"{node.name}_part")
        if "layout" in node.meta:
            mine.meta["layout"] = node.meta["layout"]
        node.replace_all_uses_with(mine)
        graph.erase_node(node)
