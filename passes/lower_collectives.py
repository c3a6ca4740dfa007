"""Lower ``fetch`` to what travels and what is put together, and give every collective its plan.

    %f = dc.fetch(%x, 2, [0, 8, 16], [-1, 7], [9, 17], 'zeros', 'rows', ...)
 -> %x_strips = dc.strips(%x, 2, 1, 1) : f32[2, 1, 4, 8]              what the others want of x, rows first
    %f_x = dc.exchange(%x_strips, [2, 1, 4, 8]) : f32[2, 1, 4, 8]       what this rank gets; fill at the border
    %f = dc.place(%f_x, %x, 2, 1, 1, 0, 8) : f32[1, 4, 10, 8]

Rows travel as the first dim, so that what one rank sends to another is contiguous at both ends, however many ranks
there are. (The whole output is put together by the transfer itself, in its own layout.)

Where ``leave-room`` marked the fetch, what is received has room for the rank's own rows; ``insert`` puts them there.

All ranks send strips of one shape and receive results of one shape where they can, so that equal ranks share an engine.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from torch import fx

from districompile.cutter import Cutter
from districompile.ir.layout import per_rank
from districompile.ir.ops import ops
from districompile.ir.plan import Exchange, Piece, Reduction, TensorSpec
from districompile.ir.rows import owner, wanted_rows
from districompile.unit import Stage, Unit


@dataclasses.dataclass(frozen=True)
class LowerCollectives:
    """Requires the local stage; gives the lowered stage: every exchange and reduce node carries
    ``meta["collective"]``."""

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
                args: Any = node.args
                x, op, site, kind = args
                node.meta["collective"] = Reduction(
                    node.name, site, kind, x.name, op, specs, bool(node.meta.get("displaced"))
                )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Split:
    """One rank's result: rows from others before and after the rows [start, stop) of its own."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    start: int
    stop: int


def _split(bounds: Sequence[int], rank: int, rows: Sequence[int], first: int) -> _Split:
    """Find this rank's own rows in ``rows``: the longest run of them that is in order. ``first``: where to look for
    it."""
    lo, hi = bounds[rank], bounds[rank + 1]
    if not (0 <= first < len(rows) and lo <= rows[first] < hi):
        return _Split(tuple(rows), (), 0, 0)
    end = first
    while end < len(rows) and rows[end] == rows[first] + end - first and rows[end] < hi:
        end += 1
    return _Split(tuple(rows[:first]), tuple(rows[end:]), rows[first] - lo, rows[first] - lo + end - first)


@dataclasses.dataclass(frozen=True)
class _Run:
    """``rows`` rows of ``src`` from its ``row`` on, that stand in the result of ``dst`` from ``at`` on."""

    src: int
    dst: int
    row: int
    at: int
    rows: int


@dataclasses.dataclass(frozen=True)
class _Fetch:
    """A fetch node's arguments, and what follows from them."""

    node: fx.Node
    x: fx.Node
    dim: int
    bounds: tuple[int, ...]
    splits: tuple[_Split, ...]
    fill: float
    site: str
    kind: str
    room: bool = False  # for the own rows, between the others'

    @staticmethod
    def of(node: fx.Node) -> _Fetch:
        args: Any = node.args
        x, dim, bounds, lo, hi, edge, order, fill, _rank, site, kind = args
        splits = []
        for r in range(len(bounds) - 1):
            rows = wanted_rows(bounds, lo, hi, edge, order, r)
            if kind == "output":  # leaves the program: the transfer puts its own rows in place, too
                splits.append(_Split(tuple(rows), (), 0, 0))
                continue
            first = 0 if order == "own_first" else max(bounds[r], lo[r]) - lo[r]
            splits.append(_split(bounds, r, rows, first))
        room = bool(node.meta.get("room")) and kind != "output"
        return _Fetch(node, x, dim, tuple(bounds), tuple(splits), fill, site, kind, room)

    @functools.cached_property
    def heights(self) -> list[int]:
        return [b - a for a, b in itertools.pairwise(self.bounds)]

    @functools.cached_property
    def rows(self) -> list[tuple[int, ...]]:
        """The rows of each rank's result; -1 for the fill value, and for room."""
        room = [s.stop - s.start if self.room else 0 for s in self.splits]
        return [(*s.before, *[-1] * n, *s.after) for s, n in zip(self.splits, room, strict=True)]

    @functools.cached_property
    def runs(self) -> list[_Run]:
        """What travels, in the order of the results."""
        runs: list[_Run] = []
        for dst, wanted in enumerate(self.rows):
            rows = np.array(wanted, dtype=np.int64)
            seams = np.flatnonzero((np.diff(rows) != 1) | (rows[:-1] < 0)) + 1
            for at, end in itertools.pairwise((0, *seams.tolist(), len(rows))):
                row = int(rows[at]) if at < end else -1
                while row >= 0 and at < end:
                    src = owner(self.bounds, row)
                    n = min(end - at, self.bounds[src + 1] - row)
                    runs.append(_Run(src, dst, row - self.bounds[src], at, n))
                    row, at = row + n, at + n
        return runs

    @functools.cached_property
    def strips(self) -> tuple[int, int]:
        """Rows from the top and from the bottom that cover what is wanted of every rank."""
        top = bottom = 0
        for run in self.runs:
            height = self.heights[run.src]
            middle, end = (height + 1) // 2, run.row + run.rows
            if run.row < middle:
                top = max(top, min(end, middle))
            if end > middle:
                bottom = max(bottom, height - max(run.row, middle))
        return top, bottom


