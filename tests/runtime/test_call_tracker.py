"""Which stream and phase calls belong to, for the ways in which samplers call a denoiser."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from districompile.runtime.calls.call_tracker import CallTracker, Decision


def run(timesteps: Sequence[float | None], tracker: CallTracker | None = None, **options: int) -> list[Decision]:
    tracker = tracker or CallTracker(**options)
    return [tracker.next(t) for t in timesteps]


def streams(decisions: Sequence[Decision]) -> list[int]:
    return [d.stream for d in decisions]


def resets(decisions: Sequence[Decision]) -> list[int]:
    return [i for i, d in enumerate(decisions) if d.reset]


def phases(decisions: Sequence[Decision]) -> str:
    return "".join(d.phase[0] for d in decisions)


def test_one_call_a_step_and_the_next_image() -> None:
    image = [999, 800, 600, 400, 200, 1]
    got = run(image * 2)
    assert phases(got) == "eeeedd" * 2
    assert resets(got) == [0, 6] and set(streams(got)) == {0}


def test_two_calls_a_step() -> None:
    got = run([t for t in (9, 7, 5, 3) for _ in range(2)] * 2, warmup_steps=2)
    assert streams(got) == [0, 1] * 8
    assert phases(got) == "eeeedddd" * 2
    assert resets(got) == [0, 8]


def test_heun() -> None:
    got = run([9, 7, 7, 5, 5, 3, 3, 1], warmup_steps=2)
    assert streams(got) == [0, 0, 1, 0, 1, 0, 1, 0]
    assert phases(got) == "eeededdd"
    assert resets(got) == [0]


def test_ascending_inversion_is_one_image() -> None:
    got = run([1, 200, 400, 600, 800, 1, 200])
    assert resets(got) == [0, 5]
    assert phases(got) == "eeeedee"


def test_inversion_then_sampling() -> None:
    got = run([1, 200, 400, 600, 800, 800, 600, 400])
    # The second call at 800 may be the second of a pair: it is exact in its own stream. Going down is a new image.
    assert [(d.stream, d.phase) for d in got[5:7]] == [(1, "exact"), (0, "exact")]
    assert resets(got) == [0, 6]


def test_models_of_one_step_never_become_steady() -> None:
    got = run([999.0] * 50, warmup_steps=1)
    assert set(phases(got)) == {"e"}
    assert resets(got) == list(range(0, 50, 4))


def test_without_a_timestep_every_call_is_exact() -> None:
    got = run([None] * 8)
    assert set(phases(got)) == {"e"} and set(streams(got)) == {0}


def test_explicit_reset() -> None:
    tracker = CallTracker(warmup_steps=1)
    assert phases(run([9, 8, 7], tracker)) == "edd"
    tracker.reset()
    assert run([6], tracker) == [Decision("exact", 0, True)]
    assert run([5], tracker) == [Decision("displaced", 0, False)]


def test_step_back_within_an_image_is_exact() -> None:
    got = run([9, 8, 7, 8, 7, 6], warmup_steps=2)
    assert resets(got) == [0, 3] and phases(got) == "eedeed"


def test_not_a_number_is_exact() -> None:
    assert run([float("nan"), float("nan")]) == [Decision("exact", 0, True)] * 2


@pytest.mark.parametrize("options", [{"warmup_steps": 0}, {"max_streams": 0}])
def test_options_are_checked(options: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        CallTracker(**options)


@given(
    st.lists(st.integers(0, 999), min_size=2, max_size=12, unique=True),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 5),
    st.booleans(),
)
def test_regular_samplers(ts: list[int], per_step: int, images: int, warmup: int, ascending: bool) -> None:
    """Any number of calls a step, either direction, several images: a reset an image, streams by place in the step."""
    ts = sorted(ts, reverse=not ascending)
    got = run([t for t in ts for _ in range(per_step)] * images, warmup_steps=warmup)
    assert streams(got) == [k for _ in ts for k in range(per_step)] * images
    assert resets(got) == [i * len(ts) * per_step for i in range(images)]
    assert phases(got) == "".join("e" if i < warmup else "d" for i in range(len(ts)) for _ in range(per_step)) * images


@given(
    st.lists(st.one_of(st.none(), st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0])), max_size=60), st.integers(1, 4)
)
def test_steady_always_follows_enough_exact_calls(ts: list[float | None], warmup: int) -> None:
    exact: dict[int, int] = {}
    for d in run(ts, warmup_steps=warmup):
        if d.reset:
            exact.clear()
        assert 0 <= d.stream < 4
        if d.phase == "exact":
            exact[d.stream] = exact.get(d.stream, 0) + 1
        else:
            assert exact.get(d.stream, 0) >= warmup
