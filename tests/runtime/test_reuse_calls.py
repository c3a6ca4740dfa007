# SPDX-License-Identifier: Apache-2.0
"""Which calls of an image are reused: never one that is unclear, and all ranks alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_net import make_program

import districompile as dc
from districompile.runtime.calls.agreement import _Record
from districompile.runtime.calls.call_tracker import Decision
from districompile.runtime.calls.drift import DriftMonitor, Rate
from districompile.runtime.calls.reuse import ReuseCounter


def decided(counter: ReuseCounter, phases: str, stream: int = 0, full: str = "") -> str:
    """The phases of calls that would be exact (e) or displaced (d); ``full`` has an f for calls that must be full."""
    out = ""
    for number, letter in enumerate(phases):
        decision = Decision("exact" if letter == "e" else "displaced", stream, False)
        decision = counter.check(decision, lambda _, n=number: full[n : n + 1] == "f")  # type: ignore[misc]
        counter.count(decision)
        out += decision.phase[0]
    return out


@pytest.mark.parametrize(
    ("every", "want"), [(None, "eeddddddd"), (2, "eerdrdrdr"), (3, "eerrdrrdr"), (100, "eerrrrrrr")]
)
def test_one_of_n_calls_behind_the_exact_ones_is_full(every: int | None, want: str) -> None:
    assert decided(ReuseCounter(every), "eeddddddd") == want


def test_exact_and_demanded_calls_are_full() -> None:
    assert decided(ReuseCounter(3), "eedddedddd", full="   f") == "eerdrerrdr"


def test_streams_count_for_themselves_and_a_new_image_forgets() -> None:
    counter = ReuseCounter(2)
    assert decided(counter, "e", 0) + decided(counter, "e", 1) == "ee"
    assert decided(counter, "d", 0) + decided(counter, "d", 1) + decided(counter, "d", 0) == "rrd"
    counter.count(Decision("exact", 0, True))
    assert decided(counter, "d", 1) == "d"  # never reused before a full call of its own image
    assert decided(ReuseCounter(2), "ddd") == "drd"


def test_the_agreement_carries_all_phases() -> None:
    for phase in ("exact", "displaced", "reused"):
        record = _Record(False, Decision(phase, 3, True), True, 5, 1)  # type: ignore[arg-type]
        assert _Record.unpack(record.pack()) == record


def test_an_image_that_changes_faster_than_the_limit_asks_for_full_calls() -> None:
    monitor = DriftMonitor(1.0)
    for step in range(4):
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(step))
        monitor.observe(0, x, x)
    stream = monitor._streams[0]
    for rate, want in ((0.5, False), (1.5, True), (float("nan"), True)):
        stream.known, stream.used = [Rate(rate, rate)], 1
        assert monitor.must_be_full(0) is want
    assert not monitor.must_be_full(1) and not DriftMonitor(0.0).must_be_full(0)


def steps(unet: Any, count: int, seed: int = 0, twice: bool = False) -> list[torch.Tensor]:
    base, move = (torch.randn(2, 4, 40, 32, generator=torch.Generator().manual_seed(seed + i)) for i in (0, 1))
    outputs = []
    for i in range(count):
        for half in range(1 + twice):
            x = base + 0.1 * i * move + half
            outputs.append(unet(sample=x, timestep=torch.tensor(100.0 - i)).clone())
    return outputs


def simulated(program: Any, phases: list[str], more: float = 0.0) -> Any:
    """The calls of a program in the given phases, with ``more`` added to each sample."""
    left = iter(phases)

    def call(sample: torch.Tensor, timestep: torch.Tensor) -> Any:
        return program.simulate(phase=next(left), sample=sample + more, timestep=timestep)

    return call


@pytest.fixture(scope="module", params=[(1, "eager"), (2, "onnxruntime")], ids=str)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    ranks, backend = request.param
    program = make_program(ranks, reuse="deep=3")
    path = tmp_path_factory.mktemp("reuse") / "b"
    program.save(path, backend=backend)
    return program, path


def test_a_bundle_reuses_and_starts_each_image_exactly(saved: tuple[Any, Path]) -> None:
    program, path = saved
    unet = dc.load(path, lockstep=True)
    for image in range(2):
        with unet.image():
            got = steps(unet, 9, 10 * image)
            assert unet.image_calls == {"exact": 3, "displaced": 2, "reused": 4}
            assert unet._phases == [*["exact"] * 3, "reused", "reused", "displaced", "reused", "reused", "displaced"]
            phases = list(unet._phases)
        program.reset()
        want = steps(simulated(program, phases), 9, 10 * image)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with unet.image():  # two calls a step, as for guidance: each half has its own last full call
        alternating = steps(unet, 6, twice=True)
        assert unet.image_calls == {"exact": 6, "displaced": 2, "reused": 4}
    for half in (0, 1):
        program.reset()
        alone = steps(simulated(program, ["exact"] * 3 + ["reused"] * 2 + ["displaced"], half), 6)
        torch.testing.assert_close(torch.stack(alternating[half::2]), torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_a_chosen_phase_and_a_missing_one(saved: tuple[Any, Path], tmp_path: Path) -> None:
    program, path = saved
    unet = dc.load(path, lockstep=True)
    unet.phase = "displaced"
    with unet.exact():
        steps(unet, 1)
    with pytest.raises(dc.InputError, match="no phase 'full'"):
        unet.phase = "full"
    plain = make_program(1)
    assert "reused" not in plain.plan.phases
    with pytest.raises(dc.InputError, match="convert again with reuse="):
        plain.simulate(phase="reused", sample=torch.randn(2, 4, 40, 32), timestep=torch.tensor(1.0))
    program.reset()
    with pytest.raises(dc.InputError, match="Run the exact phase first"):
        program.simulate(phase="reused", sample=torch.randn(2, 4, 40, 32), timestep=torch.tensor(1.0))


def test_nothing_of_what_is_kept_is_exchanged(saved: tuple[Any, Path]) -> None:
    program, _ = saved
    report = program.report()
    assert len(program.plan.phases["reused"].segments) <= len(program.plan.phases["displaced"].segments)
    if program.plan.ranks > 1:
        purposes = {
            program.plan.collectives[n].purpose
            for s in program.plan.phases["reused"].steps if hasattr(s, "collectives") for n in s.collectives
        }  # fmt: skip
        assert "attention" not in purposes and max(report.sent("reused")) < max(report.sent("displaced"))
    assert "1 in 3 later steps is full" in str(report)
