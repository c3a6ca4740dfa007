# SPDX-License-Identifier: Apache-2.0
"""Build the schedule of a phase from its lowered graph: segments, and steps that run them and transfer values.

A segment is a run of nodes, in graph order, that becomes one engine. An exact collective ends a segment only where its
result is read. Nodes that do not need the result are computed before that, and collectives that are pending together
are transferred together. Displaced collectives end no segment, because their results are there from the previous call.
Long phases are divided further (:mod:`districompile.plan.cuts`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from typing_extensions import assert_never

from districompile.errors import ConvertError
from districompile.ir.flops import flops_of
from districompile.ir.graph import per_ranks_of
from districompile.ir.layout import at_rank
from districompile.ir.ops import ops
from districompile.ir.segment import SegmentGraph
from districompile.ir.spec import TensorSpec
from districompile.plan.cuts import COLLECTIVES, Cuts, divided_like
from districompile.plan.levels import by_level
from districompile.plan.plan import (
    Clear,
    Collective,
    Publish,
    Run,
    SaveState,
    Schedule,
    SegmentInterface,
    SliceInput,
    Start,
    Step,
    Wait,
)

aten = torch.ops.aten
_PLACING = {ops.assemble.default, ops.assemble_in_place.default}


@dataclasses.dataclass
class Segment:
    """Nodes of the SPMD graph that become one engine per distinct rank; ``inputs`` and ``outputs`` are nodes."""

    name: str
    nodes: list[fx.Node]
    inputs: list[fx.Node] = dataclasses.field(default_factory=list)
    outputs: list[fx.Node] = dataclasses.field(default_factory=list)
    weights: list[fx.Node] = dataclasses.field(default_factory=list)

    @property
    def flops(self) -> float:
        """The FLOPs of rank 0."""
        return sum(flops_of(n, 0) for n in self.nodes)

    def plan(self) -> SegmentInterface:
        return SegmentInterface(
            self.name,
            tuple(value_name(n) for n in self.inputs),
            tuple(value_name(n) for n in self.outputs),
            tuple(dict.fromkeys(str(n.target) for n in self.weights)),
        )

    def rank_classes(self, ranks: int) -> list[int]:
        """Return for each rank the first rank that has the same graph."""
        keys: dict[Any, int] = {}
        out = []
        for r in range(ranks):
            key = (
                tuple(tuple(n.meta["local"][r].shape) for n in self.inputs),
                tuple(repr(p.values[r]) for n in self.nodes for p in per_ranks_of(n)),
            )
            out.append(keys.setdefault(key, r))
        return out

    def build(self, rank: int) -> SegmentGraph:
        """Build the segment's graph for one rank."""
        return _specialise(self, rank)


@dataclasses.dataclass
class PartitionedPhase:
    """The segments of a phase with their graphs, and its schedule ``plan``."""

    segments: dict[str, Segment]
    plan: Schedule
    collectives: dict[str, Collective]
    states: dict[str, str]  # state that is read -> the value saved under its name, here or in the exact phase
    initial: dict[str, str]  # of these, those for which the exact phase saves another value


def state_name(node: fx.Node) -> str:
    """Return the state that a ``last_step`` node, or a placeholder that recalls a value, reads."""
    source = node.meta.get("recalls") or node.args[0].name  # type: ignore[union-attr]
    return f"{source}.last_step"


def value_name(node: fx.Node) -> str:
    """Return the name of a node's tensor in a schedule."""
    return state_name(node) if node.target is ops.last_step.default or "recalls" in node.meta else node.name


