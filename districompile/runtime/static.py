"""Executes the plan of one rank in fixed memory, so that nothing is copied around an engine and a call can be captured.

Engines write what they make straight to where it is sent from, and read what others sent where it arrived. On a GPU the
first call of a phase runs step by step; later ones are captured, once for each state of the double buffers, and
replayed as one CUDA graph with their transfers inside.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import torch

from districompile.backends.base import Engine
from districompile.errors import InputError
from districompile.ir.plan import Collective, Deliver, Keep, Plan, Post, Reduction, Run, Take, Wait
from districompile.runtime.arena import allocate
from districompile.runtime.executor import Engines, result_of
from districompile.runtime.graph_edit import replace_memsets
from districompile.runtime.kernels import kernels
from districompile.runtime.links import Link, Region, Route, SilentLink, build_route, recorded, view
from districompile.runtime.memory import MemoryPlan, plan_memory
from districompile.runtime.phases import phase_needs
from districompile.runtime.state import Book, StaticState
from districompile.runtime.trace import Spans, Trace
from districompile.runtime.transport import combine


@dataclasses.dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    after: Book
    outputs: list[torch.Tensor]
    spans: Spans | None


class StaticExecutor:
    """Runs phases of ``plan`` on one rank, on ``device``, over ``link``. All ranks construct it, ask for states and
    run calls alike.

    ``engines`` maps phase and segment to a loaded engine that no other rank uses. The tensors that a call returns are
    fresh. ``cuda_graph``: capture calls, where device, link and engines allow it. Calls are to be made on one stream.
    """

    def __init__(
        self, plan: Plan, rank: int, engines: Engines, link: Link, device: torch.device, cuda_graph: bool = True
    ) -> None:
        self.plan, self.rank, self.link, self.device = plan, rank, link, device
        self.memory: MemoryPlan = plan_memory(plan, rank, _elsewhere(plan, engines))
        self._engines = engines
        used = {id(e): e for by_segment in engines.values() for e in by_segment.values()}
        self._graphs = cuda_graph and device.type == "cuda" and link.capturable
        self._graphs = self._graphs and all(e.capturable for e in used.values())
        self._strides = {name: self._private_strides(name) for name in plan.phases}
        self._arena = allocate(self.memory.arena_bytes, device)
        self._scratch = allocate(max((e.scratch_bytes for e in used.values()), default=0), device)
        for engine in used.values():
            if engine.scratch_bytes:
                engine.use_scratch(self._scratch)
        self._inputs = {i.value: view(allocate(i.spec.nbytes, device), 0, i.spec) for i in plan.inputs}
        self._phases = phase_needs(plan)
        layouts = (self.memory.shared[rank], self.memory.twice[rank], self.memory.single[rank])
        self._order = {name: i for i, name in enumerate(n for layout in layouts for n in layout.offsets)}
        self._shared = link.region(max(layout.nbytes for layout in self.memory.shared), 0)
        self._fill(self._shared, shared=True)
        self._warm: set[str] = set()
        self._captured: dict[tuple[object, ...], _Captured] = {}
        self._pool: Any = None
        self._states = 0
        self._trace: Trace | None = None
        link.settle()

    def _private_strides(self, phase: str) -> dict[str, tuple[int, ...]]:
        """Values that only engines see lie as the engine that makes them wants (dense, in another order of dims)."""
        plan, places = self.plan.phases[phase], self.memory.phases[phase]
        seen = {c.source for c in self.plan.collectives.values()} | {*plan.outputs, *places.states}
        seen |= {s.value for s in plan.steps if isinstance(s, Keep)}
        found: dict[str, tuple[int, ...]] = {}
        for segment in plan.segments.values():
            strides = getattr(self._engines[phase][segment.name], "strides", {})
            found |= {v: strides[v] for v in segment.outputs if v in strides and v not in seen}
        return {v: s for v, s in found.items() if v in places.offsets}

    # States

    def new_state(self) -> StaticState:
        """Memory for a stream of calls. All ranks must ask for one at the same time."""
        region = self.link.region(max(layout.nbytes for layout in self.memory.single), 4 * self.memory.messages)
        self._fill(region, shared=False)
        kept = allocate(2 * self.memory.kept_stride, self.device)
        self._states += 1
        self.link.settle()
        return StaticState(self._states, region, kept, Book())

    def reset(self, state: StaticState) -> None:
        """Complete what is under way (the other ranks have sent it and count on its receipt), then forget all."""
        for route in state.book.unread:
            self.link.wait(route)
        state.book = Book()

    def drop(self, state: StaticState) -> None:
        """Forget everything without completing it: only where the link itself was cleared."""
        state.book = Book()

    def _fill(self, region: Region, shared: bool) -> None:
        """Rows that nobody sends keep the value of their border."""
        for c in self.plan.collectives.values():
            if (c.name in self.memory.remembered) != shared and not isinstance(c, Reduction):
                layout = self.memory.layout(c.name, self.rank)
                for copy in range(layout.copies):
                    layout.inside(region.local, c, self.rank, copy).fill_(c.fill)

    # Calls

    def run(self, phase: str, inputs: Mapping[str, torch.Tensor], state: StaticState) -> list[torch.Tensor]:
        """One call: ``inputs`` by value name (on ``device``); returns the output leaves of the plan, in order."""
        self._begin(phase, inputs, state)
        if self._graphs and phase in self._warm:
            outputs = self._replay(phase, state)
        else:
            spans = self._new_spans()
            with self._recording(spans):
                outputs = result_of(self._steps(phase, state, spans))
                self._warm.add(phase)
                self._finish_trace(phase, spans)
        outputs = [t.clone() for t in outputs]
        self.link.finish()
        return outputs

    def iterate(
        self, phase: str, inputs: Mapping[str, torch.Tensor], state: StaticState
    ) -> Generator[None, None, list[torch.Tensor]]:
        """As :meth:`run` without capturing, but pausing after each step, so that ranks in one process can take turns.
        Pauses, too, where the link is not ready."""
        self._begin(phase, inputs, state)
        outputs = [t.clone() for t in (yield from self._steps(phase, state, None))]
        self.link.finish()
        while not self.link.together():
            yield
        return outputs

    @contextlib.contextmanager
    def trace(self) -> Iterator[Trace]:
        """Record what the calls inside spend their time on; each waits for the device at its end."""
        self._trace = Trace(self.rank)
        try:
            yield self._trace
        finally:
            self._trace = None

    @contextlib.contextmanager
    def transfers_free(self, states: Iterable[StaticState]) -> Iterator[None]:
        """Calls inside send nothing, and read what is left of earlier ones: for timing alone. All ranks enter and leave
        alike; ``states`` start anew, within and after."""
        states, link, captured = list(states), self.link, self._captured
        for state in states:
            self.reset(state)
        self.link, self._captured = SilentLink(link), {}
        try:
            yield
        finally:
            self.link, self._captured = link, captured
            for state in states:
                self.drop(state)

    def _begin(self, phase: str, inputs: Mapping[str, torch.Tensor], state: StaticState) -> None:
        self.link.join()  # what a reset, or a call that failed, left open would be no part of what is captured
        advice = (
            "Run the warm-up phase first: leave `phase` unset, or set it to 'warmup' for the first calls of an image"
        )
        for name in self._phases[phase].received:
            if name not in state.book.last:
                raise InputError(f"{self.plan.collectives[name].site}: nothing was received for it so far. {advice}")
        for name in self._phases[phase].kept:
            if name not in state.book.kept:
                raise InputError(f"{name}: no earlier call left this state. {advice}")
        for name in self._phases[phase].inputs:
            self._inputs[name].copy_(inputs[name])

    def _steps(self, phase: str, state: StaticState, spans: Spans | None) -> Generator[None, None, list[torch.Tensor]]:
        """Queue all steps of a phase; gives the places of the outputs, and writes ``state.book``."""
        plan, memory = self.plan.phases[phase], self.memory.phases[phase]
        book = state.book.copy()
        values = dict(self._inputs)
        places = {v: view(self._arena, offset, memory.specs[v]) for v, offset in memory.offsets.items()}
        for v, strides in self._strides[phase].items():
            places[v] = places[v].as_strided(places[v].shape, strides)
        for value, name in memory.states.items():
            places[value] = self._kept(state, name, 1 - book.kept.get(name, 1))
        for name, copy in book.kept.items():
            values.setdefault(name, self._kept(state, name, copy))
        posted: dict[int, Route] = {}
        self.link.begin(self._phases[phase].overlapped)
        for number, step in enumerate(plan.steps):
            for post in memory.releases.get(number, ()):
                with recorded(spans, "wait", posted[post].name, "compute"):
                    self.link.sent(posted[post])
            if isinstance(step, Take):
                self._take(step, values[step.source], places[step.value])
                values[step.value] = places[step.value]
            elif isinstance(step, Run):
                with recorded(spans, "run", step.segment, "compute"):
                    self._run(phase, step, values, places)
            elif isinstance(step, Post):
                posted[number] = yield from self._post(phase, number, step, values, state, book, spans)
            elif isinstance(step, Wait):
                for name in step.collectives:
                    yield from self._arrived(book, name, spans)
                    values[name] = self._received(book, name, state, places)
            elif isinstance(step, Deliver):
                for name in step.collectives:
                    yield from self._arrived(book, name, spans)
                    self._deliver(book, name, state, values[name])
            elif step.value not in memory.states or memory.states[step.value] != step.state:
                # Nobody makes it in its place, so that it has to be copied there
                self._kept(state, step.state, 1 - book.kept.get(step.state, 1)).copy_(values[step.value])
            yield
        for step in plan.steps:
            if isinstance(step, Keep):
                book.kept[step.state] = 1 - book.kept.get(step.state, 1)
                values[step.state] = self._kept(state, step.state, book.kept[step.state])
        with recorded(spans, "join", phase, "compute"):
            self.link.join()
        state.book = book
        return [values[name] for name in plan.outputs]

    def _take(self, step: Take, source: torch.Tensor, place: torch.Tensor) -> None:
        """Rows of a padded input, without padding all of it."""
        start, stop = step.starts[self.rank] - step.above, step.stops[self.rank] - step.above
        rows = source.shape[step.dim]
        first, last = min(max(start, 0), rows), max(min(stop, rows), 0)
        above = min(max(0, -start), stop - start)
        inside = max(0, last - first)
        if inside < stop - start:
            place.fill_(step.fill)
        place.narrow(step.dim, above if inside else 0, inside).copy_(source.narrow(step.dim, first, inside))

    def _run(self, phase: str, step: Run, values: dict[str, torch.Tensor], places: Mapping[str, torch.Tensor]) -> None:
        segment = self.plan.phases[phase].segments[step.segment]
        engine: Engine = self._engines[phase][step.segment]
        for name in segment.inputs:
            engine.bind(name, values[name])
        written = [n for n in segment.outputs if engine.binds_outputs and n not in engine.rooms]
        for name in written:
            engine.bind(name, places[name])
        engine.enqueue()
        for name in segment.outputs:
            if name in engine.rooms and name not in self.memory.phases[phase].states:
                values[name] = engine.output(name)
                continue
            if name not in written:
                places[name].copy_(engine.output(name))
            values[name] = places[name]
        engine.release()

    def _post(
        self, phase: str, number: int, step: Post, values: Mapping[str, torch.Tensor], state: StaticState,
        book: Book, spans: Spans | None,
    ) -> Generator[None, None, Route]:  # fmt: skip
        message, needs = self.memory.phases[phase].messages[number], self._phases[phase]
        for name in step.collectives:  # posted again before it was read: the earlier transfer must still complete
            yield from self._arrived(book, name, spans)
        half = 1 - book.half.get(message, 1)
        book.half[message] = half
        for name in step.collectives:
            self._turn(book, name)
        sources = {self.plan.collectives[n].source for n in step.collectives}
        turns = tuple(book.turn.get(n, 0) for n in step.collectives)
        key = (message, half, turns, tuple(values[s].data_ptr() for s in sorted(sources)))
        route = state.routes.get(key)
        if route is None:
            route = self._route(step, message, half, values, state, dict(book.turn))
            route.at_once, route.answered = number in needs.at_once, number in needs.answered
            if any(n in self.memory.once and n in needs.received for n in step.collectives):
                route.meets = route.word + 2 * self.memory.messages
            state.routes[key] = route
        self.link.post(route)
        for name in step.collectives:
            book.last[name] = route
        book.unread[route] = None
        return route

    def _route(
        self, step: Post, message: int, half: int, values: Mapping[str, torch.Tensor], state: StaticState,
        turn: Mapping[str, int],
    ) -> Route:  # fmt: skip
        def result(c: Collective, rank: int) -> torch.Tensor | None:
            region = state.region if c.name in self.memory.remembered else self._shared
            memory = region.local if rank == self.rank else region.remote.get(rank)
            layout = self.memory.layout(c.name, rank)
            return None if memory is None else layout.inside(memory, c, rank, turn.get(c.name, 0))

        # In the order in which sources and results lie in memory, which is the same on all ranks
        collectives = [self.plan.collectives[n] for n in sorted(step.collectives, key=self._order.__getitem__)]
        first = step.collectives[0]
        more = f" and {len(step.collectives) - 1} more" if len(step.collectives) > 1 else ""
        return build_route(
            f"{first}{more}", 2 * message + half, state.region, collectives, self.rank, self.plan.ranks,
            values.__getitem__, result,
        )  # fmt: skip

    def _arrived(self, book: Book, name: str, spans: Spans | None) -> Generator[None, None, None]:
        """Wait for what the collective last travelled on, unless that was done."""
        route = book.last.get(name)
        if route is not None and route in book.unread:
            while not self.link.ready(route):
                yield
            with recorded(spans, "wait", route.name, "compute"):
                self.link.wait(route)
            del book.unread[route]

    def _received(self, book: Book, name: str, state: StaticState, places: Mapping[str, torch.Tensor]) -> torch.Tensor:
        c = self.plan.collectives[name]
        region = state.region if name in self.memory.remembered else self._shared
        layout = self.memory.layout(name, self.rank)
        received = layout.inside(region.local, c, self.rank, book.turn.get(name, 0))
        if not isinstance(c, Reduction):
            return received
        return places[name].copy_(combine(c.op, received.unbind(0)))

    def _deliver(self, book: Book, name: str, state: StaticState, value: torch.Tensor) -> None:
        """Put a result that an engine made to where one is received."""
        c = self.plan.collectives[name]
        self._turn(book, name)
        book.last[name] = None
        layout = self.memory.layout(name, self.rank)
        place = layout.inside(state.region.local, c, self.rank, book.turn.get(name, 0))
        if isinstance(c, Reduction):  # what is there is combined when it is read
            place.fill_(0) if c.op == "sum" else place.copy_(value.expand_as(place))
            place[0].copy_(value)
        else:
            place.copy_(value)

    def _turn(self, book: Book, name: str) -> None:
        """What is received twice goes to the other place next."""
        if name in self.memory.remembered and name not in self.memory.once:
            book.turn[name] = 1 - book.turn.get(name, 1)

    def _kept(self, state: StaticState, name: str, copy: int) -> torch.Tensor:
        offset = self.memory.kept_offsets[name] + copy * self.memory.kept_stride
        return view(state.kept, offset, self.memory.kept[name])

    # Graphs and traces

    def _replay(self, phase: str, state: StaticState) -> list[torch.Tensor]:
        tracing = self._trace is not None
        key = (phase, state.number, tracing, state.book.signature)
        found = self._captured.get(key)
        if found is None:
            found = self._captured[key] = self._capture(phase, state)
        found.graph.replay()
        state.book = found.after
        self._finish_trace(phase, found.spans)
        return found.outputs

    def _capture(self, phase: str, state: StaticState) -> _Captured:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        own = kernels(self.device)
        graph = torch.cuda.CUDAGraph(keep_graph=own is not None)
        book = state.book
        # Other threads (watchdogs of transports) may go on using the device meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            spans = self._new_spans()
            with self._recording(spans):
                outputs = result_of(self._steps(phase, state, spans))
        after, state.book = state.book, book
        if own is not None:
            replace_memsets(graph.raw_cuda_graph(), own.fill_words)
            graph.instantiate()
        return _Captured(graph, after, outputs, spans)

    def _new_spans(self) -> Spans | None:
        return Spans(self.device.type == "cuda") if self._trace is not None else None

    @contextlib.contextmanager
    def _recording(self, spans: Spans | None) -> Iterator[None]:
        self.link.spans = spans
        try:
            yield
        finally:
            self.link.spans = None

    def _finish_trace(self, phase: str, spans: Spans | None) -> None:
        if self._trace is not None and spans is not None:
            self._trace.calls.append((phase, spans.read()))


def _elsewhere(plan: Plan, engines: Engines) -> dict[str, set[str]]:
    """What engines leave in their inputs, by phase: it needs no place."""
    return {
        phase: {n for s in p.segments.values() for n in s.outputs if n in engines[phase][s.name].rooms}
        for phase, p in plan.phases.items()
    }
