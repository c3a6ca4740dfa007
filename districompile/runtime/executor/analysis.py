# SPDX-License-Identifier: Apache-2.0
"""Static analysis of a schedule: inputs read, state required, transfers that cannot overlap."""

from __future__ import annotations

import dataclasses

from districompile.plan.plan import ExecutionPlan, Run, SaveState, Schedule, Start, Step, Wait


@dataclasses.dataclass(frozen=True)
class PhaseNeeds:
    """The inputs, state and transfers of a phase.

    ``inputs`` are the inputs of the module that anything reads. ``received`` are the collectives, and ``kept`` the
    states, whose values come from earlier calls. ``posts`` are the numbers of the ``Start`` steps. ``exposed`` are
    those during which no engine runs, and ``waited_in_call`` those that the same call waits for.
    """

    inputs: tuple[str, ...]
    received: tuple[str, ...]
    kept: tuple[str, ...]
    posts: frozenset[int]
    exposed: frozenset[int]
    waited_in_call: frozenset[int]

    @property
    def overlapped(self) -> bool:
        """Whether anything is sent while engines run."""
        return self.posts > self.exposed


def phase_needs(plan: ExecutionPlan) -> dict[str, PhaseNeeds]:
    states = {s.state for p in plan.phases.values() for s in p.steps if isinstance(s, SaveState)}
    return {
        name: PhaseNeeds(
            tuple(i.value for i in plan.inputs if i.value in _read(phase, plan)),
            tuple(sorted(phase.waited_before_posted)),
            tuple(sorted({v for s in phase.segments.values() for v in s.inputs} & states)),
            frozenset(n for n, step in _posts(phase)),
            frozenset(n for n, step in _posts(phase) if _is_exposed(phase, n, step)),
            frozenset(n for n, step in _posts(phase) if any(_reads(s, step) for s in phase.steps[n + 1 :])),
        )
        for name, phase in plan.phases.items()
    }


def _read(phase: Schedule, plan: ExecutionPlan) -> set[str]:
    """Return the values that a phase reads."""
    return {*phase.outputs, *(v for step in phase.steps for v in step.reads(phase, plan.collectives))}


def _posts(phase: Schedule) -> list[tuple[int, Start]]:
    return [(n, step) for n, step in enumerate(phase.steps) if isinstance(step, Start)]


def _reads(step: Step, post: Start) -> bool:
    return isinstance(step, Wait) and not set(step.collectives).isdisjoint(post.collectives)


def _is_exposed(phase: Schedule, number: int, post: Start) -> bool:
    for step in phase.steps[number + 1 :]:
        if _reads(step, post):
            return True
        if isinstance(step, Run):
            return False
    return True
