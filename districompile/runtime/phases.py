"""What a phase of a plan asks of its surroundings, worked out before the first call."""

from __future__ import annotations

import dataclasses

from districompile.ir.plan import Keep, PhasePlan, Plan, Post, Run, Take, Wait


@dataclasses.dataclass(frozen=True)
class PhaseNeeds:
    """``inputs``: of the module, that anything reads. ``received``: collectives, and ``kept``: states, whose values are
    those of earlier calls. ``at_once``: numbers of the ``Post`` steps that are waited for before an engine runs."""

    inputs: tuple[str, ...]
    received: tuple[str, ...]
    kept: tuple[str, ...]
    at_once: frozenset[int]


def phase_needs(plan: Plan) -> dict[str, PhaseNeeds]:
    states = {s.state for p in plan.phases.values() for s in p.steps if isinstance(s, Keep)}
    return {
        name: PhaseNeeds(
            tuple(i.value for i in plan.inputs if i.value in _read(phase, plan)),
            tuple(sorted(phase.waited_before_posted)),
            tuple(sorted({v for s in phase.segments.values() for v in s.inputs} & states)),
            frozenset(n for n, step in enumerate(phase.steps) if isinstance(step, Post) and _at_once(phase, n, step)),
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


def _at_once(phase: PhasePlan, number: int, post: Post) -> bool:
    for step in phase.steps[number + 1 :]:
        if isinstance(step, Wait) and set(step.collectives) & set(post.collectives):
            return True
        if isinstance(step, Run):
            return False
    return False
