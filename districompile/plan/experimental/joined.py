# SPDX-License-Identifier: Apache-2.0
"""Join the exact phase into one graph a rank, collectives included, for backends whose engines can hold them.

Libraries that put a collective into an engine have no send and receive, only collectives of equal contributions. Every
transfer therefore becomes an all-gather or, where the library has it and less is received, an all-to-all.

- All-gather: the contribution of a rank is flattened and padded to the longest contribution of all ranks, and each rank
  slices the rows that it reads out of the gathered tensor. A reduction is gathered and combined in rank order, as in
  every transport, so that all ranks have the same bits.
- All-to-all: a rank has one block for each rank, with the rows that this one reads, flattened and padded to the longest
  block of all.

Such a segment (:class:`~districompile.ir.segment.SegmentGraph` with ``collectives``) is an ordinary graph with open
ends: one output and one input for each collective, which the backend connects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from typing_extensions import assert_never

from districompile.ir.segment import InnerCollective, SegmentGraph
from districompile.ir.serialize import spec_of
from districompile.ir.spec import TensorSpec
from districompile.plan.plan import (
    Clear,
    Collective,
    Exchange,
    Publish,
    Reduction,
    RowSlice,
    Run,
    SaveState,
    Schedule,
    SegmentInterface,
    SliceInput,
    Start,
    Wait,
)
from districompile.plan.schedule import PartitionedPhase, Segment

aten = torch.ops.aten
NAME = "exact"
"""The name of the one segment."""


def whole_plan(program: PartitionedPhase, delivered: Sequence[str], ranks: int) -> Schedule:
    """Return the schedule of a phase that is one segment.

    ``delivered`` are the collectives whose results the other phase reads.
    """
    old = program.plan
    slices = [s for s in old.steps if isinstance(s, SliceInput)]
    saves = [s for s in old.steps if isinstance(s, SaveState)]
    segment = SegmentInterface(
        NAME,
        _inputs(program),
        _outputs(program, delivered),
        tuple(dict.fromkeys(w for s in old.segments.values() for w in s.weights)),
        tuple(str(r) for r in range(ranks)),
    )
    publish = [Publish(tuple(delivered))] if delivered else []
    values = {n: old.values[n] if n in old.values else program.collectives[n].results for n in segment.outputs}
    return Schedule((*slices, Run(NAME), *publish, *saves), {NAME: segment}, old.outputs, values)


def _inputs(program: PartitionedPhase) -> tuple[str, ...]:
    """Return the values from outside of all segments: inputs and slices of them."""
    made = {v for s in program.plan.segments.values() for v in s.outputs} | set(program.collectives)
    return tuple(dict.fromkeys(v for s in program.plan.segments.values() for v in s.inputs if v not in made))


def _outputs(program: PartitionedPhase, delivered: Sequence[str]) -> tuple[str, ...]:
    made = {v for s in program.plan.segments.values() for v in s.outputs} | set(program.collectives)
    wanted = [*program.plan.outputs, *program.states.values(), *delivered]
    return tuple(dict.fromkeys(v for v in wanted if v in made))


def whole_segment(
    program: PartitionedPhase, delivered: Sequence[str], rank: int, all_to_all: bool = False
) -> SegmentGraph:
    """Build the graph of a phase on one rank from a result of :func:`~districompile.plan.schedule.build_program`.

    ``all_to_all`` says whether the engine can hold all-to-alls. It has to be the same for all ranks.
    """
    return _Joiner(program, rank, all_to_all).join(_inputs(program), _outputs(program, delivered))


class _Joiner:
    """A builder of one graph from the graphs of a phase's segments and its collectives."""

    def __init__(self, program: PartitionedPhase, rank: int, all_to_all: bool) -> None:
        self._program, self._rank, self._all_to_all = program, rank, all_to_all
        self._graph = fx.Graph()
        self._values: dict[str, fx.Node] = {}  # by name of value
        self._weights: dict[str, fx.Node] = {}
        self._received: list[tuple[str, TensorSpec]] = []
        self._sent: list[tuple[str, fx.Node]] = []

    def join(self, inputs: Sequence[str], outputs: Sequence[str]) -> SegmentGraph:
        built = {name: segment.build(self._rank) for name, segment in self._program.segments.items()}
        specs = {n: s for b in built.values() for n, s in b.inputs}
        weights = {n: s for b in built.values() for n, s in b.weights}
        given = [(name, specs[name]) for name in inputs]
        pairs = [c for c in self._program.collectives.values() if gathered(c)]
        inner = tuple(
            InnerCollective(
                f"{c.name}.sent", f"{c.name}.received", len(c.specs), "all_to_all" if self._block(c) else "all_gather"
            )
            for c in pairs
        )
        received = [
            (i.received, TensorSpec((i.ranks * (self._block(c) or gathered(c)),), c.specs[0].dtype))
            for i, c in zip(inner, pairs, strict=True)
        ]
        for name, spec in (*given, *received):
            self._values[name] = self._placeholder(f"in_{len(self._values)}", spec)
        for name, spec in weights.items():
            self._weights[name] = self._placeholder(f"w_{len(self._weights)}", spec)
        for step in self._program.plan.steps:
            if isinstance(step, Run):
                self._inline(built[step.segment], self._program.segments[step.segment])
            elif isinstance(step, Start | Wait | Publish):
                for name in step.collectives:
                    if name not in self._values:
                        self._collective(self._program.collectives[name])
            elif not isinstance(step, SliceInput | SaveState | Clear):
                assert_never(step)
        names = (*outputs, *(i.sent for i in inner))
        ends = [self._values[name] for name in names]
        self._graph.output(tuple(ends))
        module = fx.GraphModule(torch.nn.Module(), self._graph)
        return SegmentGraph(
            NAME, module, (*given, *received), tuple(weights.items()),
            tuple((n, spec_of(e)) for n, e in zip(names, ends, strict=True)), inner,
        )  # fmt: skip

    def _placeholder(self, name: str, spec: TensorSpec) -> fx.Node:
        node = self._graph.placeholder(name)
        node.meta["val"] = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        return node

    def _inline(self, built: SegmentGraph, segment: Segment) -> None:
        env: dict[fx.Node, fx.Node] = {}
        names = [n for n, _ in built.inputs] + [n for n, _ in built.weights]
        count = len(built.inputs)
        for i, node in enumerate(n for n in built.graph.graph.nodes if n.op == "placeholder"):
            env[node] = (self._values if i < count else self._weights)[names[i]]
        for node in built.graph.graph.nodes:
            if node.op == "call_function":
                env[node] = self._graph.node_copy(node, env.__getitem__)
        output = built.graph.graph.output_node().args[0]
        assert isinstance(output, tuple)
        for (name, _), node in zip(built.outputs, output, strict=True):
            assert isinstance(node, fx.Node)
            self._values[name] = env[node]

    def _collective(self, c: Collective) -> None:
        """Compute the result of ``c`` under its name. This rank's contribution becomes an output of the graph."""
        length = gathered(c)
        if not length:
            self._values[c.name] = self._assemble(c, None, 0) if isinstance(c, Exchange) else self._values[c.source]
            return
        received = self._values[f"{c.name}.received"]
        if isinstance(c, Reduction):
            self._values[f"{c.name}.sent"] = self._flat([self._values[c.source]], length, c)
            self._values[c.name] = self._combine(c, received, length)
            return
        if block := self._block(c):
            rows = [[self._rows(c, p) for p in _between(c, self._rank, d)] for d in range(len(c.specs))]
            sent = self._call(aten.cat.default, [self._flat(parts, block, c) for parts in rows], 0)
        else:
            sent = self._flat([self._values[c.source]], length, c)
        self._values[f"{c.name}.sent"] = sent
        self._values[c.name] = self._assemble(c, received, block or length)

    def _block(self, c: Collective) -> int:
        """Return the elements of a block if ``c`` becomes an all-to-all, else 0."""
        if not self._all_to_all or not isinstance(c, Exchange):
            return 0
        pairs = [(s, d) for s in range(len(c.specs)) for d in range(len(c.specs)) if s != d]
        block = max(sum(_elements(c, p) for p in _between(c, s, d)) for s, d in pairs)
        return block if block < gathered(c) else 0

    def _flat(self, parts: Sequence[fx.Node], length: int, c: Collective) -> fx.Node:
        """Flatten ``parts`` one after the other, and pad them with zeros to ``length``."""
        if not parts:
            return self._call(aten.full.default, [length], 0.0, dtype=c.specs[0].dtype)
        flat = [self._call(aten.reshape.default, part, [-1]) for part in parts]
        whole = flat[0] if len(flat) == 1 else self._call(aten.cat.default, flat, 0)
        missing = length - whole.meta["val"].numel()
        return self._call(aten.constant_pad_nd.default, whole, [0, missing], 0.0) if missing else whole

    def _assemble(self, c: Exchange, received: fx.Node | None, length: int) -> fx.Node:
        """Concatenate the rows that this rank reads, in order, with ``fill`` where there is none."""
        result = c.results[self._rank]
        parts: list[fx.Node] = []
        end = 0
        for piece in sorted((p for p in c.pieces if p.dst == self._rank and p.rows), key=lambda p: p.at):
            if piece.at > end:
                parts.append(self._fill(c, result, piece.at - end))
            parts.append(self._piece(c, received, length, piece))
            end = piece.at + piece.rows
        if end < result.shape[c.dim]:
            parts.append(self._fill(c, result, result.shape[c.dim] - end))
        whole = parts[0] if len(parts) == 1 else self._call(aten.cat.default, parts, c.dim)
        reads = any(p.dst == self._rank != p.src and p.rows for p in c.pieces)
        return whole if reads or received is None else self._keep(whole, received)

    def _keep(self, value: fx.Node, received: fx.Node) -> fx.Node:
        """Return ``value``, made to depend on ``received``, which this rank does not read.

        A compiler would remove the collective on this rank alone, and all others would wait for it. No value is below
        the smallest one, so that the maximum is ``value``.
        """
        dtype = value.meta["val"].dtype
        if dtype == torch.bool:
            return value
        least = -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min
        smallest = self._call(aten.full.default, [1], least, dtype=dtype)
        one = self._call(aten.slice.Tensor, received, 0, 0, 1)
        return self._call(aten.maximum.default, value, self._call(aten.minimum.default, one, smallest))

    def _piece(self, c: Exchange, received: fx.Node | None, length: int, piece: RowSlice) -> fx.Node:
        """Return the rows of a piece: own ones, or received ones, of which each rank's take ``length`` elements."""
        if piece.src == self._rank or received is None:
            return self._rows(c, piece)
        spec = c.specs[piece.src]
        if not self._block(c):
            source = self._contribution(received, length, piece.src, spec)
            return self._slice(c, source, piece, spec)
        sent = _between(c, piece.src, self._rank)
        begin = piece.src * length + sum(_elements(c, p) for p in sent[: sent.index(piece)])
        flat = self._call(aten.slice.Tensor, received, 0, begin, begin + _elements(c, piece))
        return self._call(aten.reshape.default, flat, [*spec.shape[: c.dim], piece.rows, *spec.shape[c.dim + 1 :]])

    def _rows(self, c: Exchange, piece: RowSlice) -> fx.Node:
        """Return the rows of a piece that this rank has itself."""
        return self._slice(c, self._values[c.source], piece, c.specs[self._rank])

    def _slice(self, c: Exchange, source: fx.Node, piece: RowSlice, spec: TensorSpec) -> fx.Node:
        if piece.start == 0 and piece.rows == spec.shape[c.dim]:
            return source
        return self._call(aten.slice.Tensor, source, c.dim, piece.start, piece.start + piece.rows)

    def _contribution(self, received: fx.Node, length: int, src: int, spec: TensorSpec) -> fx.Node:
        begin = src * length
        flat = self._call(aten.slice.Tensor, received, 0, begin, begin + math.prod(spec.shape))
        return self._call(aten.reshape.default, flat, list(spec.shape))

    def _fill(self, c: Exchange, result: TensorSpec, rows: int) -> fx.Node:
        shape = [*result.shape[: c.dim], rows, *result.shape[c.dim + 1 :]]
        return self._call(aten.full.default, shape, c.fill, dtype=result.dtype)

    def _combine(self, c: Reduction, received: fx.Node, length: int) -> fx.Node:
        """Combine contributions as :func:`districompile.runtime.transports.messages.combine` does.

        They are combined in rank order, and half precision is summed in float32.
        """
        dtype = c.specs[0].dtype
        wide = torch.float32 if c.op == "sum" and dtype in (torch.float16, torch.bfloat16) else dtype
        join = {"sum": aten.add.Tensor, "max": aten.maximum.default, "min": aten.minimum.default}[c.op]
        total: fx.Node | None = None
        for src, spec in enumerate(c.specs):
            part = self._contribution(received, length, src, spec)
            if wide != dtype:
                part = self._call(aten._to_copy.default, part, dtype=wide)
            total = part if total is None else self._call(join, total, part)
        assert total is not None
        return self._call(aten._to_copy.default, total, dtype=dtype) if wide != dtype else total

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self._graph.call_function(target, args, kwargs)
        a, k = fx.map_arg((args, kwargs), lambda n: torch.empty_like(n.meta["val"], device="meta"))
        with torch.device("meta"):
            node.meta["val"] = target(*a, **k)
        return node


def _between(c: Exchange, src: int, dst: int) -> list[RowSlice]:
    """Return what ``src`` sends to ``dst``, another rank, in the order in which ``dst`` has it."""
    return sorted((p for p in c.pieces if (p.src, p.dst) == (src, dst) and p.rows and src != dst), key=lambda p: p.at)


def _elements(c: Exchange, piece: RowSlice) -> int:
    shape = c.specs[piece.src].shape
    return piece.rows * math.prod(shape[: c.dim] + shape[c.dim + 1 :])


def gathered(c: Collective) -> int:
    """Return the elements of a contribution to the all-gather of ``c``: the longest source, or 0 without transfer."""
    if isinstance(c, Exchange) and not any(p.src != p.dst and p.rows for p in c.pieces):
        return 0
    return max(math.prod(spec.shape) for spec in c.specs)


def delivered(*later: Schedule) -> tuple[str, ...]:
    """Return the collectives that later phases read before they start them: the exact phase leaves these."""
    waits = [(phase, name) for phase in later for s in phase.steps if isinstance(s, Wait) for name in s.collectives]
    return tuple(dict.fromkeys(name for phase, name in waits if name in phase.waited_before_posted))
