"""The reference executor: steps in order, in whatever memory is free, values freed after their last use."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping

import torch
from typing_extensions import assert_never

from districompile.errors import InputError
from districompile.plan.plan import Clear, ExecutionPlan, Publish, Run, SaveState, Schedule, SliceInput, Start, Wait
from districompile.runtime.executor.engines import Engines
from tests.reference.packing import Pending, Transport


def slice_rows(step: SliceInput, source: torch.Tensor, rank: int) -> torch.Tensor:
    """The rows that ``rank`` takes of an input."""
    if step.above or step.below:
        sides = [0, 0] * (source.ndim - 1 - step.dim) + [step.above, step.below]
        source = torch.nn.functional.pad(source, sides, value=step.fill)
    start = step.starts[rank]
    return source.narrow(step.dim, start, step.stops[rank] - start).contiguous()


@dataclasses.dataclass
class StreamState:
    """What one stream of calls leaves for its next call."""

    pending: dict[str, Pending] = dataclasses.field(default_factory=dict)  # collective -> its last post
    results: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)  # collective -> what it last received
    kept: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)  # state -> value

    def reset(self) -> None:
        """Complete what is under way (the other ranks have sent it and count on its receipt), then forget all."""
        for pending in self.pending.values():
            pending.wait()
        self.drop()

    def drop(self) -> None:
        """Forget everything without completing it: only where the transport itself was cleared."""
        self.pending.clear()
        self.results.clear()
        self.kept.clear()


class DynamicExecutor:
    """Runs phases of ``plan`` on one rank.

    ``engines`` maps phase and segment to a loaded engine, none of which another rank may use at the same time. The
    tensors that a call returns, and those it keeps for the next, are copies: an engine may overwrite its outputs.
    ``dense``: lay each engine's outputs out densely, as planned memory does. With other strides kernels may add up in
    another order, so that results differ by rounding.
    """

    def __init__(
        self,
        plan: ExecutionPlan,
        rank: int,
        engines: Engines,
        transport: Transport,
        device: torch.device,
        dense: bool = False,
    ) -> None:
        self.plan, self.rank, self.transport, self.device, self.dense = plan, rank, transport, device, dense
        self._engines = engines
        self._freed = {name: _freed_after(plan, phase) for name, phase in plan.phases.items()}
        self._remembered = frozenset().union(*(p.waited_before_posted for p in plan.phases.values()))

    def new_state(self) -> StreamState:
        """The state of a new stream of calls."""
        return StreamState()

    def reset(self, state: StreamState) -> None:
        """See :meth:`StreamState.reset`."""
        state.reset()

    def drop(self, state: StreamState) -> None:
        """See :meth:`StreamState.drop`."""
        state.drop()

    def run(self, phase: str, inputs: Mapping[str, torch.Tensor], state: StreamState) -> list[torch.Tensor]:
        """Run one call. ``inputs`` are by value name, on ``device``. Return the output leaves of the plan, in order."""
        steps = self.iterate(phase, inputs, state)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                outputs: list[torch.Tensor] = end.value
                return outputs

    def iterate(
        self, phase: str, inputs: Mapping[str, torch.Tensor], state: StreamState
    ) -> Generator[None, None, list[torch.Tensor]]:
        """As :meth:`run`, but pausing after each step, so that ranks in one process can take turns."""
        plan = self.plan.phases[phase]
        freed = self._freed[phase]
        values = dict(inputs)
        kept: dict[str, torch.Tensor] = {}
        for number, step in enumerate(plan.steps):
            if isinstance(step, SliceInput):
                values[step.value] = slice_rows(step, self._value(step.source, values, state), self.rank)
            elif isinstance(step, Run):
                self._run(phase, step, values, state)
            elif isinstance(step, Start):
                self._post(step, values, state)
            elif isinstance(step, Wait):
                self._wait(step, values, state)
            elif isinstance(step, Publish):
                self._deliver(step, values, state)
            elif isinstance(step, Clear):
                self._clear(step, state)
            elif isinstance(step, SaveState):
                kept[step.state] = self._value(step.value, values, state).clone()
            else:
                assert_never(step)
            for name in freed[number]:
                values.pop(name, None)
            yield
        state.kept.update(kept)
        return [self._value(name, values, state).clone() for name in plan.outputs]

    def _run(self, phase: str, step: Run, values: dict[str, torch.Tensor], state: StreamState) -> None:
        segment = self.plan.phases[phase].segments[step.segment]
        inputs = {name: self._value(name, values, state) for name in segment.inputs}
        outputs = self._engines[phase][step.segment].run(inputs, segment.outputs)
        values.update({name: value.contiguous() if self.dense else value for name, value in outputs.items()})

    def _post(self, step: Start, values: Mapping[str, torch.Tensor], state: StreamState) -> None:
        collectives = [self.plan.collectives[name] for name in step.collectives]
        sources = {c.source: self._value(c.source, values, state) for c in collectives}
        pending = self.transport.post(collectives, sources)
        for name in step.collectives:
            earlier = state.pending.get(name)
            if earlier is not None:  # posted again before it was read: the earlier transfer must still complete
                earlier.wait()
            state.pending[name] = pending
            state.results.pop(name, None)

    def _wait(self, step: Wait, values: dict[str, torch.Tensor], state: StreamState) -> None:
        for name in step.collectives:
            pending = state.pending.pop(name, None)
            if pending is not None:
                received = pending.wait()[name]
                if name in self._remembered:
                    state.results[name] = received
            elif name in state.results:
                received = state.results[name]
            else:
                raise InputError(
                    f"{self.plan.collectives[name].module_path}: nothing was received for it so far. Run the exact "
                    "phase first: leave `phase` unset, or set it to 'exact' for the first calls of an image"
                )
            values[name] = received

    def _deliver(self, step: Publish, values: Mapping[str, torch.Tensor], state: StreamState) -> None:
        for name in step.collectives:
            earlier = state.pending.pop(name, None)
            if earlier is not None:  # the other ranks have sent it and count on its receipt
                earlier.wait()
            state.results[name] = self._value(name, values, state).clone()

    def _clear(self, step: Clear, state: StreamState) -> None:
        for name in step.collectives:
            earlier = state.pending.pop(name, None)
            if earlier is not None:
                earlier.wait()
            spec = self.plan.collectives[name].results[self.rank]
            state.results[name] = torch.zeros(spec.shape, dtype=spec.dtype, device=self.device)

    def _value(self, name: str, values: Mapping[str, torch.Tensor], state: StreamState) -> torch.Tensor:
        """A value of this call, or the state of that name from the last one."""
        if name in values:
            return values[name]
        if name in state.kept:
            return state.kept[name]
        states = {s.state for p in self.plan.phases.values() for s in p.steps if isinstance(s, SaveState)}
        if name in states:
            raise InputError(
                f"{name}: no earlier call left this state. Run the exact phase first: leave `phase` unset, or set it "
                "to 'exact' for the first calls of an image"
            )
        raise RuntimeError(f"the plan uses the value {name} before any step makes it")


def _freed_after(plan: ExecutionPlan, phase: Schedule) -> list[tuple[str, ...]]:
    """For each step, the values of the call that nothing reads after it."""
    last: dict[str, int] = {value.value: 0 for value in plan.inputs}
    for number, step in enumerate(phase.steps):
        names = (*step.reads(phase, plan.collectives), *step.writes(phase, plan.collectives))
        for name in names:
            last[name] = number
    for name in phase.outputs:
        last.pop(name, None)
    freed: list[list[str]] = [[] for _ in phase.steps]
    for name, number in last.items():
        if freed:
            freed[number].append(name)
    return [tuple(names) for names in freed]
