"""Optimisations of the graph change no result, in either phase."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import districompile as dc
from districompile.bundle.refit import refit
from districompile.ir.unit import EXACT_OPTIMISATIONS, OPTIMISATIONS, parse_optimise
from districompile.passes.in_place_gather import InPlaceGather
from tests.small_models import captured, first, reference, relative_error

# There is nothing to leave room for in small networks: see below
CASES = [*((name, 3) for name in EXACT_OPTIMISATIONS if name != "in-place-gather"), ("all", 2)]


@pytest.mark.parametrize("name", [pytest.param("sdxl", marks=pytest.mark.slow), "unet2d"])
def test_results_are_the_same(name: str) -> None:
    _, kwargs, want = reference(name, 1, 20, 8)
    moved = {**kwargs, "sample": kwargs["sample"] * 1.1}

    def converted(ranks: int, optimise: str = "") -> tuple[int, list[Tensor]]:
        """Number of collectives; one exact call and two displaced ones."""
        program = dc.convert(captured(name, 1, 20, 8), ranks=ranks, optimise=optimise)
        exact = first(program.simulate(**kwargs))
        return len(program.plan.collectives), [
            exact,
            *(first(program.simulate(phase="displaced", **moved)) for _ in "ab"),
        ]

    plain = {ranks: converted(ranks) for ranks in (2, 3)}
    for optimise, ranks in CASES:
        count, (exact, *displaced) = converted(ranks, optimise)
        assert relative_error(exact, want) <= 1e-5, optimise
        for got, expected in zip(displaced, plain[ranks][1][1:], strict=True):
            assert relative_error(got, expected) <= 1e-5, optimise
        assert count <= plain[ranks][0], optimise


@pytest.mark.parametrize("name, ranks", [pytest.param("sdxl", 2, marks=pytest.mark.slow), ("unet2d", 3), ("unet2d", 1)])
def test_room_for_own_rows(name: str, ranks: int) -> None:
    _, kwargs, want = reference(name, 2, 20, 8)
    graph = captured(name, 2, 20, 8)
    plain = dc.convert(graph, ranks=ranks, optimise="hoist-fetches")
    program = dc.convert(graph, ranks=ranks, optimise="hoist-fetches", passes=[InPlaceGather(1e9, 1)])
    assert ("assemble_in_place" in program.graph_text("displaced")) == (ranks > 1)
    assert relative_error(first(program.simulate(**kwargs)), want) <= 1e-5
    plain.simulate(**kwargs)
    moved = {**kwargs, "sample": kwargs["sample"] * 1.1}
    for _ in range(2):
        got, expected = (first(p.simulate(phase="displaced", **moved)) for p in (program, plain))
        assert torch.equal(got, expected)
    for a, b in zip(program.plan.collectives.values(), plain.plan.collectives.values(), strict=True):
        assert [a.sent_bytes(r) for r in range(ranks)] == [b.sent_bytes(r) for r in range(ranks)]


@pytest.mark.slow
def test_room_is_less_than_a_share_of_the_weights() -> None:
    graph = captured("sdxl", 1, 20, 8)

    def inserts(share: float) -> int:
        passes = [InPlaceGather(share, 1)]
        options = {"optimise": "fuse-parallel-linears,hoist-fetches", "passes": passes}
        return dc.convert(graph, ranks=2, **options).graph_text("displaced").count("dc.assemble_in_place")

    plan = dc.convert(graph, ranks=2, optimise="fuse-parallel-linears,hoist-fetches").plan
    weights = sum(spec.nbytes for spec in plan.weights.values())
    whole = [c for c in plan.collectives.values() if c.purpose == "attention"]
    room = sum(c.specs[0].nbytes for c in whole)  # both ranks have half of the rows
    assert inserts(room / weights * 1.01) == len(whole) > 0
    assert inserts(room / weights * 0.99) == 0


@pytest.mark.slow
def test_merged_weights_can_be_refitted(tmp_path: Path) -> None:
    module, kwargs, want = reference("sdxl", 1, 12, 8)
    program = dc.convert(module, kwargs=kwargs, ranks=2, optimise="fuse-parallel-linears")
    joined = program.plan.report.joined
    assert joined and set(joined) <= set(program.plan.weights)
    program.save(tmp_path / "b", backend="eager")
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.1)
        want = first(module(**kwargs))
    refit(tmp_path / "b", module=module)
    unet = dc.load(tmp_path / "b", lockstep=True)
    with unet.exact():
        assert relative_error(first(unet(**kwargs)), want) <= 1e-5
    reference.cache_clear()
    captured.cache_clear()


def test_all_may_stand_beside_others() -> None:
    assert parse_optimise("all") == parse_optimise(["all", "cse"]) == EXACT_OPTIMISATIONS
    assert parse_optimise("all,exchange-before-norm") == OPTIMISATIONS
    assert parse_optimise("exchange-before-norm,cse,cse") == ("exchange-before-norm", "cse")
    assert parse_optimise("") == parse_optimise(()) == ()


def test_unknown_optimisations_are_named() -> None:
    with pytest.raises(dc.ConvertError, match="no optimisation 'faster'; there are: cse"):
        dc.convert(torch.nn.Identity(), (torch.ones(1, 1, 4, 4),), ranks=2, optimise="faster")
