# SPDX-License-Identifier: Apache-2.0
"""Print the steps of a plan: what runs, what is sent, and until when each transfer is pending."""

from __future__ import annotations

import collections
import textwrap

from districompile.ir.spec import Phase
from districompile.plan.plan import Clear, Exchange, ExecutionPlan, Publish, Run, Schedule, SliceInput, Start, Wait
from districompile.plan.report import spread

WIDTH = 110  # columns of files, and of output to anything but a terminal


def phase_text(plan: ExecutionPlan, phase: Phase, width: int | None = WIDTH) -> str:
    """Return the steps of one phase, numbered, in lines of at most ``width`` columns; None: one line a step.

    A ``start`` line says until which step its transfer is pending: the number of the step that waits for it, in this
    call or in the next one.
    """
    head = f"{phase}: {len(plan.phases[phase].steps)} steps, {len(plan.phases[phase].segments)} segments, "
    lines = [f"{head}{plan.ranks} ranks", *step_lines(plan, phase)]
    if width is None:
        return "\n".join(lines)
    return "\n".join(
        part
        for line in lines
        for part in textwrap.wrap(
            line, width, subsequent_indent=" " * 11, break_long_words=False, break_on_hyphens=False
        )
    )


def step_lines(plan: ExecutionPlan, phase: Phase) -> list[str]:
    """Return one line for each step, a line more for each further transfer of a ``start``, and the outputs."""
    schedule = plan.phases[phase]
    lines = []
    for number, step in enumerate(schedule.steps):
        if isinstance(step, SliceInput):
            rows = ", ".join(f"{a}:{b}" for a, b in zip(step.starts, step.stops, strict=True))
            texts = [f"slice   {step.value} = {step.source}[dim {step.dim}, rows {rows}]"]
        elif isinstance(step, Run):
            texts = [f"run     {_run(schedule, step)}"]
        elif isinstance(step, Start):
            texts = [f"start   {_collective(plan, name, _pending(plan, phase, number, name))}"
                     for name in step.collectives]  # fmt: skip
        elif isinstance(step, Wait):
            texts = [f"wait    {', '.join(step.collectives)}"]
        elif isinstance(step, Publish):
            texts = [f"publish {', '.join(step.collectives)}  # received inside of the engine"]
        elif isinstance(step, Clear):
            texts = [f"clear   {', '.join(step.collectives)}  # the next call reads zeros"]
        else:
            texts = [f"save    {step.state} = {step.value}  # for the next call"]
        lines += [f"{number:3} {text}" for text in texts]
    return [*lines, f"    return  {', '.join(schedule.outputs)}"]


def _run(schedule: Schedule, step: Run) -> str:
    segment = schedule.segments[step.segment]
    engines, weights = len(set(segment.engines)), len(segment.weights)
    return (
        f"{segment.name}({', '.join(segment.inputs)}) -> {', '.join(segment.outputs)}"
        f"  # {weights} weight{'s' * (weights != 1)}, {engines} distinct engine{'s' * (engines != 1)}"
    )


def _pending(plan: ExecutionPlan, phase: Phase, number: int, name: str) -> str:
    """Return until when the transfer of ``name`` that step ``number`` starts is pending, according to the steps."""
    steps = plan.phases[phase].steps
    for later in range(number + 1, len(steps)):
        step = steps[later]
        if isinstance(step, Start) and name in step.collectives:
            return f"pending until step {later}"
        if isinstance(step, Wait) and name in step.collectives:
            kept = any(name in p.waited_before_posted for p in plan.phases.values())
            return f"pending until step {later}" + (", then kept for the next call" if kept else "")
    waits = [n for n, s in enumerate(steps) if isinstance(s, Wait) and name in s.collectives]
    if waits:
        return f"pending until step {waits[0]} of the next call"
    return "pending until the next call reads it"


def _collective(plan: ExecutionPlan, name: str, pending: str) -> str:
    c = plan.collectives[name]
    shapes = collections.Counter(s.shape for s in c.specs)
    shape = " | ".join(str(list(s)) for s in shapes)
    how = f"{c.pattern} along dim {c.dim}" if isinstance(c, Exchange) else c.op
    sent = spread([c.sent_bytes(r) for r in range(plan.ranks)])
    kind = type(c).__name__.lower()
    return f"{name} = {kind}({c.source} : {shape})  # {c.purpose}, {how}, {sent}; {pending}; {c.module_path}"
