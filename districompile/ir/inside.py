"""The exact phase as one graph a rank, with its collectives inside: for backends whose engines can hold them.

Libraries that put a collective into an engine have no send and receive, only collectives of equal contributions. So
every transfer becomes an all-gather: what a rank contributes is laid flat and padded to the longest contribution of
all ranks, and each rank takes the pieces that it wants out of what came together. A reduction is gathered and combined
in rank order, as every transport does it, so that all ranks have the same bits.

Such a segment (:class:`~districompile.backends.base.BuildSegment` with ``gathers``) is an ordinary graph with cut ends:
one output and one input for each all-gather, which the backend joins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from districompile.backends.base import BuildSegment
from districompile.ir.plan import (
    Collective,
    Deliver,
    Exchange,
    Keep,
    PhasePlan,
    Post,
    Reduction,
    Run,
    SegmentPlan,
    Take,
    TensorSpec,
    Wait,
)
from districompile.ir.program import PhaseProgram, Segment
from districompile.ir.serialize import spec_of

aten = torch.ops.aten
NAME = "warmup"
"""Of the one segment."""


def whole_plan(program: PhaseProgram, delivered: Sequence[str], ranks: int) -> PhasePlan:
    """The plan of a phase that is one segment. ``delivered``: collectives whose results the other phase reads."""
    old = program.plan
    takes = [s for s in old.steps if isinstance(s, Take)]
    keeps = [s for s in old.steps if isinstance(s, Keep)]
    segment = SegmentPlan(
        NAME,
        _inputs(program),
        _outputs(program, delivered),
        tuple(dict.fromkeys(w for s in old.segments.values() for w in s.weights)),
        tuple(str(r) for r in range(ranks)),
    )
    deliver = [Deliver(tuple(delivered))] if delivered else []
    values = {n: old.values[n] if n in old.values else program.collectives[n].results for n in segment.outputs}
    return PhasePlan((*takes, Run(NAME), *deliver, *keeps), {NAME: segment}, old.outputs, values)


def _inputs(program: PhaseProgram) -> tuple[str, ...]:
    """Values from outside of all segments: inputs and slices of them."""
    made = {v for s in program.plan.segments.values() for v in s.outputs} | set(program.collectives)
    return tuple(dict.fromkeys(v for s in program.plan.segments.values() for v in s.inputs if v not in made))


def _outputs(program: PhaseProgram, delivered: Sequence[str]) -> tuple[str, ...]:
    made = {v for s in program.plan.segments.values() for v in s.outputs} | set(program.collectives)
    wanted = [*program.plan.outputs, *program.states.values(), *delivered]
    return tuple(dict.fromkeys(v for v in wanted if v in made))


def whole_segment(program: PhaseProgram, delivered: Sequence[str], rank: int) -> BuildSegment:
    """The graph of a phase on one rank, from what :func:`~districompile.ir.program.build_program` made of it."""
    return _Joiner(program, rank).join(_inputs(program), _outputs(program, delivered))


class _Joiner:
    """Puts the graphs of a phase's segments and its collectives into one graph."""

    def __init__(self, program: PhaseProgram, rank: int) -> None:
        self._program, self._rank = program, rank
        self._graph = fx.Graph()
        self._values: dict[str, fx.Node] = {}  # by the name of the value
        self._weights: dict[str, fx.Node] = {}
        self._received: list[tuple[str, TensorSpec]] = []
        self._sent: list[tuple[str, fx.Node]] = []

    def join(self, inputs: Sequence[str], outputs: Sequence[str]) -> BuildSegment:
        built = {name: segment.build(self._rank) for name, segment in self._program.segments.items()}
        specs = {n: s for b in built.values() for n, s in b.inputs}
        weights = {n: s for b in built.values() for n, s in b.weights}
        given = [(name, specs[name]) for name in inputs]
        pairs = [c for c in self._program.collectives.values() if gathered(c)]
        gathers = tuple((f"{c.name}.sent", f"{c.name}.received") for c in pairs)
        received = [
            (b, TensorSpec((len(c.specs) * gathered(c),), c.specs[0].dtype))
            for (_, b), c in zip(gathers, pairs, strict=True)
        ]
        for name, spec in (*given, *received):
            self._values[name] = self._placeholder(f"in_{len(self._values)}", spec)
        for name, spec in weights.items():
            self._weights[name] = self._placeholder(f"w_{len(self._weights)}", spec)
        for step in self._program.plan.steps:
            if isinstance(step, Run):
                self._inline(built[step.segment], self._program.segments[step.segment])
            for name in getattr(step, "collectives", ()):
                if name not in self._values:
                    self._collective(self._program.collectives[name])
        ends = [self._values[name] for name in (*outputs, *(a for a, _ in gathers))]
        self._graph.output(tuple(ends))
        module = fx.GraphModule(torch.nn.Module(), self._graph)
        return BuildSegment(
            NAME, module, (*given, *received), tuple(weights.items()),
            tuple((n, spec_of(e)) for n, e in zip((*outputs, *(a for a, _ in gathers)), ends, strict=True)), gathers,
        )  # fmt: skip

    def _placeholder(self, name: str, spec: TensorSpec) -> fx.Node:
        node = self._graph.placeholder(name)
        node.meta["val"] = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        return node

    def _inline(self, built: BuildSegment, segment: Segment) -> None:
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
        """The result of ``c`` under its name; what this rank contributes is an output of the graph."""
        length = gathered(c)
        if not length:
            self._values[c.name] = self._assemble(c, None, 0) if isinstance(c, Exchange) else self._values[c.source]
            return
        size = math.prod(c.specs[self._rank].shape)
        flat = self._call(aten.reshape.default, self._values[c.source], [-1])
        if size < length:
            flat = self._call(aten.constant_pad_nd.default, flat, [0, length - size], 0.0)
        self._values[f"{c.name}.sent"] = flat
        received = self._values[f"{c.name}.received"]
        if isinstance(c, Exchange):
            self._values[c.name] = self._assemble(c, received, length)
        else:
            self._values[c.name] = self._combine(c, received, length)

    def _assemble(self, c: Exchange, received: fx.Node | None, length: int) -> fx.Node:
        """The rows this rank wants, in order; ``fill`` where none come."""
        result = c.results[self._rank]
        parts: list[fx.Node] = []
        end = 0
        for piece in sorted((p for p in c.pieces if p.dst == self._rank and p.rows), key=lambda p: p.at):
            if piece.at > end:
                parts.append(self._fill(c, result, piece.at - end))
            parts.append(self._piece(c, received, length, piece.src, piece.start, piece.rows))
            end = piece.at + piece.rows
        if end < result.shape[c.dim]:
            parts.append(self._fill(c, result, result.shape[c.dim] - end))
        return parts[0] if len(parts) == 1 else self._call(aten.cat.default, parts, c.dim)

    def _piece(self, c: Exchange, received: fx.Node | None, length: int, src: int, start: int, rows: int) -> fx.Node:
        spec = c.specs[src]
        if src == self._rank or received is None:
            whole = self._values[c.source]
        else:
            whole = self._contribution(received, length, src, spec)
        if start == 0 and rows == spec.shape[c.dim]:
            return whole
        return self._call(aten.slice.Tensor, whole, c.dim, start, start + rows)

    def _contribution(self, received: fx.Node, length: int, src: int, spec: TensorSpec) -> fx.Node:
        begin = src * length
        flat = self._call(aten.slice.Tensor, received, 0, begin, begin + math.prod(spec.shape))
        return self._call(aten.reshape.default, flat, list(spec.shape))

    def _fill(self, c: Exchange, result: TensorSpec, rows: int) -> fx.Node:
        shape = [*result.shape[: c.dim], rows, *result.shape[c.dim + 1 :]]
        return self._call(aten.full.default, shape, c.fill, dtype=result.dtype)

    def _combine(self, c: Reduction, received: fx.Node, length: int) -> fx.Node:
        """As :func:`districompile.runtime.transport.combine`: in rank order, half precision summed in float32."""
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


