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
from districompile.runtime.calls.call_tracker import Decision
from districompile.runtime.calls.drift import DriftMonitor, Rate, Settling, products, rate_of, vectors
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


def test_the_largest_rate_of_a_batch_counts() -> None:
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
def test_values_that_are_not_finite_never_settle(bad: float) -> None:
    monitor = DriftMonitor(1.0)
    for sample, output in calls():
        output[0, 0, 0, 0] = bad
        monitor.observe(0, sample, output)
    assert monitor.must_be_exact(0)


def settled(rates: Sequence[float], blocks: Sequence[float] | None = None, limit: float = 1.0) -> str:
    """After which of ``rates`` (of images, and of their blocks) the image has settled (s)."""
    settling, found = Settling(limit), ""
    for rate in map(Rate, rates, blocks or rates):
        settling.advance(rate)
        found += "s" if settling.settled else "-"
    return found


def test_two_rates_within_the_limit_settle_and_twice_the_limit_unsettles() -> None:
    assert settled([9, 5, 0.9, 0.8, 0.7, 0.6]) == "---sss"
    assert settled([9, 0.9, 5, 0.8, 0.7, 0.6]) == "----ss"
    assert settled([0.5, 0.5, 1.9, 1.9, 2.1, 0.5, 0.5, 0.5]) == "-sss--ss"
    assert settled([0.5, 0.5, 0.5], limit=0.4) == "---"
    assert settled([0.5, 0.5, math.nan, 0.5, 0.5, math.inf, 0.5]) == "-s--s--"


def test_a_block_that_changes_late_must_settle_too() -> None:
    """The rates of the picture that the rule is for: two hearts, 50 steps."""
    image = [1.42, 1.23, 1.09, 1.16, 0.96, 0.74, 0.55, 0.53, 0.48, 0.52, 0.60, 0.57, 0.42, 0.23, 0.20]
    block = [2.72, 2.50, 3.06, 3.34, 3.24, 2.30, 1.61, 1.41, 1.24, 1.22, 1.85, 1.81, 1.38, 0.75, 0.71]
    assert settled(image) == "-----" + 10 * "s"
    assert settled(image, block) == 14 * "-" + "s"
    falling = sorted(block, reverse=True)
    assert settled(image, falling) == settled(image)  # blocks above the limit are no reason by themselves
    noise = [2.72, 2.50, 2.60, 2.40, 2.50, 2.30, 1.61, 1.41, 1.24, 1.22, 1.85, 1.81, 1.38, 0.75, 0.71]
    assert settled(image, noise) == settled(image)
    assert settled([9.0, 8.0, 0.9, 0.8], [20.0, 30.0, 3.0, 2.0]) == "---s"  # a rise while the image moves is usual


def test_an_image_that_changes_again_begins_anew() -> None:
    image, block = [1.4, 1.2, 0.9, 0.8, 0.7, 2.5, 0.9, 0.8], [2.0, 3.0, 0.9, 0.8, 0.7, 9.0, 2.0, 1.9]
    assert settled(image, block) == "---ss--s"


def test_a_block_shows_a_change_that_the_image_hides() -> None:
    """One of 16 blocks turns: its turn is that of the image, times 4."""
    generator = torch.Generator().manual_seed(0)
    sample, output = (torch.randn(1, 4, 16, 16, generator=generator) for _ in range(2))
    moved = sample + 0.05 * torch.randn(1, 4, 16, 16, generator=generator)
    still, turned = output.clone(), output.clone()
    turned[:, :, 4:8, 8:12] += torch.randn(1, 4, 4, 4, generator=generator)
    even = output + 0.25 * torch.randn(1, 4, 16, 16, generator=generator)

    def rate(second: Tensor) -> Rate:
        one, two = vectors(sample, output), vectors(moved, second)
        return rate_of(products(two, one), products(one, one))

    assert rate(still).image < 0.6
    assert rate(turned).block == pytest.approx(4 * rate(turned).image, rel=0.1)
    assert rate(even).image == pytest.approx(rate(turned).image, rel=0.5)
    assert rate(even).block < 1.6 * rate(even).image


@pytest.mark.parametrize(
    ("size", "blocks"), [((12, 12), 16), ((10, 9), 6), ((7, 5), 1), ((12,), 1), ((4, 8, 8), 16), ((), 1)]
)
def test_blocks_hold_every_value_once(size: tuple[int, ...], blocks: int) -> None:
    shape = (2, 3, *size) if size else (2,)
    x = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    first, second = vectors(x, x)
    assert first.shape[:2] == (2, blocks) and first.equal(second)
    assert first.flatten(1).sort(dim=1).values.equal(x.reshape(2, -1))


def test_a_decision_knows_all_calls_but_the_last_one() -> None:
    """Also where a report has read the rates in between."""
    pairs = calls(9)
    needed = settled(rates(pairs)).index("s") + 2  # the first rate is that of the second call
    for reads in (False, True):
        monitor, phases = DriftMonitor(1.0), ""
        for sample, output in pairs:
            phases += "E" if monitor.must_be_exact(0) else "d"
            monitor.observe(0, sample, output)
            if reads:
                monitor.rates(0)
        assert phases == "E" * (needed + 1) + "d" * (8 - needed)


def test_no_limit_measures_nothing() -> None:
    monitor = DriftMonitor(0.0)
    for sample, output in calls():
        monitor.observe(0, sample, output)
    assert monitor.rates(0) == [] and not monitor.must_be_exact(0)
    assert monitor.check(Decision("displaced", 0, False)).phase == "displaced"


def test_a_new_image_forgets_all_rates() -> None:
    monitor = DriftMonitor(1.0)
    for sample, output in calls():
        monitor.observe(0, sample, output)
    assert monitor.check(Decision("displaced", 0, False)).phase == "displaced"
    assert monitor.check(Decision("displaced", 0, True)).phase == "exact"
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