def _lower_fetch(graph: fx.Graph, emitter: Cutter, node: fx.Node, sources: dict[tuple[Any, ...], fx.Node]) -> None:
    f = _Fetch.of(node)
    emitter.target = node
    name, own = f"{node.name}_rows", _own(f.splits)
    with graph.inserting_before(node):
        if not any(s.before or s.after for s in f.splits):
            new = emitter.emit(ops.place.default, f.x, f.x, f.dim, 0, 0, *own, name=name)
        else:
            source, new = _exchange(emitter, f, sources)
            new.meta["displaced"] = bool(node.meta.get("displaced"))
            new.meta["collective"] = _plan(new, source, f)
            if f.kind != "output":
                before = per_rank(len(s.before) for s in f.splits)
                after = per_rank(len(s.after) for s in f.splits)
                if f.room:
                    new = emitter.emit(ops.insert.default, new, f.x, f.dim, before, *own, name=name)
                else:
                    new = emitter.emit(ops.place.default, new, f.x, f.dim, before, after, *own, name=name)
    if "layout" in node.meta:
        new.meta["layout"] = node.meta["layout"]
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _own(splits: Sequence[_Split]) -> tuple[Any, Any]:
    return per_rank(s.start for s in splits), per_rank(s.stop for s in splits)


def _exchange(emitter: Cutter, f: _Fetch, sources: dict[tuple[Any, ...], fx.Node]) -> tuple[fx.Node, fx.Node]:
    top, bottom = f.strips
    source = f.x
    if f.dim != _rows_dim(f) or any(top + bottom < h for h in f.heights):
        key = (f.x, f.dim, top, bottom)
        if key not in sources:
            sources[key] = emitter.emit(ops.strips.default, f.x, f.dim, top, bottom, name=f"{f.node.name}_strips")
        source = sources[key]
    shape: list[Any] = [per_rank(sizes) for sizes in zip(*(t.shape for t in f.x.meta["local"]), strict=True)]
    del shape[f.dim]
    rows = per_rank(max(1, len(wanted)) for wanted in f.rows)
    shape.insert(_rows_dim(f), rows)
    return source, emitter.emit(ops.exchange.default, source, shape, name=f"{f.node.name}_halo")


def _rows_dim(f: _Fetch) -> int:
    """Where the rows are while they travel."""
    return f.dim if f.kind == "output" else 0


def _plan(exchange: fx.Node, source: fx.Node, f: _Fetch) -> Exchange:
    top, bottom = f.strips
    pieces: list[Piece] = []
    for run in f.runs:
        height, start = f.heights[run.src], run.row
        if source is not f.x and start >= top and top + bottom < height:  # where it stands in what its rank sends
            start += top - (height - bottom)
        p = pieces[-1] if pieces else None
        if p and p.dst == run.dst and p.src == run.src and p.start + p.rows == start and p.at + p.rows == run.at:
            pieces[-1] = dataclasses.replace(p, rows=p.rows + run.rows)
        else:
            pieces.append(Piece(run.src, run.dst, start, run.at, run.rows))
    return Exchange(
        name=exchange.name, site=f.site, kind=f.kind, source=source.name, dim=_rows_dim(f), specs=_specs(source),
        results=_specs(exchange), pieces=tuple(pieces), fill=f.fill, pattern=_pattern(pieces, len(f.splits)),
        displaced=bool(f.node.meta.get("displaced")), source_rows=_source_rows(f, source is f.x),
        result_rows=tuple(_row_runs(rows or [-1]) for rows in f.rows),
    )  # fmt: skip


def _source_rows(f: _Fetch, whole: bool) -> tuple[tuple[tuple[int, int], ...], ...]:
    """The rows of the whole that each rank sends from: its own, or those at the ends of its own."""
    top, bottom = f.strips
    found: list[tuple[tuple[int, int], ...]] = []
    for start, end in itertools.pairwise(f.bounds):
        if whole or top + bottom >= end - start:
            found.append(((start, end - start),))
        else:
            ends = ((start, top), (end - bottom, bottom))
            found.append(tuple(run for run in ends if run[1]))
    return tuple(found)


def _row_runs(rows: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Runs (first, count) of rows that follow each other, or that are all -1."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        first, count = runs[-1] if runs else (0, 0)
        if count and row == (-1 if first < 0 else first + count):
            runs[-1] = (first, count + 1)
        else:
            runs.append((row, 1))
    return tuple(runs)


def _specs(node: fx.Node) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(tuple(int(s) for s in t.shape), t.dtype) for t in node.meta["local"])


def _pattern(pieces: Sequence[Piece], ranks: int) -> Any:
    pairs = {(p.src, p.dst) for p in pieces if p.src != p.dst}
    if not pairs:
        return "none"
    if all(abs(src - dst) == 1 for src, dst in pairs):
        return "neighbour"
    return "all_gather" if len(pairs) == ranks * (ranks - 1) else "general"
