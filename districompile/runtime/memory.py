"""Where everything a rank touches during its calls lies: worked out from the plan alone, before the first call.

- *arena*: values of one call, placed by liveness; shared by both phases, all segments and all streams of calls.
- *regions*: where others' rows arrive. What only lives within a call has one place, for all streams of calls; what a
  later call reads has two places for each stream, or one, if that call has read it when it posts it again.
- *kept*: values that the next call reads (``Keep``): two places for each stream.

What one ``Post`` sends lies together in the order in which the others receive it, so that few copies carry it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping

from districompile.errors import BundleError
from districompile.ir.plan import (
    Collective,
    Deliver,
    Keep,
    PhasePlan,
    Plan,
    Post,
    Reduction,
    Run,
    Take,
    TensorSpec,
    Wait,
)
from districompile.runtime.arena import Interval, aligned, place
from districompile.runtime.links import ReceiveLayout

# What is sent is kept to the end of a call, so that nothing waits for its transfer in between, if that takes no more
# than this share of the weights' memory
_SPARE = 1 / 32
# Second places are given up where all of them take more than this share. Where they take less, ranks need not meet
_SECOND = 1 / 8


@dataclasses.dataclass(frozen=True)
class PhaseMemory:
    """``offsets`` of values in the arena, of ``nbytes``; ``specs`` of all values of the phase on this rank; ``states``
    by the value that is made in their place; ``messages``: the number of each ``Post`` by step; ``releases``: the
    ``Post`` steps whose sources are overwritten from a step on, unless they were waited for before."""

    offsets: Mapping[str, int]
    nbytes: int
    specs: Mapping[str, TensorSpec]
    states: Mapping[str, str]
    messages: Mapping[int, int]
    releases: Mapping[int, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """``remembered``: collectives that a later call reads; ``once``: those of them with one place. Layouts on every
    rank: ``shared`` of the region for all streams; in that of each stream ``twice``, and ``single`` behind it."""

    phases: Mapping[str, PhaseMemory]
    remembered: frozenset[str]
    once: frozenset[str]
    shared: tuple[ReceiveLayout, ...]
    twice: tuple[ReceiveLayout, ...]
    single: tuple[ReceiveLayout, ...]
    kept: Mapping[str, TensorSpec]
    kept_offsets: Mapping[str, int]
    kept_stride: int
    messages: int

    @property
    def arena_bytes(self) -> int:
        return max((p.nbytes for p in self.phases.values()), default=0)

    def received_bytes(self, rank: int) -> int:
        """What others write into on ``rank``, with one stream of calls."""
        return self.shared[rank].nbytes + self.single[rank].nbytes

    def layout(self, name: str, rank: int) -> ReceiveLayout:
        """Where ``rank`` receives the collective ``name``."""
        if name not in self.remembered:
            return self.shared[rank]
        return (self.single if name in self.once else self.twice)[rank]


def plan_memory(plan: Plan, rank: int, elsewhere: Mapping[str, Collection[str]] | None = None) -> MemoryPlan:
    """``elsewhere``: by phase, values that engines put into places of their own. Raises :class:`BundleError` for a plan
    that does not say how large its values are."""
    remembered = frozenset().union(*(p.waited_before_posted for p in plan.phases.values()))
    specs = {name: _specs(plan, phase, rank) for name, phase in plan.phases.items()}
    kept: dict[str, TensorSpec] = {}
    for name, phase in plan.phases.items():
        for step in phase.steps:
            if isinstance(step, Keep):
                kept[step.state] = specs[name][step.value]
    order = _order(plan)
    collectives = sorted(plan.collectives.values(), key=lambda c: order[c.name])
    ranks, weights = range(plan.ranks), sum(spec.nbytes for spec in plan.weights.values())
    once = frozenset(n for n in remembered if all(_read_before_posted(p, n) for p in plan.phases.values()))
    if (
        max(ReceiveLayout.of([c for c in collectives if c.name in once], r, 1).nbytes for r in ranks)
        <= _SECOND * weights
    ):
        once = frozenset()
    shared = tuple(ReceiveLayout.of([c for c in collectives if c.name not in remembered], r, 1) for r in ranks)
    twice = tuple(ReceiveLayout.of([c for c in collectives if c.name in remembered - once], r, 2) for r in ranks)
    single = tuple(ReceiveLayout.of([c for c in collectives if c.name in once], r, 1, twice[r].nbytes) for r in ranks)
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
    return MemoryPlan(phases, remembered, once, shared, twice, single, kept, offsets, end, messages)


def _read_before_posted(phase: PhasePlan, name: str) -> bool:
    """Whether a phase that reads an earlier call's result is done with it when it posts the next one, and goes on
    computing: where nothing runs beside a transfer, ranks do not meet for it."""
    if name not in phase.waited_before_posted:
        return True
    posts = [i for i, s in enumerate(phase.steps) if isinstance(s, Post) and name in s.collectives]
    runs = [i for i, s in enumerate(phase.steps) if isinstance(s, Run)]
    if len(posts) != 1 or runs[-1] < posts[0] or name in phase.outputs:
        return False
    for i, step in enumerate(phase.steps):
        later = i > posts[0] and isinstance(step, Run) and name in phase.segments[step.segment].inputs
        if later or (isinstance(step, Keep) and step.value == name):
            return False
    return True


def _kept_value(plan: Plan, state: str) -> str:
    keeps = [s for p in plan.phases.values() for s in p.steps if isinstance(s, Keep) and s.state == state]
    return keeps[-1].value


def _order(plan: Plan) -> dict[str, int]:
    """A place for each collective: by the posts of the steady phase; within one, what is kept as well (tiny), then
    whole sources, then what is picked out of them."""
    phases = [p for p in (plan.phases.get("steady"), plan.phases.get("warmup")) if p is not None]
    phases += [p for p in plan.phases.values() if p not in phases]
    kept = {s.value for p in phases for s in p.steps if isinstance(s, Keep)}
    ordered: dict[str, None] = {}
    for phase in phases:
        for step in phase.steps:
            if isinstance(step, Post):
                ordered.update(dict.fromkeys(sorted(step.collectives, key=lambda n: _group(plan.collectives[n], kept))))
    ordered.update(dict.fromkeys(plan.collectives))
    return {name: i for i, name in enumerate(ordered)}


def _group(c: Collective, kept: set[str]) -> int:
    if c.source in kept:
        return 0
    return 1 if isinstance(c, Reduction) or c.pattern == "all_gather" else 2


def _specs(plan: Plan, phase: PhasePlan, rank: int) -> dict[str, TensorSpec]:
    """What every value of a phase is on ``rank``."""
    specs = {i.value: i.spec for i in plan.inputs}
    for step in phase.steps:
        if isinstance(step, Take):
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
    plan: Plan, phase: PhasePlan, specs: Mapping[str, TensorSpec], kept: Mapping[str, TensorSpec],
    order: Mapping[str, int], messages: int, elsewhere: Collection[str], held: bool,
) -> PhaseMemory:  # fmt: skip
    """``held``: what is sent is kept to the end of the call."""
    steps = phase.steps
    made: dict[str, int] = {}
    for i, step in enumerate(steps):
        if isinstance(step, Run):
            made.update(dict.fromkeys(phase.segments[step.segment].outputs, i))
    states: dict[str, str] = {}
    for step in steps:
        if isinstance(step, Keep) and step.value in made and specs[step.value] == kept[step.state]:
            states.setdefault(step.value, step.state)
    last = last_uses(plan, phase, held)
    first = made | {s.value: i for i, s in enumerate(steps) if isinstance(s, Take)}
    # The combined result of a reduction is a value of the call; what arrives for an exchange lies in a region.
    for i, step in enumerate(steps):
        if isinstance(step, Wait):
            reduced = (n for n in step.collectives if isinstance(plan.collectives[n], Reduction))
            first.update((n, min(i, first.get(n, i))) for n in reduced)
    local = {v for v in first if v not in states and v not in elsewhere}
    intervals: list[Interval] = []
    inside: dict[str, tuple[str, int]] = {}
    numbers: dict[int, int] = {}
    for i, step in enumerate(steps):
        if not isinstance(step, Post):
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


def _in_use(phase: PhasePlan, post: int) -> int:
    """The last step for which what a ``Post`` sends surely stays in its place: the first ``Run`` after it, under which
    it travels."""
    return next((j for j, s in enumerate(phase.steps) if j > post and isinstance(s, Run)), len(phase.steps))


def last_uses(plan: Plan, phase: PhasePlan, held: bool) -> dict[str, int]:
    """The last step at which each value must be in its place (``len(steps)``: to the end of the call). What is sent
    stays until its transfer is waited for; what a later call waits for stays to the end if it is ``held``, else under
    the next segment."""
    end = len(phase.steps)
    last: dict[str, int] = {}

    def use(names: Iterable[str], step: int) -> None:
        last.update((n, max(step, last.get(n, 0))) for n in names)

    for i, step in enumerate(phase.steps):
        if isinstance(step, Take):
            use([step.source, step.value], i)
        elif isinstance(step, Run):
            segment = phase.segments[step.segment]
            use([*segment.inputs, *segment.outputs], i)
        elif isinstance(step, Wait | Deliver):
            use(step.collectives, i)
        elif isinstance(step, Keep):
            use([step.value], end)
        else:
            for name in step.collectives:
                waits = [
                    j for j, s in enumerate(phase.steps) if j > i and isinstance(s, Wait) and name in s.collectives
                ]
                use([plan.collectives[name].source], waits[0] if waits else end if held else _in_use(phase, i))
    use(phase.outputs, end)
    return last