def gathered(c: Collective) -> int:
    """Elements that every rank contributes to the all-gather of ``c``: the longest source, or 0 if nothing travels."""
    if isinstance(c, Exchange) and not any(p.src != p.dst and p.rows for p in c.pieces):
        return 0
    return max(math.prod(spec.shape) for spec in c.specs)


def run_joined(segments: Sequence[BuildSegment], values: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Compute a whole phase on all ranks in this process: the yardstick of engines with collectives inside.

    ``segments`` and ``values`` (inputs and weights by name) are by rank; gives each rank's outputs by name. Ranks take
    turns from one all-gather to the next: their graphs hold the same ones in the same order.
    """
    runs = [_Run(s, v) for s, v in zip(segments, values, strict=True)]
    for sent, received in segments[0].gathers:
        together = torch.cat([run.until(sent) for run in runs])
        for run in runs:
            run.give(received, together)
    return [run.outputs() for run in runs]


class _Run:
    """One rank's graph, computed as far as it is asked for."""

    def __init__(self, segment: BuildSegment, values: Mapping[str, Tensor]) -> None:
        self._segment = segment
        names = [n for n, _ in (*segment.inputs, *segment.weights)]
        holders = [n for n in segment.graph.graph.nodes if n.op == "placeholder"]
        self._holder = dict(zip(names, holders, strict=True))
        self._env: dict[fx.Node, Any] = {self._holder[n]: v for n, v in values.items() if n in self._holder}
        ends = segment.graph.graph.output_node().args[0]
        assert isinstance(ends, tuple)
        self._ends: dict[str, Any] = {n: e for (n, _), e in zip(segment.outputs, ends, strict=True)}

    def give(self, name: str, value: Tensor) -> None:
        self._env[self._holder[name]] = value

    def until(self, name: str) -> Tensor:
        """The output ``name``, from what was given so far."""
        pending = [self._ends[name]]
        while pending:
            node = pending[-1]
            missing = [n for n in node.all_input_nodes if n not in self._env]
            if node in self._env or not missing:
                pending.pop()
                if node not in self._env:
                    args, kwargs = fx.map_arg((node.args, node.kwargs), self._env.__getitem__)
                    self._env[node] = node.target(*args, **kwargs)
            else:
                pending += missing
        value: Tensor = self._env[self._ends[name]]
        return value

    def outputs(self) -> dict[str, Tensor]:
        inner = {a for a, _ in self._segment.gathers}
        return {name: self.until(name) for name, _ in self._segment.outputs if name not in inner}


def delivered(steady: PhasePlan) -> tuple[str, ...]:
    """Collectives whose results the steady phase reads before it posts them itself: the exact phase leaves those."""
    posted: set[str] = set()
    found: dict[str, None] = {}
    for step in steady.steps:
        if isinstance(step, Post):
            posted.update(step.collectives)
        elif isinstance(step, Wait):
            found.update(dict.fromkeys(n for n in step.collectives if n not in posted))
    return tuple(found)
