"""From a lowered graph to a phase's program: segments, and the steps that run them and move bytes between them.

A segment is a run of nodes, in graph order, that becomes one engine. An exact collective ends a segment only when its
result is needed: what can be computed meanwhile is, and collectives that are waiting together travel together.
Displaced collectives end no segment: their results are there from the previous call. ``parts`` cuts long phases into
pieces of about equal work, so that what a piece sends can leave before the call ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from districompile.backends.base import BuildSegment
from districompile.errors import ConvertError
from districompile.flops import flops_of
from districompile.ir.layout import at_rank
from districompile.ir.ops import ops
from districompile.ir.plan import Collective, Keep, PhasePlan, Post, Run, SegmentPlan, Step, Take, TensorSpec, Wait
from districompile.ir.walk import per_ranks_of

aten = torch.ops.aten
_COLLECTIVES = (ops.exchange.default, ops.reduce.default)
_FLOPS_PER_BYTE = 1000  # that a GPU does while it sends a byte: an H100 250 TFLOP/s of a UNet, and 300 GB/s
_PLACING = {ops.place.default, ops.insert.default}


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
        """Of rank 0."""
        return sum(flops_of(n, 0) for n in self.nodes)

    def plan(self) -> SegmentPlan:
        return SegmentPlan(
            self.name,
            tuple(value_name(n) for n in self.inputs),
            tuple(value_name(n) for n in self.outputs),
            tuple(dict.fromkeys(str(n.target) for n in self.weights)),
        )

    def rank_classes(self, ranks: int) -> list[int]:
        """For each rank, the first rank that has the same graph."""
        keys: dict[Any, int] = {}
        out = []
        for r in range(ranks):
            key = (
                tuple(tuple(n.meta["local"][r].shape) for n in self.inputs),
                tuple(repr(p.values[r]) for n in self.nodes for p in per_ranks_of(n)),
            )
            out.append(keys.setdefault(key, r))
        return out

    def build(self, rank: int) -> BuildSegment:
        """The segment's graph for one rank."""
        return _specialise(self, rank)


@dataclasses.dataclass
class PhaseProgram:
    """The segments of a phase with their graphs, and its plan."""

    segments: dict[str, Segment]
    plan: PhasePlan
    collectives: dict[str, Collective]
    states: dict[str, str]  # state that is read -> the value that is kept under its name, here or in the warm-up


def state_name(node: fx.Node) -> str:
    """The state that a ``previous`` node, or a placeholder that recalls a value, reads."""
    source = node.meta.get("recalls") or node.args[0].name  # type: ignore[union-attr]
    return f"{source}.previous"


def value_name(node: fx.Node) -> str:
    """The name under which a node's tensor is known in a program."""
    return state_name(node) if node.target is ops.previous.default or "recalls" in node.meta else node.name


def build_program(graph: fx.Graph, phase: str, parts: int = 1, states: dict[str, str] | None = None) -> PhaseProgram:
    """Cut ``graph`` into segments. ``states``: values that this phase must keep for another (the warm-up for the
    steady phase)."""
    displaced = {
        n for n in graph.nodes if phase == "steady" and n.target in _COLLECTIVES and n.meta["collective"].displaced
    }
    kept = dict(states or {})
    for node in graph.nodes:
        if node.target is ops.previous.default:
            kept[state_name(node)] = node.args[0].name
    recalled = {state_name(n): str(n.meta["recalls"]) for n in graph.nodes if "recalls" in n.meta}
    kept |= {state_name(n): str(n.meta["recalls"]) for n in graph.nodes if n.meta.get("carried")}
    _check_outputs(graph)
    takes = _takes(graph)
    padded = {n for n in graph.nodes if n.users and all(u in takes for u in n.users)}  # the padding is theirs
    segments = _segments(graph, displaced | set(takes) | padded, parts, phase)
    _interfaces(graph, segments, set(kept.values()))
    steps = [*takes.values(), *_steps(graph, segments, displaced)]
    steps += [Keep(state, value) for state, value in kept.items()]
    outputs = tuple(value_name(n) for n in graph.output_node().args[0])  # type: ignore[arg-type, union-attr]
    values = {value_name(n): _specs(n) for s in segments for n in s.outputs}
    plan = PhasePlan(tuple(steps), {s.name: s.plan() for s in segments}, outputs, values)
    collectives = {n.name: n.meta["collective"] for n in graph.nodes if n.target in _COLLECTIVES}
    return PhaseProgram({s.name: s for s in segments}, plan, collectives, {**kept, **recalled})


