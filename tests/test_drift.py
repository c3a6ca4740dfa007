"""The measure that says when an image has settled, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import districompile as dc
from districompile.runtime.drift import DriftMonitor
from districompile.runtime.streams import Decision
from tests.helpers_net import make_program


def calls(count: int = 7, batch: int = 2, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Samples that move evenly, and outputs that change less and less."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(batch, 4, 12, 12, generator=generator)

    found = [(noise(), noise())]
    for i in range(1, count):
        sample, output = found[-1]
        found.append((sample + 0.05 * noise(), output + 0.6 / i**2 * noise()))
    return found


def rates(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    monitor = DriftMonitor(1.0)
    for sample, output in pairs:
        monitor.observe(0, sample, output)
    return monitor.rates(0)


def plain(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """The same by the definition, in float64."""

    def directions(sample: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        x, y = sample.double().flatten(1), output.double().flatten(1)
        x = x / x.norm(dim=1, keepdim=True)
        y = y - (y * x).sum(1, keepdim=True) * x
        return x, y / y.norm(dim=1, keepdim=True)

    found, last = [], directions(*pairs[0])
    for pair in pairs[1:]:
        now = directions(*pair)
        moved, turned = ((a - b).norm(dim=1) for a, b in zip(now, last, strict=True))
        found.append(float(((turned**2 - moved**2).clamp(min=0).sqrt() / moved).amax()))
        last = now
    return found


def test_rates_are_those_of_the_definition() -> None:
    pairs = calls()
    assert rates(pairs) == pytest.approx(plain(pairs), rel=1e-2, abs=1e-2)
    assert rates(pairs)[0] > 3 and rates(pairs)[-1] < 1


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.1, 10), st.floats(-5, 5), st.floats(0.1, 10)), min_size=7, max_size=7),
    st.integers(0, 100),
)
def test_what_the_model_predicts_does_not_matter(ways: list[tuple[float, float, float]], seed: int) -> None:
    """Noise, velocity and the clean image are sums of multiples of each other and the sample, whatever the scale."""
    pairs = calls(seed=seed)
    other = [(scale * x, a * y + b * x) for (x, y), (a, b, scale) in zip(pairs, ways, strict=True)]
    assert rates(other) == pytest.approx(rates(pairs), rel=0.05, abs=0.1)


def test_the_most_restless_of_a_batch_counts() -> None:
    a, b = calls(batch=1, seed=1), calls(batch=1, seed=2)
    both = [(torch.cat([x, u]), torch.cat([y, v])) for (x, y), (u, v) in zip(a, b, strict=True)]
    assert rates(both) == pytest.approx([max(p) for p in zip(rates(a), rates(b), strict=True)], rel=1e-3, abs=1e-3)


def test_channels_of_one_side_are_left_out() -> None:
    pairs = calls()
    masked = [(torch.cat([x, torch.rand(2, 5, 12, 12)], 1), y) for x, y in pairs]
    learned = [(x, torch.cat([y, torch.rand(2, 4, 12, 12)], 1)) for x, y in pairs]
    assert rates(masked) == rates(learned) == rates(pairs)


def test_outputs_of_another_size_are_taken_as_they_are() -> None:
    pairs = [(x, torch.nn.functional.interpolate(y, scale_factor=2.0)) for x, y in calls()]
    found = rates(pairs)
    assert len(found) == 6 and all(map(math.isfinite, found)) and found[0] > found[-1]


def test_outputs_of_another_batch_are_one_vector() -> None:
    pairs = [(x, y.sum()) for x, y in calls()]
    assert all(r >= 0 for r in rates(pairs))
    assert len(rates([(x, torch.cat([y, y, y])) for x, y in calls()])) == 6


def test_a_sample_that_stays_is_no_step_of_a_sampler() -> None:
    pairs = calls()
    assert rates([(pairs[0][0], y) for _, y in pairs]) == [math.inf] * 6
    assert rates([pairs[0]] * 3) == [0.0, 0.0]


def test_a_sample_that_jumps_may_be_another_image() -> None:
    assert rates([calls(1, seed=i)[0] for i in range(4)]) == [math.inf] * 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_never_calm(bad: float) -> None:
    monitor = DriftMonitor(1.0)
    for sample, output in calls():
        output[0, 0, 0, 0] = bad
        monitor.observe(0, sample, output)
    assert monitor.must_be_exact(0)


class Told(DriftMonitor):
    """A monitor of a stream whose rates are known."""

    def __init__(self, found: Sequence[float], limit: float) -> None:
        super().__init__(limit)
        self._found, self._call = found, 0
        sample, output = calls(1)[0]
        self.observe(0, sample, output)

    def rates(self, stream: int, lag: int = 1) -> list[float]:
        self._call += 1
        return list(self._found[: max(0, self._call - 1 - lag)])


def decide(found: Sequence[float], limit: float = 1.0) -> str:
    """Which calls are exact (E) where those from the second one on have the rates ``found``."""
    monitor = Told(found, limit)
    return "".join("E" if monitor.must_be_exact(0) else "d" for _ in range(len(found) + 1))


def test_two_calm_calls_settle_and_twice_the_limit_unsettles() -> None:
    assert decide([9, 5, 0.9, 0.8, 0.7, 0.6, 0.5]) == "EEEEEEdd"
    assert decide([9, 0.9, 5, 0.8, 0.7, 0.6, 0.5]) == "EEEEEEEd"
    assert decide([0.5, 0.5, 1.9, 1.9, 2.1, 0.5, 0.5, 0.5]) == "EEEEdddEE"
    assert decide([0.5] * 6, limit=0.0) == "ddddddd"


def test_no_limit_measures_nothing() -> None:
    monitor = DriftMonitor(0.0)
    for sample, output in calls():
        monitor.observe(0, sample, output)
    assert monitor.rates(0) == [] and not monitor.must_be_exact(0)
    assert monitor.check(Decision("steady", 0, False)).phase == "steady"


def test_a_new_image_forgets() -> None:
    monitor = DriftMonitor(1.0)
    for sample, output in calls():
        monitor.observe(0, sample, output)
    assert monitor.check(Decision("steady", 0, False)).phase == "steady"
    assert monitor.check(Decision("steady", 0, True)).phase == "warmup"
    assert monitor.rates(0) == []


@pytest.mark.parametrize("limit", [-1.0, math.nan, math.inf])
def test_limits_that_are_none_are_refused(limit: float) -> None:
    with pytest.raises(dc.Error, match="drift_limit must be 0"):
        make_program(2, drift_limit=limit)


def test_an_image_that_keeps_changing_is_exact(tmp_path: Any) -> None:
    """A sampler's steps that lead somewhere else each time: every call is that of one device."""
    program = make_program(2, drift_limit=1.0)
    program.save(tmp_path / "bundle", backend="eager")
    make_program(2, drift_limit=0.0).save(tmp_path / "without", backend="eager")
    unet, other = (dc.load(tmp_path / name, lockstep=True) for name in ("bundle", "without"))
    with unet.image(), other.image():
        for i in range(8):
            x = torch.randn(2, 4, 40, 32, generator=torch.Generator().manual_seed(i))
            want = program.simulate(sample=x, timestep=torch.tensor(9.0 - i))
            torch.testing.assert_close(unet(sample=x, timestep=torch.tensor(9.0 - i)), want, rtol=1e-5, atol=1e-6)
            other(sample=x, timestep=torch.tensor(9.0 - i))
        assert unet.image_calls == {"exact": 8, "displaced": 0}
        assert other.image_calls == {"exact": 3, "displaced": 5}


def test_an_image_that_settles_is_displaced_then(tmp_path: Any) -> None:
    """Samples that move evenly and little: later calls are displaced, and say how fast they changed it."""
    make_program(2, drift_limit=30.0).save(tmp_path / "bundle", backend="eager")
    unet = dc.load(tmp_path / "bundle", lockstep=True)
    x, step = torch.randn(2, 4, 40, 32), 0.02 * torch.randn(2, 4, 40, 32)
    for i in range(9):
        unet(sample=x + i * step, timestep=torch.tensor(9.0 - i))
    calls = unet.image_calls
    assert calls["exact"] >= 4 and calls["displaced"] >= 3
    assert unet.image_drift == max(unet.drift_rates[calls["exact"] - 1 : -2])
    unet.reset()
    with unet.exact():  # an image whose phase is forced is a new one too
        unet(sample=x, timestep=torch.tensor(9.0))
    assert unet.drift_rates == []
    assert unet.image_calls == {"exact": 1, "displaced": 0} and unet.image_drift is None
