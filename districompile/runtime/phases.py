"""What a phase of a plan asks of its surroundings, worked out before the first call."""

from __future__ import annotations

import dataclasses

from districompile.ir.plan import Keep, PhasePlan, Plan, Post, Run, Step, Take, Wait


@dataclasses.dataclass(frozen=True)
class PhaseNeeds:
    """``inputs``: of the module, that anything reads. ``received``: collectives, and ``kept``: states, whose values are
    those of earlier calls. ``posts``: numbers of the ``Post`` steps; ``at_once``: of those
    beside which no engine runs; ``answered``: of those that the same call waits for."""

    inputs: tuple[str, ...]
    received: tuple[str, ...]
    kept: tuple[str, ...]
    posts: frozenset[int]
    at_once: frozenset[int]
    answered: frozenset[int]

    @property
    def overlapped(self) -> bool:
        """Whether anything is sent while engines run."""
        return self.posts > self.at_once


def phase_needs(plan: Plan) -> dict[str, PhaseNeeds]:
    states = {s.state for p in plan.phases.values() for s in p.steps if isinstance(s, Keep)}
    return {
        name: PhaseNeeds(
            tuple(i.value for i in plan.inputs if i.value in _read(phase, plan)),
            tuple(sorted(phase.waited_before_posted)),
            tuple(sorted({v for s in phase.segments.values() for v in s.inputs} & states)),
            frozenset(n for n, step in _posts(phase)),
            frozenset(n for n, step in _posts(phase) if _at_once(phase, n, step)),
            frozenset(n for n, step in _posts(phase) if any(_reads(s, step) for s in phase.steps[n + 1 :])),
        )
        for name, phase in plan.phases.items()
    }


def _read(phase: PhasePlan, plan: Plan) -> set[str]:
    """Values that anything in a phase reads."""
    found = {v for s in phase.segments.values() for v in s.inputs} | set(phase.outputs)
    for step in phase.steps:
        if isinstance(step, Take):
            found.add(step.source)
        elif isinstance(step, Keep):
            found.add(step.value)
        elif isinstance(step, Post):
            found |= {plan.collectives[c].source for c in step.collectives}
    return found


def _posts(phase: PhasePlan) -> list[tuple[int, Post]]:
    return [(n, step) for n, step in enumerate(phase.steps) if isinstance(step, Post)]


def _reads(step: Step, post: Post) -> bool:
    return isinstance(step, Wait) and not set(step.collectives).isdisjoint(post.collectives)


def _at_once(phase: PhasePlan, number: int, post: Post) -> bool:
    for step in phase.steps[number + 1 :]:
        if _reads(step, post):
            return True
        if isinstance(step, Run):
            return False
    return True
