"""The exact phase as one graph with its collectives inside: computes what the phase cut at every collective does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import districompile as dc
from districompile.backends.base import Engine
from districompile.errors import BackendError, ConvertError
from districompile.passes.in_place_gather import InPlaceGather
from districompile.plan.experimental.joined import NAME, delivered, gathered, whole_plan, whole_segment
from districompile.plan.plan import Exchange, ExecutionPlan, Publish, Run, SliceInput
from districompile.runtime.calls.agreement import Proposal
from districompile.runtime.calls.call_tracker import Decision
from districompile.runtime.calls.inputs import InputChecker
from districompile.runtime.runner import SimulatedRunner
from tests.reference.executor import slice_rows
from tests.reference.joined import run_joined
from tests.reference.runner import ReferenceRunner
from tests.small_models import captured, reference, relative_error

CPU = torch.device("cpu")


def inputs_of(plan: ExecutionPlan, kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    call = InputChecker(plan, CPU)((), kwargs)
    return {i.value: call.tensors[i.path] for i in plan.inputs}


def taken(plan: ExecutionPlan, steps: Any, rank: int, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = dict(values)
    for step in steps:
        if isinstance(step, SliceInput):
            found[step.value] = slice_rows(step, found[step.source], rank)
    return found


@pytest.mark.parametrize(
    "name, height, ranks, passes, all_to_all",
    [
        pytest.param("sd15", 24, 3, [], False, marks=pytest.mark.slow),
        ("sdxl", 20, 2, [InPlaceGather(math.inf, 1)], False),
        pytest.param("unet2d", 20, 4, [], True, marks=pytest.mark.slow),
        ("vae_decoder", 7, 2, [], False), ("vae_decoder", 10, 3, [], True),
    ],
)  # fmt: skip
def test_joined_phase_equals_the_original(
    name: str, height: int, ranks: int, passes: list[Any], all_to_all: bool
) -> None:
    _, kwargs, want = reference(name, 1, height, 8)
    program = dc.convert(captured(name, 1, height, 8), ranks=ranks, passes=passes)
    left = delivered(program.plan.phases["displaced"])
    plan = whole_plan(program._phases["exact"], left, ranks)
    segments = [whole_segment(program._phases["exact"], left, r, all_to_all) for r in range(ranks)]
    inner = segments[0].collectives
    assert all(s.collectives == inner for s in segments) and {c.ranks for c in inner} == {ranks}
    assert len(inner) == sum(bool(gathered(c)) for c in program._phases["exact"].collectives.values())
    assert {c.op for c in inner} == ({"all_gather", "all_to_all"} if all_to_all else {"all_gather"})
    if all_to_all:  # a halo does not reach every rank, so that less is received
        specs = [dict(s.inputs) for s in (segments[0], whole_segment(program._phases["exact"], left, 0))]
        received = [sum(d[c.received].shape[0] for c in inner) for d in specs]
        assert received[0] < received[1]
    values = inputs_of(program.plan, kwargs)
    given = []
    for rank, segment in enumerate(segments):
        weights = {n: program.captured.weights[n][1]() for n, _ in segment.weights}
        given.append({**taken(program.plan, plan.steps, rank, values), **weights})
    with torch.no_grad():
        outputs = run_joined(segments, given)
    for found in outputs:
        assert relative_error(found[plan.outputs[0]], want) <= 1e-5
        assert set(found) == set(plan.segments[NAME].outputs)
    # What the displaced phase reads first is what the exact phase cut at every collective leaves for it
    runner = ReferenceRunner(program.plan, program._engines())
    with torch.no_grad():
        runner("exact", values)
    for found, state in zip(outputs, runner.states, strict=True):
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


def test_displaced_phase_goes_on_from_a_joined_exact_phase() -> None:
    """The same calls as with collectives between engines."""
    import dataclasses

    _, kwargs, _ = reference("sdxl", 1, 20, 8)
    program = dc.convert(captured("sdxl", 1, 20, 8), ranks=2)
    plain = program._engines()
    left = delivered(program.plan.phases["displaced"])
    whole = whole_plan(program._phases["exact"], left, 2)
    assert isinstance(whole.steps[-len([s for s in whole.steps if type(s).__name__ == "SaveState"]) - 1], Publish)
    plan = dataclasses.replace(program.plan, phases={**program.plan.phases, "exact": whole})
    assert ExecutionPlan.from_json(plan.to_json()).phases == plan.phases
    values = inputs_of(plan, kwargs)
    group: list[Joined] = []
    engines = []
    for rank in range(2):
        segment = whole_segment(program._phases["exact"], left, rank)
        weights = {n: program.captured.weights[n][1]() for n, _ in segment.weights}
        # All ranks compute together as soon as one is asked, so that every rank's inputs must be known before
        engine = Joined(group, segment, weights | taken(plan, whole.steps, rank, values))
        engines.append({"exact": {NAME: engine}, "displaced": plain[rank]["displaced"]})
    wanted = SimulatedRunner(program.plan, plain, CPU)
    joined = SimulatedRunner(plan, engines, CPU)  # type: ignore[arg-type]
    calls = {i.path: values[i.value] for i in plan.inputs}
    moved = {**calls, "sample": calls["sample"] * 1.1}
    for phase, given in (
        ("exact", calls),
        ("displaced", moved),
        ("displaced", calls),
        ("exact", calls),
        ("displaced", moved),
    ):
        proposal = Proposal(Decision(phase, 0, False), given)  # type: ignore[arg-type]
        (_, a), (_, b) = wanted.call(proposal), joined.call(proposal)
        assert relative_error(b[0], a[0]) <= 1e-5, phase


def test_every_rank_reads_what_it_receives() -> None:
    """Also where it needs no row of another: a compiler would leave out its part of the collective, and all hang."""
    convolution = torch.nn.Conv2d(2, 2, 3, stride=2, padding=1)  # a halo above alone, so that rank 0 needs nothing
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3, padding=1), convolution)
    x = torch.randn(1, 2, 12, 4)
    program = dc.convert(net, args=(x,), ranks=3, rows={"input": 2})
    plan = whole_plan(program._phases["exact"], (), 3)
    halos = [c for c in program._phases["exact"].collectives.values() if isinstance(c, Exchange)]
    assert any(not any(p.dst == 0 != p.src and p.rows for p in halo.pieces) for halo in halos)
    for all_to_all in (False, True):
        segments = [whole_segment(program._phases["exact"], (), r, all_to_all) for r in range(3)]
        for segment in segments:
            holders = [n for n in segment.graph.graph.nodes if n.op == "placeholder"]
            names = [n for n, _ in (*segment.inputs, *segment.weights)]
            read = {name for name, node in zip(names, holders, strict=True) if node.users}
            assert {c.received for c in segment.collectives} <= read
        weights = {n: program.captured.weights[n][1]() for n, _ in segments[0].weights}
        values = inputs_of(program.plan, {"input": x})
        given = [weights | taken(program.plan, plan.steps, r, values) for r in range(3)]
        with torch.no_grad():
            for found in run_joined(segments, given):
                assert relative_error(found[plan.outputs[0]], net(x)) <= 1e-6


def test_reductions_and_empty_exchanges_are_joined() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = x.softmax(2).sum((2, 3), keepdim=True) + x.amax((2, 3), keepdim=True)
            return x * total

    x = torch.randn(1, 4, 10, 4)
    program = dc.convert(Net(), args=(x,), ranks=3, rows={"x": 2})
    segments = [whole_segment(program._phases["exact"], (), r) for r in range(3)]
    assert segments[0].collectives
    plan = whole_plan(program._phases["exact"], (), 3)
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
    assert {type(s) for s in program.plan.phases["exact"].steps} >= {Run}
    assert any(isinstance(c, Exchange) for c in program.plan.collectives.values())
