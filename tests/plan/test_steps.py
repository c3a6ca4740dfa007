"""What the steps of a plan read and write, and what is refused of steps that do not fit each other."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
from helpers_toy import make_plan

from districompile.errors import ConvertError
from districompile.plan.plan import Clear, Publish, Run, SaveState, Schedule, SliceInput, Start, Step, Wait
from districompile.plan.schedule import check_plan

PLAN = make_plan(2)
EXACT = PLAN.phases["exact"]


@pytest.mark.parametrize(
    "step, reads, writes",
    [
        (SliceInput("rows", "sample", 1, (0, 3), (3, 7)), ("sample",), ("rows",)),
        (Run("stencil"), ("halo", "timestep"), ("y", "sum")),
        (Start(("halo", "total")), ("x", "sum"), ()),
        (Wait(("halo", "total")), (), ("halo", "total")),
        (SaveState("own_sum", "sum"), ("sum",), ()),
        (Publish(("halo",)), ("halo",), ()),
        (Clear(("halo",)), (), ()),
    ],
)
def test_values_of_each_step(step: Step, reads: tuple[str, ...], writes: tuple[str, ...]) -> None:
    assert step.reads(EXACT, PLAN.collectives) == reads
    assert step.writes(EXACT, PLAN.collectives) == writes


def test_every_kind_of_step_says_what_it_reads_and_writes() -> None:
    kinds = [get_args(kind)[0] for kind in get_args(get_args(Step)[0])]
    assert {*kinds} == {SliceInput, Run, Start, Wait, SaveState, Publish, Clear}
    assert all(callable(kind.reads) and callable(kind.writes) for kind in kinds)


def without(schedule: Schedule, step: Step) -> Schedule:
    return dataclasses.replace(schedule, steps=tuple(s for s in schedule.steps if s != step))


@pytest.mark.parametrize(
    "schedule, problem",
    [
        (without(EXACT, Run("cut")), "exact: halo reads x before it exists"),
        (without(EXACT, Wait(("halo",))), "exact: segment stencil reads halo before it exists"),
        (without(EXACT, Start(("total",))), "exact: total is waited for before it is posted"),
        (without(EXACT, Wait(("out",))), "exact: output out does not exist"),
        (dataclasses.replace(EXACT, steps=(SaveState("s", "y"), *EXACT.steps)), "exact: state s reads y before"),
        (
            dataclasses.replace(EXACT, steps=(*EXACT.steps, SaveState("own_sum", "y"))),
            "exact: state own_sum is written twice",
        ),
        (dataclasses.replace(EXACT, steps=(*EXACT.steps, Start(("out",)))), "exact: out is posted twice"),
        (
            dataclasses.replace(EXACT, steps=(SliceInput("a", "b", 1, (0, 3), (3, 7)), *EXACT.steps)),
            "exact: the slice a reads b before it exists",
        ),
    ],
)
def test_steps_that_do_not_fit_are_refused(schedule: Schedule, problem: str) -> None:
    check_plan("exact", EXACT, PLAN.collectives, ["sample", "timestep"])
    with pytest.raises(ConvertError, match=problem):
        check_plan("exact", schedule, PLAN.collectives, ["sample", "timestep"])