def build_program(
    graph: fx.Graph, phase: str, parts: int = 1, states: dict[str, str] | None = None, cleared: Sequence[str] = (),
    like: PartitionedPhase | None = None,
) -> PartitionedPhase:  # fmt: skip
    """Divide ``graph`` into segments, and schedule them.

    ``states`` maps each state that this phase must save for another phase, such as the exact one for the displaced
    one, to its value. ``cleared`` are collectives of later phases that have received nothing behind this phase.
    ``like``: a phase to be divided alike, if no rank waits for another.
    """
    displaced = {
        n for n in graph.nodes if phase != "exact" and n.target in COLLECTIVES and n.meta["collective"].displaced
    }
    kept = dict(states or {})
    for node in graph.nodes:
        if node.target is ops.last_step.default:
            kept[state_name(node)] = node.args[0].name
    recalled = {state_name(n): str(n.meta["recalls"]) for n in graph.nodes if "recalls" in n.meta}
    kept |= {state_name(n): str(n.meta["recalls"]) for n in graph.nodes if n.meta.get("carried")}
    _check_outputs(graph)
    slices = _takes(graph)
    padded = {n for n in graph.nodes if n.users and all(u in slices for u in n.users)}  # the slices do the padding
    outside = displaced | set(slices) | padded
    alike = None if like is None else _segments_like(graph, outside, like, phase)
    segments = alike or _segments(graph, outside, parts, phase)
    _interfaces(segments, set(kept.values()))
    steps = [*slices.values(), *_steps(graph, segments, displaced)]
    steps += [Clear(tuple(cleared))] if cleared else []
    steps += [SaveState(state, value) for state, value in kept.items()]
    outputs = tuple(value_name(n) for n in graph.output_node().args[0])  # type: ignore[arg-type, union-attr]
    values = {value_name(n): _specs(n) for s in segments for n in s.outputs}
    plan = Schedule(tuple(steps), {s.name: s.plan() for s in segments}, outputs, values)
    collectives = {n.name: n.meta["collective"] for n in graph.nodes if n.target in COLLECTIVES}
    initial = {state_name(n): n.meta["initial"] for n in graph.nodes if "initial" in n.meta}
    return PartitionedPhase({s.name: s for s in segments}, plan, collectives, {**kept, **recalled}, initial)


def _takes(graph: fx.Graph) -> dict[fx.Node, Step]:
    """Return slices of inputs, which differ by rank: outside of segments, so that equal ranks have equal engines."""
    slices: dict[fx.Node, Step] = {}
    for node in graph.nodes:
        if node.target is not aten.slice.Tensor or len(node.args) != 4:
            continue
        source, dim, start, stop = node.args
        above = below = 0
        fill = 0.0
        if source.target is aten.constant_pad_nd.default and not any(source.args[1][:-2]):
            source, sides, fill = source.args
            above, below = sides[-2:]
            if dim != source.meta["local"][0].ndim - len(sides) // 2 or above < 0 or below < 0:
                continue
        if source.op != "placeholder" or "recalls" in source.meta:
            continue
        ranks = range(len(node.meta["local"]))
        sizes = [t.shape[dim] for t in node.meta["local"]]
        starts = tuple(at_rank(start, r) for r in ranks)
        stops = tuple(a + n for a, n in zip(starts, sizes, strict=True))
        if all(a >= 0 and b == at_rank(stop, r) for r, a, b in zip(ranks, starts, stops, strict=True)):
            slices[node] = SliceInput(node.name, source.name, dim, starts, stops, above, below, float(fill))
    return slices


def _check_outputs(graph: fx.Graph) -> None:
    for node in graph.output_node().args[0]:  # type: ignore[union-attr]
        if not isinstance(node, fx.Node) or node.op == "get_attr":
            raise ConvertError("the module returns one of its own weights: return something computed from the inputs")


