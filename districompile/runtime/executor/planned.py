# SPDX-License-Identifier: Apache-2.0
"""Execute the plan of one rank in memory that is planned before the first call.

Engines write their outputs to the addresses that transfers send from, and read arrived rows where they arrived. So
nothing is copied around an engine, and a call can be captured. On a GPU the first call of a phase runs step by step.
Later ones are captured, once for each state of the double buffers, and replayed as one CUDA graph that holds their
transfers."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Mapping

import torch
from typing_extensions import assert_never

from districompile.backends.base import Engine
from districompile.errors import InputError
from districompile.plan.plan import (
    Clear,
    Collective,
    ExecutionPlan,
    Publish,
    Reduction,
    Run,
    SaveState,
    SliceInput,
    Start,
    Wait,
)
from districompile.runtime.executor.analysis import phase_needs
from districompile.runtime.executor.arena import allocate
from districompile.runtime.executor.capture import CapturedCall, GraphCapture
from districompile.runtime.executor.engines import Engines, aliased_values, private_strides, scratch_bytes
from districompile.runtime.executor.memory import MemoryPlan, plan_memory
from districompile.runtime.executor.slices import slice_rows
from districompile.runtime.executor.state import NO_STATE, BufferState, ExecutorState, result_of
from districompile.runtime.executor.workspace import Workspace, fill_borders
from districompile.runtime.trace import Spans, Trace
from districompile.runtime.transports.base import (
    Channel,
    ReceiveBuffer,
    SilentChannel,
    TransferPlan,
    build_transfer_plan,
    recorded,
    view,
)
from districompile.runtime.transports.messages import combine


class PlannedExecutor:
    """Run phases of ``plan`` on one rank, on ``device``, over ``channel``.

    All ranks construct it, request states and run calls alike. ``engines`` maps phase and segment to a loaded engine
    that no other rank uses. A call returns new tensors. ``cuda_graph``: capture calls if device, channel and engines
    allow it. All calls are made on one stream. Executors of one rank may share a ``workspace``: only the one that
    :meth:`claim` was called for last runs calls."""

    def __init__(
        self, plan: ExecutionPlan, rank: int, engines: Engines, channel: Channel, device: torch.device,
        cuda_graph: bool = True, workspace: Workspace | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.rank, self.channel, self.device = plan, rank, channel, device
        self._workspace = workspace or Workspace(channel, device)
        self.memory: MemoryPlan = plan_memory(plan, rank, aliased_values(plan, engines))
        self._engines = engines
        used = {id(e): e for by_segment in engines.values() for e in by_segment.values()}
        self._graphs = cuda_graph and device.type == "cuda" and channel.capturable
        self._graphs = self._graphs and all(e.capturable for e in used.values())
        self._strides = {name: private_strides(plan, name, engines, self.memory) for name in plan.phases}
        self._arena = self._workspace.arena(self.memory.arena_bytes)
        self._scratch = self._workspace.scratch(scratch_bytes(engines))
        for engine in used.values():
            if engine.scratch_bytes:
                engine.use_scratch(self._scratch)
        self._inputs = {i.value: view(allocate(i.spec.nbytes, device), 0, i.spec) for i in plan.inputs}
        self._phases = phase_needs(plan)
        layouts = (self.memory.shared_layout[rank], self.memory.double_layout[rank], self.memory.single_layout[rank])
        self._order = {name: i for i, name in enumerate(n for layout in layouts for n in layout.offsets)}
        self._shared = self._workspace.shared(self.memory.shared_bytes)
        self._fill(self._shared, shared=True)
        self._workspace.user = self
        self._warm: set[str] = set()
        self._captured: dict[tuple[object, ...], CapturedCall] = {}
        self._capturing = GraphCapture(device)
        self._states = 0
        self._trace: Trace | None = None
        channel.settle()

    # States

    def new_state(self) -> ExecutorState:
        """Allocate the memory of a stream of calls. All ranks must request one at the same time."""
        buffer = self._workspace.stream(self._states, self.memory.stream_bytes, self.memory.signals)
        self._fill(buffer, shared=False)
        kept = self._workspace.kept(self._states, 2 * self.memory.kept_stride)
        self._states += 1
        self.channel.settle()
        return ExecutorState(self._states, buffer, kept, BufferState())

    def claim(self, states: Iterable[ExecutorState]) -> None:
        """Take the workspace over from another executor, whose states were reset. All ranks do so together.

        ``states`` are those of this executor. They must have been reset."""
        if self._workspace.user is self:
            return
        self._workspace.user = self
        self.channel.join()
        self._fill(self._shared, shared=True)
        for state in states:
            self._fill(state.buffer, shared=False)
        self.channel.settle()

    def reset(self, state: ExecutorState) -> None:
        """Complete all pending transfers, because the other ranks have sent them, then forget all."""
        for transfer in state.buffers.pending:
            self.channel.wait(transfer)
        state.buffers = BufferState()

    def drop(self, state: ExecutorState) -> None:
        """Forget everything without completing it. Only valid if the channel itself was cleared."""
        state.buffers = BufferState()

    def _fill(self, buffer: ReceiveBuffer, shared: bool) -> None:
        fill_borders(buffer, self.plan, self.memory, self.rank, shared)

    # Calls

    def run(self, phase: str, inputs: Mapping[str, torch.Tensor], state: ExecutorState) -> list[torch.Tensor]:
        """Run one call with ``inputs`` by value name (on ``device``). Return the plan's output leaves, in order."""
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
        self.channel.finish()
        return outputs

    def iterate(
        self, phase: str, inputs: Mapping[str, torch.Tensor], state: ExecutorState
    ) -> Generator[None, None, list[torch.Tensor]]:
        """Run like :meth:`run` without capture, but pause after each step, so that ranks in one process can take turns.

        It also pauses while the channel is not ready."""
        self._begin(phase, inputs, state)
        outputs = [t.clone() for t in (yield from self._steps(phase, state, None))]
        self.channel.finish()
        while not self.channel.together():
            yield
        return outputs

    @contextlib.contextmanager
    def trace(self) -> Iterator[Trace]:
        """Record how the calls inside spend their time. Each waits for the device at its end."""
        self._trace = Trace(self.rank)
        try:
            yield self._trace
        finally:
            self._trace = None

    @contextlib.contextmanager
    def transfers_free(self, states: Iterable[ExecutorState]) -> Iterator[None]:
        """Send nothing in the calls inside, which read values of earlier calls: for timing alone.

        All ranks enter and leave alike. ``states`` start anew, both inside and afterwards."""
        states, channel, captured = list(states), self.channel, self._captured
        for state in states:
            self.reset(state)
        self.channel, self._captured = SilentChannel(channel), {}
        try:
            yield
        finally:
            self.channel, self._captured = channel, captured
            for state in states:
                self.drop(state)

    def _begin(self, phase: str, inputs: Mapping[str, torch.Tensor], state: ExecutorState) -> None:
        self.channel.join()  # else work that a reset or a failed call left open would be outside the capture
        for name in self._phases[phase].received:
            if name not in state.buffers.last_transfer:
                raise InputError(
                    f"{self.plan.collectives[name].module_path}: nothing was received for it so far. {NO_STATE}"
                )
        for name in self._phases[phase].kept:
            if name not in state.buffers.kept:
                raise InputError(f"{name}: no earlier call left this state. {NO_STATE}")
        for name in self._phases[phase].inputs:
            self._inputs[name].copy_(inputs[name])

    def _steps(
        self, phase: str, state: ExecutorState, spans: Spans | None
    ) -> Generator[None, None, list[torch.Tensor]]:
        """Queue all steps of a phase. Return the views of the outputs, and update ``state.buffers``."""
        plan, memory = self.plan.phases[phase], self.memory.phases[phase]
        buffers = state.buffers.copy()
        values = dict(self._inputs)
        places = {v: view(self._arena, offset, memory.specs[v]) for v, offset in memory.offsets.items()}
        for v, strides in self._strides[phase].items():
            places[v] = places[v].as_strided(places[v].shape, strides)
        for value, name in memory.states.items():
            places[value] = self._kept(state, name, 1 - buffers.kept.get(name, 1))
        for name, copy in buffers.kept.items():
            values.setdefault(name, self._kept(state, name, copy))
        posted: dict[int, TransferPlan] = {}
        self.channel.begin(self._phases[phase].overlapped)
        for number, step in enumerate(plan.steps):
            for post in memory.releases.get(number, ()):
                with recorded(spans, "wait", posted[post].name, "compute"):
                    self.channel.sent(posted[post])
            if isinstance(step, SliceInput):
                slice_rows(step, values[step.source], self.rank, places[step.value])
                values[step.value] = places[step.value]
            elif isinstance(step, Run):
                with recorded(spans, "run", step.segment, "compute"):
                    self._run(phase, step, values, places)
            elif isinstance(step, Start):
                posted[number] = yield from self._post(phase, number, step, values, state, buffers, spans)
            elif isinstance(step, Wait):
                for name in step.collectives:
                    yield from self._arrived(buffers, name, spans)
                    values[name] = self._received(buffers, name, state, places)
            elif isinstance(step, Publish):
                for name in step.collectives:
                    yield from self._arrived(buffers, name, spans)
                    self._deliver(buffers, name, state, values[name])
            elif isinstance(step, Clear):
                for name in step.collectives:
                    yield from self._arrived(buffers, name, spans)
                    self._clear(buffers, name, state)
            elif isinstance(step, SaveState):
                if memory.states.get(step.value) != step.state:  # no engine wrote it there
                    self._kept(state, step.state, 1 - buffers.kept.get(step.state, 1)).copy_(values[step.value])
            else:
                assert_never(step)
            yield
        for step in plan.steps:
            if isinstance(step, SaveState):
                buffers.kept[step.state] = 1 - buffers.kept.get(step.state, 1)
                values[step.state] = self._kept(state, step.state, buffers.kept[step.state])
        with recorded(spans, "join", phase, "compute"):
            self.channel.join()
        state.buffers = buffers
        return [values[name] for name in plan.outputs]

    def _run(self, phase: str, step: Run, values: dict[str, torch.Tensor], places: Mapping[str, torch.Tensor]) -> None:
        segment = self.plan.phases[phase].segments[step.segment]
        engine: Engine = self._engines[phase][step.segment]
        for name in segment.inputs:
            engine.bind(name, values[name])
        written = [n for n in segment.outputs if engine.binds_outputs and n not in engine.aliased_outputs]
        for name in written:
            engine.bind(name, places[name])
        engine.enqueue()
        for name in segment.outputs:
            if name in engine.aliased_outputs and name not in self.memory.phases[phase].states:
                values[name] = engine.output(name)
                continue
            if name not in written:
                places[name].copy_(engine.output(name))
            values[name] = places[name]
        engine.release()

    def _post(
        self, phase: str, number: int, step: Start, values: Mapping[str, torch.Tensor], state: ExecutorState,
        buffers: BufferState, spans: Spans | None,
    ) -> Generator[None, None, TransferPlan]:  # fmt: skip
        message, needs = self.memory.phases[phase].messages[number], self._phases[phase]
        for name in step.collectives:  # posted again before it was read: the earlier transfer must still complete
            yield from self._arrived(buffers, name, spans)
        parity = 1 - buffers.parity.get(message, 1)
        buffers.parity[message] = parity
        for name in step.collectives:
            self._flip(buffers, name)
        sources = {self.plan.collectives[n].source for n in step.collectives}
        indices = tuple(buffers.buffer_index.get(n, 0) for n in step.collectives)
        key = (message, parity, indices, tuple(values[s].data_ptr() for s in sorted(sources)))
        transfer = state.transfers.get(key)
        if transfer is None:
            transfer = self._plan_transfer(step, message, parity, values, state, dict(buffers.buffer_index))
            transfer.exposed, transfer.waited_in_call = number in needs.exposed, number in needs.waited_in_call
            if any(n in self.memory.single_buffered and n in needs.received for n in step.collectives):
                transfer.needs_ack = transfer.signal_slot + 2 * self.memory.messages
            state.transfers[key] = transfer
        self.channel.post(transfer)
        for name in step.collectives:
            buffers.last_transfer[name] = transfer
        buffers.pending[transfer] = None
        return transfer

    def _plan_transfer(
        self, step: Start, message: int, parity: int, values: Mapping[str, torch.Tensor], state: ExecutorState,
        buffer_index: Mapping[str, int],
    ) -> TransferPlan:  # fmt: skip
        def result(c: Collective, rank: int) -> torch.Tensor | None:
            buffer = state.buffer if c.name in self.memory.cross_call else self._shared
            memory = buffer.local if rank == self.rank else buffer.remote.get(rank)
            layout = self.memory.layout(c.name, rank)
            return None if memory is None else layout.inside(memory, c, rank, buffer_index.get(c.name, 0))

        # In the order in which sources and results lie in memory, which is the same on all ranks.
        collectives = [self.plan.collectives[n] for n in sorted(step.collectives, key=self._order.__getitem__)]
        first = step.collectives[0]
        more = f" and {len(step.collectives) - 1} more" if len(step.collectives) > 1 else ""
        return build_transfer_plan(
            f"{first}{more}", 2 * message + parity, state.buffer, collectives, self.rank, self.plan.ranks,
            values.__getitem__, result,
        )  # fmt: skip

    def _arrived(self, buffers: BufferState, name: str, spans: Spans | None) -> Generator[None, None, None]:
        """Wait for the collective's last transfer, unless that was done."""
        transfer = buffers.last_transfer.get(name)
        if transfer is not None and transfer in buffers.pending:
            while not self.channel.ready(transfer):
                yield
            with recorded(spans, "wait", transfer.name, "compute"):
                self.channel.wait(transfer)
            del buffers.pending[transfer]

    def _received(
        self, buffers: BufferState, name: str, state: ExecutorState, places: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        c = self.plan.collectives[name]
        buffer = state.buffer if name in self.memory.cross_call else self._shared
        layout = self.memory.layout(name, self.rank)
        received = layout.inside(buffer.local, c, self.rank, buffers.buffer_index.get(name, 0))
        if not isinstance(c, Reduction):
            return received
        return places[name].copy_(combine(c.op, received.unbind(0)))

    def _deliver(self, buffers: BufferState, name: str, state: ExecutorState, value: torch.Tensor) -> None:
        """Copy a result that an engine made to where it would be received."""
        c, place = self.plan.collectives[name], self._unsent(buffers, name, state)
        if isinstance(c, Reduction):  # the contributions are combined when they are read
            place.fill_(0) if c.op == "sum" else place.copy_(value.expand_as(place))
            place[0].copy_(value)
        else:
            place.copy_(value)

    def _clear(self, buffers: BufferState, name: str, state: ExecutorState) -> None:
        """Set what is read of a collective to zero."""
        self._unsent(buffers, name, state).zero_()

    def _unsent(self, buffers: BufferState, name: str, state: ExecutorState) -> torch.Tensor:
        """Return where a result of this call is read that no rank sends."""
        self._flip(buffers, name)
        buffers.last_transfer[name] = None
        collective, copy = self.plan.collectives[name], buffers.buffer_index.get(name, 0)
        return self.memory.layout(name, self.rank).inside(state.buffer.local, collective, self.rank, copy)

    def _flip(self, buffers: BufferState, name: str) -> None:
        """Switch a double-buffered collective to its other buffer."""
        if name in self.memory.cross_call and name not in self.memory.single_buffered:
            buffers.buffer_index[name] = 1 - buffers.buffer_index.get(name, 1)

    def _kept(self, state: ExecutorState, name: str, copy: int) -> torch.Tensor:
        offset = self.memory.kept_offsets[name] + copy * self.memory.kept_stride
        return view(state.kept, offset, self.memory.kept[name])

    def _replay(self, phase: str, state: ExecutorState) -> list[torch.Tensor]:
        tracing = self._trace is not None
        key = (phase, state.number, tracing, state.buffers.signature)
        found = self._captured.get(key)
        if found is None:
            found = self._captured[key] = self._capture(phase, state)
        found.graph.replay()
        state.buffers = found.after
        self._finish_trace(phase, found.spans)
        return found.outputs

    def _capture(self, phase: str, state: ExecutorState) -> CapturedCall:
        def queue() -> tuple[list[torch.Tensor], Spans | None]:
            spans = self._new_spans()
            with self._recording(spans):
                return result_of(self._steps(phase, state, spans)), spans

        before = state.buffers
        graph, (outputs, spans) = self._capturing.capture(queue)
        after, state.buffers = state.buffers, before
        return CapturedCall(graph, after, outputs, spans)

    def _new_spans(self) -> Spans | None:
        return Spans(self.device.type == "cuda") if self._trace is not None else None

    @contextlib.contextmanager
    def _recording(self, spans: Spans | None) -> Iterator[None]:
        self.channel.spans = spans
        try:
            yield
        finally:
            self.channel.spans = None

    def _finish_trace(self, phase: str, spans: Spans | None) -> None:
        if self._trace is not None and spans is not None:
            self._trace.calls.append((phase, spans.read()))
