"""The reference executor runs plans: both phases, several streams, values freed, errors that say what to do."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from helpers_toy import Reference, make_engines, make_plan

from districompile.errors import InputError
from districompile.plan.plan import ExecutionPlan, Run, Start, Wait
from tests.reference.executor import DynamicExecutor, StreamState
from tests.reference.transports import DynamicGroup

CPU = torch.device("cpu")


class Lockstep:
    """All ranks of a plan, one stream."""

    def __init__(self, plan: ExecutionPlan) -> None:
        self.group = DynamicGroup(plan.ranks)
        self.executors = [
            DynamicExecutor(plan, r, make_engines(plan, r), t, CPU) for r, t in enumerate(self.group.transports)
        ]
        self.states = [StreamState() for _ in self.executors]

    def __call__(self, sample: torch.Tensor, timestep: float, phase: str) -> list[torch.Tensor]:
        inputs = {"sample": sample, "timestep": torch.full((2,), timestep)}
        runs = [e.iterate(phase, inputs, s) for e, s in zip(self.executors, self.states, strict=True)]
        outputs: list[torch.Tensor] = []
        while len(outputs) < len(runs):
            for run in runs:
                try:
                    next(run)
                except StopIteration as end:
                    outputs.extend(end.value)
        return outputs


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_both_phases_compute_what_they_say(ranks: int) -> None:
    plan = make_plan(ranks)
    lockstep, reference = Lockstep(plan), Reference(plan)
    kept = []
    for i, phase in enumerate(["exact", "exact", "displaced", "displaced", "exact", "displaced"]):
        torch.manual_seed(i)
        sample = torch.randn(2, 7)
        outputs = lockstep(sample, 5.0 - i, phase)
        want = reference(sample, 5.0 - i, phase)
        for got in outputs:
            torch.testing.assert_close(got, want)
        assert all(torch.equal(outputs[0], o) for o in outputs)
        kept.append((outputs[0], want))
    for got, want in kept:  # a later call has not overwritten what an earlier one returned
        torch.testing.assert_close(got, want)


def test_changing_an_output_does_not_change_the_state() -> None:
    plan = make_plan(2)
    plan = dataclasses.replace(
        plan, phases={n: dataclasses.replace(p, outputs=("out", "halo")) for n, p in plan.phases.items()}
    )
    a, b = Lockstep(plan), Lockstep(plan)
    for lockstep in (a, b):
        for output in lockstep(torch.ones(2, 7), 1.0, "exact"):
            if lockstep is a:
                output.fill_(99)
    got, want = (lockstep(torch.ones(2, 7), 1.0, "displaced") for lockstep in (a, b))
    assert all(map(torch.equal, got, want))


def test_streams_do_not_mix() -> None:
    plan = make_plan(2)
    lockstep, references = Lockstep(plan), [Reference(plan), Reference(plan)]
    states = [[StreamState(), StreamState()] for _ in range(2)]
    torch.manual_seed(0)
    for phase in ("exact", "displaced", "displaced"):
        for stream in (0, 1):
            lockstep.states = states[stream]
            sample = torch.randn(2, 7)
            torch.testing.assert_close(lockstep(sample, 1.0, phase)[0], references[stream](sample, 1.0, phase))


def test_values_are_freed_after_their_last_use() -> None:
    plan = make_plan(1)
    group = DynamicGroup(1)
    alive: list[weakref.ref[torch.Tensor]] = []
    engines = make_engines(plan, 0)
    for engine in engines["exact"].values():
        inner = engine.function  # type: ignore[attr-defined]

        def fresh(inputs: dict[str, torch.Tensor], inner=inner) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
            return dict(inner(inputs).items())

        engine.function = fresh  # type: ignore[attr-defined]

        def output(name: str, engine=engine) -> torch.Tensor:  # type: ignore[no-untyped-def]
            tensor: torch.Tensor = engine.outputs.pop(name)
            alive.append(weakref.ref(tensor))
            return tensor

        engine.output = output  # type: ignore[method-assign]
    executor = DynamicExecutor(plan, 0, engines, group.transports[0], CPU)
    most = 0
    for _ in executor.iterate("exact", {"sample": torch.ones(2, 7), "timestep": torch.ones(2)}, StreamState()):
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
    assert len(alive) == 4
    assert most == 2  # y and sum; never x and z as well


def test_only_displaced_results_are_remembered() -> None:
    lockstep = Lockstep(make_plan(2))
    lockstep(torch.ones(2, 7), 1.0, "exact")
    assert set(lockstep.states[0].results) == {"halo", "total"}
    assert set(lockstep.states[0].kept) == {"own_sum"}
    lockstep(torch.ones(2, 7), 1.0, "displaced")
    assert set(lockstep.states[0].pending) == {"halo", "total"} and not lockstep.states[0].results


def test_steady_without_warmup_names_the_site() -> None:
    lockstep = Lockstep(make_plan(2))
    with pytest.raises(InputError, match=r"stencil: nothing was received .* Run the exact phase first"):
        lockstep(torch.ones(2, 7), 1.0, "displaced")


def test_missing_state_is_named() -> None:
    lockstep = Lockstep(make_plan(2))
    lockstep(torch.ones(2, 7), 1.0, "exact")
    for state in lockstep.states:
        state.kept.clear()
    with pytest.raises(InputError, match=r"own_sum: no earlier call left this state"):
        lockstep(torch.ones(2, 7), 1.0, "displaced")


def test_a_plan_that_reads_what_nothing_made_is_a_defect() -> None:
    plan = make_plan(1)
    exact = plan.phases["exact"]
    broken = dataclasses.replace(exact, steps=exact.steps[1:])
    plan = dataclasses.replace(plan, phases={**plan.phases, "exact": broken})
    with pytest.raises(RuntimeError, match="uses the value x before"):
        Lockstep(plan)(torch.ones(2, 7), 1.0, "exact")


def test_reset_completes_what_is_under_way() -> None:
    lockstep, plan = Lockstep(make_plan(2)), make_plan(2)
    for phase in ("exact", "displaced"):
        lockstep(torch.ones(2, 7), 1.0, phase)
    assert lockstep.group.mail
    for state in lockstep.states:
        state.reset()
        assert not (state.pending or state.results or state.kept)
    assert not lockstep.group.mail
    reference = Reference(plan)
    for phase in ("exact", "displaced"):
        torch.testing.assert_close(lockstep(torch.ones(2, 7), 3.0, phase)[0], reference(torch.ones(2, 7), 3.0, phase))


def test_posted_twice_before_it_is_read() -> None:
    """The later transfer counts, and the earlier one is completed."""
    plan = make_plan(2)
    twice = dataclasses.replace(
        plan.phases["exact"],
        steps=(Run("cut"), Start(("halo",)), Start(("halo",)), Wait(("halo",)), *plan.phases["exact"].steps[3:]),
    )
    lockstep = Lockstep(dataclasses.replace(plan, phases={**plan.phases, "exact": twice}))
    sample = torch.randn(2, 7)
    torch.testing.assert_close(lockstep(sample, 1.0, "exact")[0], Reference(plan)(sample, 1.0, "exact"))
    assert not lockstep.group.mail
