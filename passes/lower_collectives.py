"""Lower ``fetch`` to what travels and what is put together, and give every collective its plan.

    %f = dc.fetch(%x, 2, [0, 8, 16], [-1, 7], [9, 17], 'zeros', 'rows', ...)
 -> %x_strips = dc.strips(%x, 2, 1, 1) : f32[1, 4, 2, 8]              what the others want of x
    %f_x = dc.exchange(%x_strips, [1, 4, 2, 8]) : f32[1, 4, 2, 8]       what this rank gets; fill at the border
    %f = dc.place(%f_x, %x, 2, 1, 1, 0, 8) : f32[1, 4, 10, 8]

All ranks send strips of one shape and receive results of one shape where they can, so that equal ranks share an engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import fx

from districompile.cutter import Cutter
from districompile.ir.layout import per_rank
from districompile.ir.ops import ops
from districompile.ir.plan import Exchange, Piece, Reduction, TensorSpec
from districompile.ir.rows import owner, wanted_rows
from districompile.unit import Stage, Unit


@dataclasses.dataclass(frozen=True)
class LowerCollectives:
    """Requires the local stage; gives the lowered stage: every exchange and reduce node carries ``meta["collective"]``."""

    name: ClassVar[str] = "lower-collectives"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "local"
    gives: ClassVar[Stage] = "lowered"

    def run(self, unit: Unit) -> None:
        emitter = Cutter(unit.graph, unit.fractions, unit.captured.fake_mode)
        sources: dict[tuple[Any, ...], fx.Node] = {}
        for node in list(unit.graph.nodes):
            if node.target is ops.fetch.default:
                _lower_fetch(unit.graph, emitter, node, sources)
            elif node.target is ops.reduce.default:
                specs = tuple(TensorSpec(tuple(t.shape), t.dtype) for t in node.meta["local"])
                x, op, site, kind = node.args
                node.meta["collective"] = Reduction(
                    node.name, site, kind, x.name, op, specs, bool(node.meta.get("displaced"))  # type: ignore[arg-type, union-attr]
                )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Split:
    """One rank's result: rows from others before and after the rows [start, stop) of its own."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    start: int
    stop: int


def _split(bounds: Sequence[int], rank: int, rows: Sequence[int], first: int) -> _Split:
    """Find this rank's own rows in ``rows``: the longest run of them that is in order. ``first``: where to look for it."""
    lo, hi = bounds[rank], bounds[rank + 1]
    if not (0 <= first < len(rows) and lo <= rows[first] < hi):
        return _Split(tuple(rows), (), 0, 0)
    end = first
    while end < len(rows) and rows[end] == rows[first] + end - first and rows[end] < hi:
        end += 1
    return _Split(tuple(rows[:first]), tuple(rows[end:]), rows[first] - lo, rows[first] - lo + end - first)


def _lower_fetch(graph: fx.Graph, emitter: Cutter, node: fx.Node, sources: dict[tuple[Any, ...], fx.Node]) -> None:
    x, dim, bounds, lo, hi, edge, order, fill, _rank, site, kind = node.args
    assert isinstance(x, fx.Node)
    ranks = len(bounds) - 1  # type: ignore[arg-type]
    splits = []
    for r in range(ranks):
        rows = wanted_rows(bounds, lo, hi, edge, order, r)  # type: ignore[arg-type]
        first = 0 if order == "own_first" else max(bounds[r], lo[r]) - lo[r]  # type: ignore[index, operator]
        splits.append(_split(bounds, r, rows, first))  # type: ignore[arg-type]
    emitter.target = node
    heights = [bounds[r + 1] - bounds[r] for r in range(ranks)]  # type: ignore[index, operator]
    with graph.inserting_before(node):
        if not any(s.before or s.after for s in splits):
            new = emitter.emit(ops.place.default, x, x, dim, 0, 0, *_own(splits), name=f"{node.name}_rows")
        else:
            source, exchange = _exchange(emitter, node, x, splits, heights, sources)
            before = per_rank(len(s.before) for s in splits)
            after = per_rank(len(s.after) for s in splits)
            new = emitter.emit(ops.place.default, exchange, x, dim, before, after, *_own(splits), name=f"{node.name}_rows")
            exchange.meta["displaced"] = bool(node.meta.get("displaced"))
            exchange.meta["collective"] = _plan(exchange, source, node, splits, heights)
    for key in ("layout",):
        if key in node.meta:
            new.meta[key] = node.meta[key]
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _own(splits: Sequence[_Split]) -> tuple[Any, Any]:
    return per_rank(s.start for s in splits), per_rank(s.stop for s in splits)


