# SPDX-License-Identifier: Apache-2.0
"""Lower ``fetch`` to packing, transfer and assembly, and give every collective its transfer plan.

Before:

    %conv2d_fetch = dc.fetch(%silu, dim=2, want=[-1..5, 3..9], edge=zeros)

After:

    %conv2d_fetch_boundary = dc.pack_boundary(%silu, 2, 1, 1)
    %conv2d_fetch_halo = dc.exchange(%conv2d_fetch_boundary, ...)
    %conv2d_fetch_rows = dc.assemble(%conv2d_fetch_halo, %silu, 2, 1, 1, 0, 4)

``pack_boundary`` takes the rows that others read, ``exchange`` is the transfer, and ``assemble`` puts the received rows
around the own ones. Rows are transferred as dim 0, so that what one rank sends to another is contiguous at both ends
for any number of ranks. The output of the program is assembled by the transfer itself, in its own layout.

Where ``in-place-gather`` chose the fetch, the received tensor has a gap for the rank's own rows, and
``assemble_in_place`` writes them there.

All ranks send and receive tensors of one shape where they can, so that equal ranks share an engine.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from torch import fx

from districompile.ir.collectives import FetchArgs, ReduceArgs, is_fetch, is_reduce
from districompile.ir.graph import replace_node
from districompile.ir.layout import per_rank
from districompile.ir.meta import is_displaced, is_in_place, local_specs, local_tensors, set_collective, set_displaced
from districompile.ir.ops import ops
from districompile.ir.rows import owner, wanted_rows
from districompile.ir.unit import CompilationUnit, Stage
from districompile.plan.plan import Exchange, Reduction, RowSlice
from districompile.sharding.builder import ShardingBuilder


@dataclasses.dataclass(frozen=True)
class LowerCollectives:
    """The pass ``lower-collectives``: in the lowered graph, exchange and reduce nodes carry ``meta["collective"]``."""

    name: ClassVar[str] = "lower-collectives"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "spmd"
    gives: ClassVar[Stage] = "lowered"

    def run(self, unit: CompilationUnit) -> None:
        builder = ShardingBuilder.of(unit)
        sources: dict[tuple[Any, ...], fx.Node] = {}
        for node in list(unit.graph.nodes):
            if is_fetch(node):
                _lower_fetch(builder, node, sources)
            elif is_reduce(node):
                a = ReduceArgs.of(node)
                plan = Reduction(
                    node.name, a.module_path, a.purpose, a.x.name, a.op, local_specs(node), is_displaced(node)
                )
                set_collective(node, plan)


@dataclasses.dataclass(frozen=True)
class _Split:
    """The composition of one rank's result: rows of others before and after its own rows [start, stop)."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    start: int
    stop: int


def _split(bounds: Sequence[int], rank: int, rows: Sequence[int], first: int) -> _Split:
    """Find this rank's own rows in ``rows``: the longest run in order that begins at the index ``first``."""
    lo, hi = bounds[rank], bounds[rank + 1]
    if not (0 <= first < len(rows) and lo <= rows[first] < hi):
        return _Split(tuple(rows), (), 0, 0)
    end = first
    while end < len(rows) and rows[end] == rows[first] + end - first and rows[end] < hi:
        end += 1
    return _Split(tuple(rows[:first]), tuple(rows[end:]), rows[first] - lo, rows[first] - lo + end - first)


@dataclasses.dataclass(frozen=True)
class _RowRun:
    """A run of ``rows`` rows: from ``row`` on in the source on ``src``, from ``at`` on in the result of ``dst``."""

    src: int
    dst: int
    row: int
    at: int
    rows: int


@dataclasses.dataclass(frozen=True)
class _Fetch:
    """A fetch node, its arguments, and what every rank receives; with ``in_place``, around the rank's own rows."""

    node: fx.Node
    args: FetchArgs
    splits: tuple[_Split, ...]
    in_place: bool = False

    @staticmethod
    def of(node: fx.Node) -> _Fetch:
        a = FetchArgs.of(node)
        splits = []
        for r in range(a.ranks):
            rows = wanted_rows(a.bounds, a.lo, a.hi, a.edge, a.order, r)
            if a.purpose == "output":  # an output of the model: the transfer assembles the own rows, too
                splits.append(_Split(tuple(rows), (), 0, 0))
                continue
            first = 0 if a.order == "own_first" else max(a.bounds[r], a.lo[r]) - a.lo[r]
            splits.append(_split(a.bounds, r, rows, first))
        return _Fetch(node, a, tuple(splits), is_in_place(node) and a.purpose != "output")

    @functools.cached_property
    def heights(self) -> list[int]:
        return [b - a for a, b in itertools.pairwise(self.args.bounds)]

    @functools.cached_property
    def rows(self) -> list[tuple[int, ...]]:
        """The rows that each rank receives; -1 for the fill value, and for the gap that its own rows will fill."""
        gaps = [s.stop - s.start if self.in_place else 0 for s in self.splits]
        return [(*s.before, *[-1] * n, *s.after) for s, n in zip(self.splits, gaps, strict=True)]

    @functools.cached_property
    def runs(self) -> list[_RowRun]:
        """The runs of rows that are transferred, in the order of the results."""
        runs: list[_RowRun] = []
        for dst, wanted in enumerate(self.rows):
            rows = np.array(wanted, dtype=np.int64)
            seams = np.flatnonzero((np.diff(rows) != 1) | (rows[:-1] < 0)) + 1
            for at, end in itertools.pairwise((0, *seams.tolist(), len(rows))):
                row = int(rows[at]) if at < end else -1
                while row >= 0 and at < end:
                    src = owner(self.args.bounds, row)
                    n = min(end - at, self.args.bounds[src + 1] - row)
                    runs.append(_RowRun(src, dst, row - self.args.bounds[src], at, n))
                    row, at = row + n, at + n
        return runs

    @functools.cached_property
    def boundary(self) -> tuple[int, int]:
        """The numbers of rows at the top and at the bottom that cover what is read of every rank."""
        top = bottom = 0
        for run in self.runs:
            height = self.heights[run.src]
            middle, end = (height + 1) // 2, run.row + run.rows
            if run.row < middle:
                top = max(top, min(end, middle))
            if end > middle:
                bottom = max(bottom, height - max(run.row, middle))
        return top, bottom


