"""The exact phase as one graph with its collectives inside: computes what the phase cut at every collective does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import districompile as dc
from districompile.backends.base import Engine
from districompile.errors import BackendError, ConvertError
from districompile.ir.inside import NAME, delivered, gathered, run_joined, whole_plan, whole_segment
from districompile.ir.plan import Deliver, Exchange, Plan, Run, Take
from districompile.passes.leave_room import LeaveRoom
from districompile.runtime.agreement import Proposal
from districompile.runtime.executor import Executor
from districompile.runtime.inputs import InputChecker
from districompile.runtime.lockstep import LockstepLinks
from districompile.runtime.runner import LockstepRunner
from districompile.runtime.static import StaticExecutor
from districompile.runtime.streams import Decision
from tests.small_models import captured, reference, relative_error

CPU = torch.device("cpu")


def inputs_of(plan: Plan, kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    call = InputChecker(plan, CPU)((), kwargs)
    return {i.value: call.tensors[i.path] for i in plan.inputs}


def taken(plan: Plan, steps: Any, rank: int, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    executor = Executor(plan, rank, {}, LockstepLinks, CPU)  # type: ignore[arg-type]
    found = dict(values)
    for step in steps:
        if isinstance(step, Take):
            found[step.value] = executor._take(step, found[step.source])
    return found


@pytest.mark.parametrize(
    "name, height, ranks, passes",
    [
        pytest.param("sd15", 24, 3, [], marks=pytest.mark.slow), ("sdxl", 20, 2, [LeaveRoom(math.inf, 1)]),
        pytest.param("unet2d", 20, 4, [], marks=pytest.mark.slow),
        ("vae_decoder", 7, 2, []),
    ],
)  # fmt: skip
def test_joined_phase_equals_the_original(name: str, height: int, ranks: int, passes: list[Any]) -> None:
    _, kwargs, want = reference(name, 1, height, 8)
    program = dc.convert(captured(name, 1, height, 8), ranks=ranks, passes=passes)
    left = delivered(program.plan.phases["steady"])
    plan = whole_plan(program._phases["warmup"], left, ranks)
    segments = [whole_segment(program._phases["warmup"], left, r) for r in range(ranks)]
    assert len(segments[0].gathers) == sum(bool(gathered(c)) for c in program._phases["warmup"].collectives.values())
    values = inputs_of(program.plan, kwargs)
    given = []
    for rank, segment in enumerate(segments):
        weights = {n: program._captured.weights[n][1]() for n, _ in segment.weights}
        given.append({**taken(program.plan, plan.steps, rank, values), **weights})
    with torch.no_grad():
        outputs = run_joined(segments, given)
    for found in outputs:
        assert relative_error(found[plan.outputs[0]], want) <= 1e-5
        assert set(found) == set(plan.segments[NAME].outputs)
    # What the steady phase reads first is what the exact phase cut at every collective leaves for it
    program.simulate(**kwargs)
    assert program._runner is not None
    (states,) = program._runner._states.values()
    for found, state in zip(outputs, states, strict=True):
        kept = {n: p.wait()[n] for n, p in state.pending.items()} | state.results
        assert left and set(left) <= set(kept)
        for collective in left:
            assert torch.equal(found[collective], kept[collective]), collective


class Joined(Engine):
    """Engines of all ranks whose collectives are inside, computed together as soon as one of them is run."""

    def __init__(self, group: list[Joined], segment: Any, weights: dict[str, torch.Tensor]) -> None:
        self.group, self.segment, self.values = group, segment, dict(weights)
        self.results: dict[str, torch.Tensor] = {}
        group.append(self)

    def bind(self, name: str, tensor: torch.Tensor) -> None:
        self.values[name] = tensor.clone()

    def enqueue(self) -> None:
        with torch.no_grad():
            found = run_joined([e.segment for e in self.group], [e.values for e in self.group])
        for engine, results in zip(self.group, found, strict=True):
            engine.results = results

    def output(self, name: str) -> torch.Tensor:
        return self.results[name]


@pytest.mark.parametrize("static", [False, True])
def test_steady_phase_goes_on_from_a_joined_exact_phase(static: bool) -> None:
    """The same calls as with collectives between engines."""
    import dataclasses

    _, kwargs, _ = reference("sdxl", 1, 20, 8)
    program = dc.convert(captured("sdxl", 1, 20, 8), ranks=2)
    plain = program._engines()
    left = delivered(program.plan.phases["steady"])
    whole = whole_plan(program._phases["warmup"], left, 2)
    assert isinstance(whole.steps[-len([s for s in whole.steps if type(s).__name__ == "Keep"]) - 1], Deliver)
    plan = dataclasses.replace(program.plan, phases={**program.plan.phases, "warmup": whole})
    assert Plan.from_json(plan.to_json()).phases == plan.phases
    values = inputs_of(plan, kwargs)
    group: list[Joined] = []
    engines = []
    for rank in range(2):
        segment = whole_segment(program._phases["warmup"], left, rank)
        weights = {n: program._captured.weights[n][1]() for n, _ in segment.weights}
        # All ranks compute together as soon as one is asked, so that every rank's inputs must be known before
        engine = Joined(group, segment, weights | taken(plan, whole.steps, rank, values))
        engines.append({"warmup": {NAME: engine}, "steady": plain[rank]["steady"]})
    wanted = LockstepRunner(program.plan, plain, CPU, static)
    joined = LockstepRunner(plan, engines, CPU, static)  # type: ignore[arg-type]
    calls = {i.path: values[i.value] for i in plan.inputs}
    moved = {**calls, "sample": calls["sample"] * 1.1}
    for phase, given in (("warmup", calls), ("steady", moved), ("steady", calls), ("warmup", calls), ("steady", moved)):
        proposal = Proposal(Decision(phase, 0, False), given)  # type: ignore[arg-type]
        (_, a), (_, b) = wanted.call(proposal), joined.call(proposal)
        assert relative_error(b[0], a[0]) <= 1e-5, phase
    assert StaticExecutor  # both executors are meant


def test_reductions_and_empty_exchanges_are_joined() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = x.softmax(2).sum((2, 3), keepdim=True) + x.amax((2, 3), keepdim=True)
            return x * total

    x = torch.randn(1, 4, 10, 4)
    program = dc.convert(Net(), args=(x,), ranks=3, rows={"x": 2})
    segments = [whole_segment(program._phases["warmup"], (), r) for r in range(3)]
    assert segments[0].gathers
    plan = whole_plan(program._phases["warmup"], (), 3)
    values = inputs_of(program.plan, {"x": x})
    outputs = run_joined(segments, [taken(program.plan, plan.steps, r, values) for r in range(3)])
    joined = [o[plan.outputs[0]] for o in outputs]
    assert relative_error(joined[0], Net()(x)) <= 1e-5
    assert all(torch.equal(j, joined[0]) for j in joined)


def test_only_some_backends_hold_collectives(tmp_path: Any) -> None:
    program = dc.convert(captured("sdxl", 1, 20, 8), ranks=2)
    with pytest.raises(BackendError, match="the eager backend cuts at every collective; use 'between'"):
        program.save(tmp_path / "b", backend="eager", collectives="inside")
    with pytest.raises(ConvertError, match="'between' engines or 'inside' of them"):
        program.save(tmp_path / "b", backend="eager", collectives="elsewhere")
    assert not (tmp_path / "b").exists()
    assert {type(s) for s in program.plan.phases["warmup"].steps} >= {Run}
    assert any(isinstance(c, Exchange) for c in program.plan.collectives.values())
