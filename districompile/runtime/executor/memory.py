# SPDX-License-Identifier: Apache-2.0
"""Plan the memory of one rank from the execution plan alone, before the first call.

- *arena*: values of one call, placed by liveness. Both phases, all segments and all streams of calls share it.
- *receive buffers*: memory in which other ranks' rows arrive. A result of one call alone has one buffer, for all
  streams of calls. A result that a later call reads has two buffers for each stream, or one if that call has read it
  before it posts it again.
- *kept*: values that the next call reads (``SaveState``). They have two buffers for each stream.

Sources of one ``Start`` lie together, in the order in which the other ranks receive them, so that few copies carry
them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping

from typing_extensions import assert_never

from districompile.errors import BundleError
from districompile.ir.spec import TensorSpec
from districompile.plan.plan import (
    Clear,
    Collective,
    ExecutionPlan,
    Publish,
    Reduction,
    Run,
    SaveState,
    Schedule,
    SliceInput,
    Start,
    Wait,
)
from districompile.runtime.executor.arena import Interval, aligned, place
from districompile.runtime.transports.base import ReceiveLayout

# Send buffers stay alive to the end of a call, so that nothing waits for their transfers in between, if that takes no
# more than this share of the weights' memory.
_SPARE = 1 / 32
# The second of two buffers is given up if all of them take more than this share. If they take less, no acks are needed.
_SECOND = 1 / 8


@dataclasses.dataclass(frozen=True)
class PhaseMemory:
    """The memory of one phase on this rank.

    ``offsets`` are those of values in the arena, which has ``nbytes``. ``specs`` has all values of the phase.
    ``states`` maps a value that is written into the memory of a state to that state. ``messages`` has the number of
    each ``Start``, by step. ``releases`` maps a step to the ``Start`` steps whose sources are overwritten from that
    step on.
    """

    offsets: Mapping[str, int]
    nbytes: int
    specs: Mapping[str, TensorSpec]
    states: Mapping[str, str]
    messages: Mapping[int, int]
    releases: Mapping[int, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """The memory of one rank, and the receive buffers of all.

    ``cross_call`` are the collectives whose results a later call reads. Those of them in ``single_buffered`` have one
    buffer, the others two. Layouts are by rank. ``shared_layout`` is that of the buffer of all streams. The buffer of
    each stream begins with ``double_layout`` and continues with ``single_layout``.
    """

    phases: Mapping[str, PhaseMemory]
    cross_call: frozenset[str]
    single_buffered: frozenset[str]
    shared_layout: tuple[ReceiveLayout, ...]
    double_layout: tuple[ReceiveLayout, ...]
    single_layout: tuple[ReceiveLayout, ...]
    kept: Mapping[str, TensorSpec]
    kept_offsets: Mapping[str, int]
    kept_stride: int
    messages: int

    @property
    def arena_bytes(self) -> int:
        return max((p.nbytes for p in self.phases.values()), default=0)

    @property
    def shared_bytes(self) -> int:
        """The size of the receive buffer of all streams, the same on all ranks."""
        return max(layout.nbytes for layout in self.shared_layout)

    @property
    def stream_bytes(self) -> int:
        """The size of the receive buffer of one stream, the same on all ranks."""
        return max(layout.nbytes for layout in self.single_layout)

    @property
    def signals(self) -> int:
        """The number of signal slots of one stream."""
        return 4 * self.messages

    def received_bytes(self, rank: int) -> int:
        """Return the size of the memory of ``rank`` that other ranks write into, with one stream of calls."""
        return self.shared_layout[rank].nbytes + self.single_layout[rank].nbytes

    def layout(self, name: str, rank: int) -> ReceiveLayout:
        """Return where ``rank`` receives the collective ``name``."""
        if name not in self.cross_call:
            return self.shared_layout[rank]
        return (self.single_layout if name in self.single_buffered else self.double_layout)[rank]


def plan_memory(plan: ExecutionPlan, rank: int, elsewhere: Mapping[str, Collection[str]] | None = None) -> MemoryPlan:
    """Plan the memory of ``rank``.

    ``elsewhere`` has, by phase, the values that engines put into their own memory. Raises :class:`BundleError` for a
    plan that lacks the sizes of its values.
    """
    cross_call = frozenset().union(*(p.waited_before_posted for p in plan.phases.values()))
    specs = {name: _specs(plan, phase, rank) for name, phase in plan.phases.items()}
    kept: dict[str, TensorSpec] = {}
    for name, phase in plan.phases.items():
        for step in phase.steps:
            if isinstance(step, SaveState):
                kept[step.state] = specs[name][step.value]
    order = _order(plan)
    collectives = sorted(plan.collectives.values(), key=lambda c: order[c.name])
    ranks, weights = range(plan.ranks), sum(spec.nbytes for spec in plan.weights.values())
    phases_of_plan = plan.phases.values()
    early = frozenset(n for n in cross_call if all(_read_before_posted(plan, p, n) for p in phases_of_plan))
    saved = max(ReceiveLayout.of([c for c in collectives if c.name in early], r, 1).nbytes for r in ranks)
    single_buffered: frozenset[str] = early if saved > _SECOND * weights else frozenset()
    twice = [c for c in collectives if c.name in cross_call - single_buffered]
    once = [c for c in collectives if c.name in single_buffered]
    shared = tuple(ReceiveLayout.of([c for c in collectives if c.name not in cross_call], r, 1) for r in ranks)
    double = tuple(ReceiveLayout.of(twice, r, 2) for r in ranks)
    single = tuple(ReceiveLayout.of(once, r, 1, double[r].nbytes) for r in ranks)
    messages = 0
    spare = _SPARE * weights
    phases: dict[str, PhaseMemory] = {}
    sources = {c.source: order[c.name] for c in reversed(collectives)}
    kept_order = sorted(kept, key=lambda s: sources.get(_kept_value(plan, s), len(order)))
    for name, phase in plan.phases.items():
        alone = (elsewhere or {}).get(name, ())
        held, released = (_phase(plan, phase, specs[name], kept, order, messages, alone, h) for h in (True, False))
        phases[name] = held if held.nbytes - released.nbytes <= spare else released
        messages += len(phases[name].messages)
    offsets: dict[str, int] = {}
    end = 0
    for state in kept_order:
        offsets[state] = end
        end += aligned(kept[state].nbytes)
    return MemoryPlan(phases, cross_call, single_buffered, shared, double, single, kept, offsets, end, messages)


def _read_before_posted(plan: ExecutionPlan, phase: Schedule, name: str) -> bool:
    """Return whether a single buffer is enough for ``name`` in ``phase``.

    That is so if the phase has read an earlier call's result before it posts the next one, and computes afterwards. If
    nothing ran beside a transfer, ranks would only wait for each other's acks.
    """
    if name not in phase.waited_before_posted:
        return True
    posts = [i for i, s in enumerate(phase.steps) if isinstance(s, Start) and name in s.collectives]
    runs = [i for i, s in enumerate(phase.steps) if isinstance(s, Run)]
    if len(posts) != 1 or runs[-1] < posts[0] or name in phase.outputs:
        return False
    later = (i > posts[0] or isinstance(step, SaveState) for i, step in enumerate(phase.steps))
    reads = (name in step.reads(phase, plan.collectives) for step in phase.steps)
    return not any(a and b for a, b in zip(later, reads, strict=True))


def _kept_value(plan: ExecutionPlan, state: str) -> str:
    keeps = [s for p in plan.phases.values() for s in p.steps if isinstance(s, SaveState) and s.state == state]
    return keeps[-1].value


def _order(plan: ExecutionPlan) -> dict[str, int]:
    """Return a position for each collective, by the posts of the displaced phase.

    Within one post, collectives of values that are also kept (tiny) come first, then whole sources, then parts of
    sources.
    """
    phases = [p for p in (plan.phases.get("displaced"), plan.phases.get("exact")) if p is not None]
    phases += [p for p in plan.phases.values() if p not in phases]
    kept = {s.value for p in phases for s in p.steps if isinstance(s, SaveState)}
    ordered: dict[str, None] = {}
    for phase in phases:
        for step in phase.steps:
            if isinstance(step, Start):
                ordered.update(dict.fromkeys(sorted(step.collectives, key=lambda n: _group(plan.collectives[n], kept))))
    ordered.update(dict.fromkeys(plan.collectives))
    return {name: i for i, name in enumerate(ordered)}


def _group(c: Collective, kept: set[str]) -> int:
    if c.source in kept:
        return 0
    return 1 if isinstance(c, Reduction) or c.pattern == "all_gather" else 2


def _specs(plan: ExecutionPlan, phase: Schedule, rank: int) -> dict[str, TensorSpec]:
    """Return the spec of every value of a phase on ``rank``."""
    specs = {i.value: i.spec for i in plan.inputs}
    for step in phase.steps:
        if isinstance(step, SliceInput):
            shape = list(specs[step.source].shape)
            shape[step.dim] = step.stops[rank] - step.starts[rank]
            specs[step.value] = TensorSpec(tuple(shape), specs[step.source].dtype)
        elif isinstance(step, Run):
            for name in phase.segments[step.segment].outputs:
                if name not in phase.values:
                    raise BundleError(
                        f"the plan does not say how large {name} is: it was made by an earlier version, convert again"
                    )
                specs[name] = phase.values[name][rank]
        elif isinstance(step, Wait):
            specs.update((name, plan.collectives[name].results[rank]) for name in step.collectives)
    return specs


def _phase(
    plan: ExecutionPlan, phase: Schedule, specs: Mapping[str, TensorSpec], kept: Mapping[str, TensorSpec],
    order: Mapping[str, int], messages: int, elsewhere: Collection[str], held: bool,
) -> PhaseMemory:  # fmt: skip
    """Plan the memory of a phase. ``held``: keep send buffers alive until the end of the call."""
    steps = phase.steps
    made: dict[str, int] = {}
    for i, step in enumerate(steps):
        if isinstance(step, Run):
            made.update(dict.fromkeys(step.writes(phase, plan.collectives), i))
    states: dict[str, str] = {}
    for step in steps:
        if isinstance(step, SaveState) and step.value in made and specs[step.value] == kept[step.state]:
            states.setdefault(step.value, step.state)
    last = last_uses(plan, phase, held)
    first = made | {s.value: i for i, s in enumerate(steps) if isinstance(s, SliceInput)}
    # The combined result of a reduction is a value of the call. The result of an exchange lies in a receive buffer.
    for i, step in enumerate(steps):
        if isinstance(step, Wait):
            reduced = (n for n in step.collectives if isinstance(plan.collectives[n], Reduction))
            first.update((n, min(i, first.get(n, i))) for n in reduced)
    local = {v for v in first if v not in states and v not in elsewhere}
    intervals: list[Interval] = []
    inside: dict[str, tuple[str, int]] = {}
    numbers: dict[int, int] = {}
    for i, step in enumerate(steps):
        if not isinstance(step, Start):
            continue
        numbers[i] = messages + len(numbers)
        ordered = sorted(step.collectives, key=order.__getitem__)
        block = [
            v for v in dict.fromkeys(plan.collectives[n].source for n in ordered) if v in local and v not in inside
        ]
        end = 0
        for v in block:
            inside[v] = (f"post {i}", end)
            end += aligned(specs[v].nbytes)
        if block:
            intervals.append(
                Interval(f"post {i}", end, min(first[v] for v in block), max(last.get(v, first[v]) for v in block))
            )
    intervals += [Interval(v, specs[v].nbytes, first[v], last.get(v, first[v])) for v in local if v not in inside]
    offsets, nbytes = place(intervals)
    found = {v: offsets[inside[v][0]] + inside[v][1] if v in inside else offsets[v] for v in local}
    releases: dict[int, tuple[int, ...]] = {}
    for i in () if held else numbers:
        after = _in_use(phase, i)
        if after < len(steps):
            releases[after + 1] = (*releases.get(after + 1, ()), i)
    return PhaseMemory(found, nbytes, specs, states, numbers, releases)


def _in_use(phase: Schedule, post: int) -> int:
    """Return the last step at which the sources of a ``Start`` surely stay in place.

    That is the first ``Run`` after it, during which they travel.
    """
    return next((j for j, s in enumerate(phase.steps) if j > post and isinstance(s, Run)), len(phase.steps))


def last_uses(plan: ExecutionPlan, phase: Schedule, held: bool) -> dict[str, int]:
    """Return the last step at which each value must be in its place. ``len(steps)`` is the end of the call.

    Sent values stay until their transfer is waited for. If a later call waits for it, they stay to the end of the call
    when ``held``, else during the next segment.
    """
    end = len(phase.steps)
    last: dict[str, int] = {}

    def use(names: Iterable[str], step: int) -> None:
        last.update((n, max(step, last.get(n, 0))) for n in names)

    for i, step in enumerate(phase.steps):
        if isinstance(step, SliceInput | Run | Wait | Publish):
            use([*step.reads(phase, plan.collectives), *step.writes(phase, plan.collectives)], i)
        elif isinstance(step, SaveState):
            use([step.value], end)
        elif isinstance(step, Start):
            for name in step.collectives:
                waits = [
                    j for j, s in enumerate(phase.steps) if j > i and isinstance(s, Wait) and name in s.collectives
                ]
                use([plan.collectives[name].source], waits[0] if waits else end if held else _in_use(phase, i))
        elif not isinstance(step, Clear):
            assert_never(step)
    use(phase.outputs, end)
    return last