def _takes(graph: fx.Graph) -> dict[fx.Node, Step]:
    """Slices of inputs, each rank's own: done outside of the segments, so that equal ranks keep equal engines."""
    takes: dict[fx.Node, Step] = {}
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
            takes[node] = Take(node.name, source.name, dim, starts, stops, above, below, float(fill))
    return takes


def _check_outputs(graph: fx.Graph) -> None:
    for node in graph.output_node().args[0]:  # type: ignore[union-attr]
        if not isinstance(node, fx.Node) or node.op == "get_attr":
            raise ConvertError("the module returns one of its own weights: return something computed from the inputs")


def _is_compute(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target not in _COLLECTIVES and node.target is not ops.previous.default


def _segments(graph: fx.Graph, outside: set[fx.Node], parts: int, phase: str) -> list[Segment]:
    """``outside``: nodes that belong to no segment and wait for nothing: displaced collectives, slices of inputs."""
    work = {n: flops_of(n, 0) for n in graph.nodes if _is_compute(n)}
    quota = sum(work.values()) / parts if parts > 1 else float("inf")
    last = _last_cut({n: w for n, w in work.items() if n not in outside}, parts)
    segments: list[Segment] = []
    current: list[fx.Node] = []
    waiting: set[fx.Node] = set()  # exact collectives whose transfer could be under way
    placing: list[fx.Node] = []  # put their results together: can wait for as long as nobody reads them
    done = 0.0

    def close() -> None:
        if current:
            segments.append(Segment(f"{phase}{len(segments)}", list(current)))
        current[:] = placing
        placing.clear()
        waiting.clear()

    for node in graph.nodes:
        reads_waiting = any(source in waiting or source in placing for source in node.all_input_nodes)
        if node.target in _COLLECTIVES and node not in outside:
            if reads_waiting:  # a transfer of what another transfer gives
                close()
            waiting.add(node)
        elif node.target in _PLACING and node.args[0] in waiting and node.args[1] not in placing:
            placing.append(node)
        elif _is_compute(node) and node not in outside:
            if reads_waiting:
                close()
            current.append(node)
            done += work[node]
            full = done >= quota * (len(segments) + 1) and work[node] > 0
            if len(segments) + 2 == parts and last is not None:
                full = node is last
            if full and len(segments) + 1 < parts:
                close()
    close()
    close()  # what was placed last
    return segments


def _last_cut(work: Mapping[fx.Node, float], parts: int) -> fx.Node | None:
    """Where the last segment begins: after this node. What the last segment sends has nothing to hide under, and what
    the one before it sends has the last one alone; so it begins where little is left over, and not before its turn."""
    sent = {n: max((_sent(u) for u in n.users if u.target in _COLLECTIVES), default=0.0) for n in work}
    total, everything = sum(work.values()), sum(sent.values())
    done, left, before = 0.0, everything, 0.0
    exposed: dict[fx.Node, float] = {}  # bytes
    for node, flops in work.items():
        done, left = done + flops, left - sent[node]
        if done >= total * (parts - 2) / parts:
            before += sent[node]
        if done >= total * (parts - 1) / parts and (flops or sent[node]):
            exposed[node] = left + max(0.0, before - (total - done) / _FLOPS_PER_BYTE)
    most = min(exposed.values(), default=0.0) + everything / 100
    return next((n for n, e in exposed.items() if e <= most), None)


def _sent(collective: fx.Node) -> float:
    plan: Collective = collective.meta["collective"]
    return float(max(map(plan.sent_bytes, range(len(plan.specs)))) if plan.displaced else 0)


def _interfaces(graph: fx.Graph, segments: Sequence[Segment], kept: set[str]) -> None:
    """Inputs, outputs and weights of every segment, in graph order."""
    home = {n: s for s in segments for n in s.nodes}
    order = {n: i for i, n in enumerate(graph.nodes)}
    for s in segments:
        sources = {x for n in s.nodes for x in n.all_input_nodes if home.get(x) is not s}
        s.weights = sorted((x for x in sources if x.op == "get_attr"), key=order.__getitem__)
        s.inputs = sorted((x for x in sources if x.op != "get_attr"), key=order.__getitem__)
        s.outputs = [n for n in s.nodes if n.name in kept or any(home.get(u) is not s for u in n.users)]


def _steps(graph: fx.Graph, segments: Sequence[Segment], displaced: set[fx.Node]) -> Iterator[Step]:
    position = {n: i for i, s in enumerate(segments) for n in s.nodes}
    order = {n: i for i, n in enumerate(graph.nodes)}
    collectives = [n for n in graph.nodes if n.target in _COLLECTIVES]
    wait_at: dict[int, list[fx.Node]] = {}
    post_after: dict[int, list[fx.Node]] = {}
    late: list[fx.Node] = []
    for c in collectives:
        source = c.args[0]
        assert isinstance(source, fx.Node)
        after = position.get(source, -1)
        uses = [position[u] for u in c.users if u in position]
        if c in displaced:
            # Read the previous call's values before this call's are sent
            wait_at.setdefault(min([*uses, max(after, 0)]), []).append(c)
            post_after.setdefault(after, []).append(c)
            continue
        if source.target in _COLLECTIVES:
            after = max(after, min([position[u] for u in source.users if u in position], default=len(segments)) - 1)
        post_after.setdefault(after, []).append(c)
        if uses:
            wait_at.setdefault(min(uses), []).append(c)
        else:
            late.append(c)

    def post(i: int) -> Iterator[Step]:
        for group in (
            [c for c in post_after.get(i, []) if c not in displaced],
            [c for c in post_after.get(i, []) if c in displaced],
        ):
            if group:
                yield Post(tuple(c.name for c in group))

    yield from post(-1)
    for i, s in enumerate(segments):
        if i in wait_at:
            yield Wait(tuple(c.name for c in sorted(wait_at[i], key=order.__getitem__)))
        yield Run(s.name)
        yield from post(i)
    if late:
        yield Wait(tuple(c.name for c in late))


def _specialise(segment: Segment, rank: int) -> BuildSegment:
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
        # A segment's inputs are dense, whatever their strides were at capture: what was a view then may not be one
        operator: Any = aten.reshape.default if node.target is aten.view.default else node.target
        new = graph.create_node("call_function", operator, a, k, name=node.name)
        new.meta["val"] = node.meta["local"][rank]
        for key in ("stack_trace", "site", "nn_module_stack"):
            if key in node.meta:
                new.meta[key] = node.meta[key]
        env[node] = new
    for node in segment.outputs:
        outputs.append((value_name(node), _spec(node, rank)))
    graph.output(tuple(env[n] for n in segment.outputs))
    module = fx.GraphModule(torch.nn.Module(), graph)
    return BuildSegment(segment.name, module, tuple(inputs), tuple(weights), tuple(outputs))


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


def check_plan(phase: str, plan: PhasePlan, collectives: dict[str, Collective], inputs: Iterable[str]) -> None:
    """A phase's steps hold together: every value exists before it is read, every collective is posted once and (if
    exact) waited for after its post, every state is written once. Raises :class:`ConvertError`."""
    known = set(inputs)
    posted: list[str] = []
    states: list[str] = []
    for step in plan.steps:
        if isinstance(step, Take):
            known.add(step.value)
        elif isinstance(step, Run):
            s = plan.segments[step.segment]
            missing = [v for v in s.inputs if v not in known and not v.endswith(".previous")]
            if missing:
                raise ConvertError(f"{phase}: segment {s.name} reads {missing[0]} before it exists")
            known |= set(s.outputs)
        elif isinstance(step, Post):
            for c in step.collectives:
                if collectives[c].source not in known:
                    raise ConvertError(f"{phase}: {c} is posted before {collectives[c].source} exists")
                if c in posted:
                    raise ConvertError(f"{phase}: {c} is posted twice")
                posted.append(c)
        elif isinstance(step, Wait):
            for c in step.collectives:
                if c not in posted and not (phase == "steady" and collectives[c].displaced):
                    raise ConvertError(f"{phase}: {c} is waited for before it is posted")
            known |= set(step.collectives)
        elif isinstance(step, Keep):
            if step.state in states:
                raise ConvertError(f"{phase}: state {step.state} is written twice")
            states.append(step.state)
            if step.value not in known:
                raise ConvertError(f"{phase}: state {step.state} keeps {step.value}, which does not exist")
    missing_outputs = [v for v in plan.outputs if v not in known]
    if missing_outputs:
        raise ConvertError(f"{phase}: output {missing_outputs[0]} does not exist")