def _is_compute(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target not in COLLECTIVES and node.target is not ops.last_step.default


def _segments(graph: fx.Graph, outside: set[fx.Node], parts: int, phase: str) -> list[Segment]:
    """Divide the nodes into segments.

    ``outside`` are nodes that belong to no segment and wait for nothing: displaced collectives, slices of inputs.
    """
    work = {n: flops_of(n, 0) for n in graph.nodes if _is_compute(n)}
    cuts = Cuts(phase, work, outside, parts)
    segments: list[Segment] = []
    current: list[fx.Node] = []
    waiting: set[fx.Node] = set()  # exact collectives whose transfers may be pending
    placing: list[fx.Node] = []  # assemblies of their results, which can wait until a node reads them
    own = 0.0  # the work of ``current``

    def close() -> None:
        nonlocal own
        if current:
            segments.append(Segment(f"{phase}{len(segments)}", list(current)))
        current[:], own = placing, 0.0
        placing.clear()
        waiting.clear()

    exact = {n for n in graph.nodes if n.target in COLLECTIVES and n not in outside}
    for node in by_level(graph, exact) if phase == "exact" else graph.nodes:
        reads_waiting = any(source in waiting or source in placing for source in node.all_input_nodes)
        if node.target in COLLECTIVES and node not in outside:
            if reads_waiting:  # a transfer of another transfer's result
                close()
            waiting.add(node)
        elif node.target in _PLACING and node.args[0] in waiting and node.args[1] not in placing:
            placing.append(node)
        elif _is_compute(node) and node not in outside:
            if reads_waiting:
                close()
            current.append(node)
            own += work[node]
            if cuts.after(node, current, own, len(segments), bool(waiting or placing)):
                close()
    close()
    close()  # the last assemblies
    return segments


def _segments_like(
    graph: fx.Graph, outside: set[fx.Node], like: PartitionedPhase, phase: str
) -> list[Segment] | None:  # fmt: skip
    if any(n.target in COLLECTIVES for n in graph.nodes):
        return None
    nodes = [n for n in graph.nodes if _is_compute(n) and n not in outside]
    divided = divided_like(nodes, [{n.name for n in s.nodes} for s in like.segments.values()])
    return None if divided is None else [Segment(f"{phase}{i}", part) for i, part in enumerate(divided)]


def _interfaces(segments: Sequence[Segment], kept: set[str]) -> None:
    """Set inputs, outputs and weights of every segment, in the order in which its nodes read and give them.

    Where they come from does not matter, so that equal parts of a network share an engine.
    """
    home = {n: s for s in segments for n in s.nodes}
    for s in segments:
        sources = dict.fromkeys(x for n in s.nodes for x in n.all_input_nodes if home.get(x) is not s)
        s.weights = [x for x in sources if x.op == "get_attr"]
        s.inputs = [x for x in sources if x.op != "get_attr"]
        s.outputs = [n for n in s.nodes if n.name in kept or any(home.get(u) is not s for u in n.users)]


def _steps(graph: fx.Graph, segments: Sequence[Segment], displaced: set[fx.Node]) -> Iterator[Step]:
    position = {n: i for i, s in enumerate(segments) for n in s.nodes}
    order = {n: i for i, n in enumerate(graph.nodes)}
    collectives = [n for n in graph.nodes if n.target in COLLECTIVES]
    wait_at: dict[int, list[fx.Node]] = {}
    start_after: dict[int, list[fx.Node]] = {}
    late: list[fx.Node] = []
    for c in collectives:
        source = c.args[0]
        assert isinstance(source, fx.Node)
        after = position.get(source, -1)
        uses = [position[u] for u in c.users if u in position]
        if c in displaced:
            # Read the previous call's values before this call's are sent
            wait_at.setdefault(min([*uses, max(after, 0)]), []).append(c)
            start_after.setdefault(after, []).append(c)
            continue
        if source.target in COLLECTIVES:
            after = max(after, min([position[u] for u in source.users if u in position], default=len(segments)) - 1)
        start_after.setdefault(after, []).append(c)
        if uses:
            wait_at.setdefault(min(uses), []).append(c)
        else:
            late.append(c)

    def starts(i: int) -> Iterator[Step]:
        for group in (
            [c for c in start_after.get(i, []) if c not in displaced],
            [c for c in start_after.get(i, []) if c in displaced],
        ):
            if group:
                yield Start(tuple(c.name for c in group))

    yield from starts(-1)
    for i, s in enumerate(segments):
        if i in wait_at:
            yield Wait(tuple(c.name for c in sorted(wait_at[i], key=order.__getitem__)))
        yield Run(s.name)
        yield from starts(i)
    if late:
        yield Wait(tuple(c.name for c in late))


def _specialise(segment: Segment, rank: int) -> SegmentGraph:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    inputs, weights, outputs = [], [], []
    for node in segment.inputs:
        env[node] = _placeholder(graph, node, f"in_{node.name}", rank)
        inputs.append((value_name(node), _spec(node, rank)))
    first: dict[str, fx.Node] = {}
    for node in segment.weights:
        target = str(node.target)
        if target not in first:
            first[target] = _placeholder(graph, node, f"w_{node.name}", rank)
            weights.append((target, _spec(node, rank)))
        env[node] = first[target]
    for node in segment.nodes:
        args, kwargs = at_rank((node.args, node.kwargs), rank)
        a, k = fx.map_arg((args, kwargs), lambda n: env[n])
        # A segment's inputs are dense, whatever their strides at capture: a view of those may be impossible here
        operator: Any = aten.reshape.default if node.target is aten.view.default else node.target
        new = graph.create_node("call_function", operator, a, k, name=node.name)
        new.meta["val"] = node.meta["local"][rank]
        for key in ("stack_trace", "module_path", "nn_module_stack"):
            if key in node.meta:
                new.meta[key] = node.meta[key]
        env[node] = new
    for node in segment.outputs:
        outputs.append((value_name(node), _spec(node, rank)))
    graph.output(tuple(env[n] for n in segment.outputs))
    module = fx.GraphModule(torch.nn.Module(), graph)
    return SegmentGraph(segment.name, module, tuple(inputs), tuple(weights), tuple(outputs))


def _placeholder(graph: fx.Graph, node: fx.Node, name: str, rank: int) -> fx.Node:
    new = graph.placeholder(name)
    new.meta["val"] = node.meta["local"][rank]
    return new


def _specs(node: fx.Node) -> tuple[TensorSpec, ...]:
    return tuple(_spec(node, rank) for rank in range(len(node.meta["local"])))


def _spec(node: fx.Node, rank: int) -> TensorSpec:
    value = node.meta["local"][rank]
    if not isinstance(value, Tensor):
        raise ConvertError(f"{node.name} is no tensor, and is used across a segment's border")
    return TensorSpec(tuple(int(s) for s in value.shape), value.dtype)


def check_plan(phase: str, plan: Schedule, collectives: dict[str, Collective], inputs: Iterable[str]) -> None:
    """Check that the steps of a phase fit each other.

    Every value exists before it is read. Every collective is started once and, unless it is displaced, waited for after
    its start. Every state is written once. Raise :class:`ConvertError` otherwise.
    """
    known = set(inputs)
    posted: list[str] = []
    states: list[str] = []
    for step in plan.steps:
        for value in step.reads(plan, collectives):
            if value not in known and not (isinstance(step, Run) and value.endswith(".last_step")):
                raise ConvertError(f"{phase}: {_named(step)} reads {value} before it exists")
        if isinstance(step, Start):
            for c in step.collectives:
                if c in posted:
                    raise ConvertError(f"{phase}: {c} is posted twice")
                posted.append(c)
        elif isinstance(step, Wait):
            for c in step.collectives:
                if c not in posted and not (phase != "exact" and collectives[c].displaced):
                    raise ConvertError(f"{phase}: {c} is waited for before it is posted")
        elif isinstance(step, SaveState):
            if step.state in states:
                raise ConvertError(f"{phase}: state {step.state} is written twice")
            states.append(step.state)
        known.update(step.writes(plan, collectives))
    missing_outputs = [v for v in plan.outputs if v not in known]
    if missing_outputs:
        raise ConvertError(f"{phase}: output {missing_outputs[0]} does not exist")


def _named(step: Step) -> str:
    """Return what error messages call a step."""
    if isinstance(step, SliceInput):
        return f"the slice {step.value}"
    if isinstance(step, Run):
        return f"segment {step.segment}"
    if isinstance(step, SaveState):
        return f"state {step.state}"
    if isinstance(step, Start | Wait | Publish | Clear):
        return ", ".join(step.collectives)
    assert_never(step)