def _lower_fetch(builder: ShardingBuilder, node: fx.Node, sources: dict[tuple[Any, ...], fx.Node]) -> None:
    f = _Fetch.of(node)
    x, dim = f.args.x, f.args.dim
    name, own = f"{node.name}_rows", _own(f.splits)
    with builder.before(node):
        if not any(s.before or s.after for s in f.splits):
            new = builder.emit(ops.assemble.default, x, x, dim, 0, 0, *own, name=name)
        else:
            source, new = _exchange(builder, f, sources)
            set_displaced(new, is_displaced(node))
            set_collective(new, _plan(new, source, f))
            if f.args.purpose != "output":
                before = per_rank(len(s.before) for s in f.splits)
                after = per_rank(len(s.after) for s in f.splits)
                if f.in_place:
                    new = builder.emit(ops.assemble_in_place.default, new, x, dim, before, *own, name=name)
                else:
                    new = builder.emit(ops.assemble.default, new, x, dim, before, after, *own, name=name)
    replace_node(node, new)


def _own(splits: Sequence[_Split]) -> tuple[Any, Any]:
    return per_rank(s.start for s in splits), per_rank(s.stop for s in splits)


def _exchange(builder: ShardingBuilder, f: _Fetch, sources: dict[tuple[Any, ...], fx.Node]) -> tuple[fx.Node, fx.Node]:
    top, bottom = f.boundary
    source = f.args.x
    if f.args.dim != _rows_dim(f) or any(top + bottom < h for h in f.heights):
        key = (f.args.x, f.args.dim, top, bottom)
        if key not in sources:
            sources[key] = builder.emit(
                ops.pack_boundary.default, f.args.x, f.args.dim, top, bottom, name=f"{f.node.name}_boundary"
            )
        source = sources[key]
    shape: list[Any] = [per_rank(sizes) for sizes in zip(*(t.shape for t in local_tensors(f.args.x)), strict=True)]
    del shape[f.args.dim]
    rows = per_rank(max(1, len(wanted)) for wanted in f.rows)
    shape.insert(_rows_dim(f), rows)
    return source, builder.emit(ops.exchange.default, source, shape, name=f"{f.node.name}_halo")


def _rows_dim(f: _Fetch) -> int:
    """Return the dim of the rows in the transferred tensors."""
    return f.args.dim if f.args.purpose == "output" else 0


def _plan(exchange: fx.Node, source: fx.Node, f: _Fetch) -> Exchange:
    top, bottom = f.boundary
    pieces: list[RowSlice] = []
    for run in f.runs:
        height, start = f.heights[run.src], run.row
        if source is not f.args.x and start >= top and top + bottom < height:  # its index in the packed boundary
            start += top - (height - bottom)
        p = pieces[-1] if pieces else None
        if p and p.dst == run.dst and p.src == run.src and p.start + p.rows == start and p.at + p.rows == run.at:
            pieces[-1] = dataclasses.replace(p, rows=p.rows + run.rows)
        else:
            pieces.append(RowSlice(run.src, run.dst, start, run.at, run.rows))
    return Exchange(
        name=exchange.name,
        module_path=f.args.module_path,
        purpose=f.args.purpose,
        source=source.name,
        dim=_rows_dim(f),
        specs=local_specs(source),
        results=local_specs(exchange),
        pieces=tuple(pieces),
        fill=f.args.fill,
        pattern=_pattern(pieces, len(f.splits)),
        displaced=is_displaced(f.node),
        source_rows=_source_rows(f, source is f.args.x),
        result_rows=tuple(_row_runs(rows or [-1]) for rows in f.rows),
    )


def _source_rows(f: _Fetch, unpacked: bool) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Return the global rows in the source of each rank: all of its own, or those at both ends."""
    top, bottom = f.boundary
    found: list[tuple[tuple[int, int], ...]] = []
    for start, end in itertools.pairwise(f.args.bounds):
        if unpacked or top + bottom >= end - start:
            found.append(((start, end - start),))
        else:
            ends = ((start, top), (end - bottom, bottom))
            found.append(tuple(run for run in ends if run[1]))
    return tuple(found)


def _row_runs(rows: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return the runs (first, count) of consecutive rows, and of rows that are all -1."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        first, count = runs[-1] if runs else (0, 0)
        if count and row == (-1 if first < 0 else first + count):
            runs[-1] = (first, count + 1)
        else:
            runs.append((row, 1))
    return tuple(runs)


def _pattern(pieces: Sequence[RowSlice], ranks: int) -> Any:
    pairs = {(p.src, p.dst) for p in pieces if p.src != p.dst}
    if not pairs:
        return "none"
    if all(abs(src - dst) == 1 for src, dst in pairs):
        return "neighbour"
    return "all_gather" if len(pairs) == ranks * (ranks - 1) else "general"