def _needed(splits: Sequence[_Split], bounds: Sequence[int]) -> list[set[int]]:
    """The local rows of each rank that somebody's result takes from its source."""
    needed: list[set[int]] = [set() for _ in splits]
    for s in splits:
        for row in (*s.before, *s.after):
            if row >= 0:
                src = owner(bounds, row)
                needed[src].add(row - bounds[src])
    return needed


def _strip_sizes(needed: Sequence[set[int]], heights: Sequence[int]) -> tuple[int, int]:
    """Rows from the top and from the bottom that cover what is wanted of every rank."""
    top = bottom = 0
    for rows, height in zip(needed, heights, strict=True):
        upper = [row for row in rows if row < height / 2]
        lower = [row for row in rows if row >= height / 2]
        top = max(top, max(upper, default=-1) + 1)
        bottom = max(bottom, height - min(lower, default=height))
    return top, bottom


def _exchange(
    emitter: Cutter, node: fx.Node, x: fx.Node, splits: Sequence[_Split], heights: Sequence[int],
    sources: dict[tuple[Any, ...], fx.Node],
) -> tuple[fx.Node, fx.Node]:  # fmt: skip
    dim, bounds = node.args[1], node.args[2]
    top, bottom = _strip_sizes(_needed(splits, bounds), heights)  # type: ignore[arg-type]
    source = x
    if any(top + bottom < h for h in heights):
        key = (x, dim, top, bottom)
        if key not in sources:
            sources[key] = emitter.emit(ops.strips.default, x, dim, top, bottom, name=f"{node.name}_strips")
        source = sources[key]
    counts = per_rank(max(1, len(s.before) + len(s.after)) for s in splits)
    shape: list[Any] = [per_rank(int(v) for v in sizes) for sizes in
                        zip(*(t.shape for t in x.meta["local"]), strict=True)]  # fmt: skip
    shape[dim] = counts  # type: ignore[index]
    return source, emitter.emit(ops.exchange.default, source, shape, name=f"{node.name}_halo")


def _plan(
    exchange: fx.Node, source: fx.Node, node: fx.Node, splits: Sequence[_Split], heights: Sequence[int]
) -> Exchange:
    _x, dim, bounds, _lo, _hi, _edge, _order, fill, _rank, site, kind = node.args
    top, bottom = _strip_sizes(_needed(splits, bounds), heights)  # type: ignore[arg-type]
    strips = source is not node.args[0]

    def position(src: int, row: int) -> int:
        """Where a local row stands in what its rank sends."""
        height = heights[src]
        return row if not strips or top + bottom >= height or row < top else top + row - (height - bottom)

    pieces: list[Piece] = []
    for dst, s in enumerate(splits):
        for at, row in enumerate((*s.before, *s.after)):
            if row < 0:
                continue
            src = owner(bounds, row)  # type: ignore[arg-type]
            start = position(src, row - bounds[src])  # type: ignore[index, operator]
            last = pieces[-1] if pieces else None
            if last and last.dst == dst and last.src == src and last.start + last.rows == start and last.at + last.rows == at:
                pieces[-1] = dataclasses.replace(last, rows=last.rows + 1)
            else:
                pieces.append(Piece(src, dst, start, at, 1))
    return Exchange(
        name=exchange.name, site=str(site), kind=str(kind), source=source.name, dim=int(dim),  # type: ignore[call-overload]
        specs=_specs(source), results=_specs(exchange), pieces=tuple(pieces), fill=float(fill),  # type: ignore[arg-type]
        pattern=_pattern(pieces, len(splits)), displaced=bool(node.meta.get("displaced")),
    )  # fmt: skip


def _specs(node: fx.Node) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(tuple(int(s) for s in t.shape), t.dtype) for t in node.meta["local"])


def _pattern(pieces: Sequence[Piece], ranks: int) -> Any:
    pairs = {(p.src, p.dst) for p in pieces if p.src != p.dst}
    if not pairs:
        return "none"
    if all(abs(src - dst) == 1 for src, dst in pairs):
        return "neighbour"
    return "all_gather" if len(pairs) == ranks * (ranks - 1) else "general"
