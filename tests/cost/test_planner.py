# SPDX-License-Identifier: Apache-2.0
"""Test what is predicted for ways to divide an image, and the choice among them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

import districompile as dc
from districompile.cost.gpus import Network, find_gpu
from districompile.cost.measure import measure_rank
from districompile.cost.planner import Division, best, divided, on_one_gpu
from districompile.cost.predict import StepEstimate
from districompile.frontend.capture import capture
from districompile.ir.spec import Phase
from districompile.plan.plan import Start
from districompile.plan.report import Report

H100 = find_gpu("h100")


def network() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 3, padding=1)), torch.randn(
        1, 4, 13, 8
    )


def division(gpus: int, seconds: float, fits: bool = True) -> Division:
    step = StepEstimate(seconds)
    return Division(gpus, "none", (8, 8), step, step, 1.0, fits, 1.0, seconds, seconds)


def test_a_program_is_described() -> None:
    module, x = network()
    program = dc.convert(module, (x,), ranks=3, warmup_steps=4)
    found = divided(program, 3, "none", 10, H100)
    assert found.rows == (4, 5) and found.gpus == 3 and found.fits
    assert found.exact.exposed_ms > 0 and found.sent_mb > 0
    expected = (4 * found.exact.ms + 6 * found.displaced.ms) / 1e3
    assert found.seconds == pytest.approx(expected) and found.exact_seconds == pytest.approx(found.exact.ms / 100)
    assert json.loads(json.dumps(found.to_dict()))["exact"]["ms"] == pytest.approx(found.exact.ms, abs=1e-3)

    given = divided(program, 3, "none", 10, H100, measured={"exact": 7.0, "displaced": 5.0})
    assert (given.exact.compute_ms, given.displaced.compute_ms) == (7.0, 5.0)
    tiny = dataclasses.replace(H100, memory_gib=0.1)
    assert not divided(program, 3, "none", 10, tiny).fits


def test_machines_send_what_crosses_between_them() -> None:
    module, x = network()
    program = dc.convert(module, (x,), ranks=4)
    report = Report(program.plan)
    for phase in program.phases:
        sent = report.sent(phase)
        every = report.crossing(phase, [0, 1, 2, 3])  # a machine a rank: everything crosses
        assert [every[r] for r in range(4)] == sent and sum(sent)
        two = report.crossing(phase, [0, 0, 1, 1])
        assert 0 < sum(two.values()) < sum(sent) and report.crossing(phase, [0, 0, 0, 0]) == {0: 0}
        # Neighbours alone exchange rows of a convolution: ranks 1 and 2 across, and the output on all.
        pairs = [(a, b) for a in range(4) for b in range(4) if a // 2 != b // 2]
        names = [n for s in program.plan.phases[phase].steps if isinstance(s, Start) for n in s.collectives]
        by_pair = sum(program.plan.collectives[n].bytes_between(a, b) for n in names for a, b in pairs)
        assert sum(two.values()) == by_pair
    slow = Network(gpus=2, rate=1e-3)
    alone, apart = divided(program, 4, "none", 10, H100), divided(program, 4, "none", 10, H100, network=slow)
    assert alone.crossing_mb == 0 < apart.crossing_mb and apart.seconds > alone.seconds
    assert apart.displaced.transfer_ms == pytest.approx(apart.crossing_mb / 1e3 / (1e-3 * 0.85) * 1e3)
    assert divided(program, 4, "none", 10, H100, network=Network(gpus=4, rate=1e-3)).seconds == alone.seconds
    # Each guidance half on a machine of its own: nothing of a step's rows crosses
    assert divided(program, 8, "split", 10, H100, network=Network(gpus=4, rate=1e-3)).crossing_mb == 0
    both = divided(program, 8, "split", 10, H100, network=Network(gpus=2, rate=1e-3))
    assert both.crossing_mb == pytest.approx(apart.crossing_mb)


def test_one_gpu_has_no_transfers() -> None:
    module, x = network()
    captured = capture(module, (x,))
    found = on_one_gpu(captured.graph, 10**9, "none", 13, 10, H100)
    assert found.exact == found.displaced and found.exact.exposed_ms == 0 and found.sent_mb == 0
    assert found.memory_gib > 10**9 / 2**30


def test_more_gpus_are_chosen_only_where_they_pay() -> None:
    two, four = division(2, 0.6), division(4, 0.58)
    assert best([division(1, 1.0), two, four]) is two  # four are 3 % faster
    assert best([division(1, 1.0, fits=False), division(2, 0.9), four]) is four
    assert best([division(1, 1.0), division(2, 0.95)]) == division(1, 1.0)
    assert best([division(1, 1.0, fits=False)]) is None


@pytest.mark.parametrize("phase", ["exact", "displaced"])
def test_a_rank_is_measured(phase: Phase) -> None:
    module, x = network()
    program = dc.convert(module, (x,), ranks=2)
    assert measure_rank(program, phase, 1, "eager", count=2) > 0
