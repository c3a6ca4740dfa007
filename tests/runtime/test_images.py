"""State of one image is never used for another one, and a regular image is displaced all the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_images import (
    SHAPE,
    Image,
    Net,
    draw_all,
    errors,
    falling,
    heun,
    make,
    noise,
    sequences,
    text,
)
from torch import Tensor

import districompile as dc
from districompile.runtime.calls.evidence import Change, ConditioningHistory, TimestepSchedule, Trajectory
from districompile.runtime.calls.images import FAR, NEAR
from districompile.runtime.processes.launcher import launch

EXACT = 1e-5


@pytest.fixture(scope="module", params=[2, 3])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, Path]:
    return make(tmp_path_factory.mktemp("images") / "b", request.param)


def test_a_regular_image_is_displaced(made: tuple[Net, Path]) -> None:
    net, bundle = made
    unet = dc.load(bundle, lockstep=True)
    for timesteps in (falling(8), [torch.tensor(t) for t in falling(8)], list(torch.tensor(falling(8)))):
        found = errors(unet, net, Image(noise(1), text(1), timesteps))
        assert max(found[:3]) <= EXACT and min(found[3:]) > EXACT


def test_two_calls_a_step_are_displaced(made: tuple[Net, Path]) -> None:
    net, bundle = made
    unet = dc.load(bundle, lockstep=True)
    errors(unet, net, Image(noise(1), text(1), heun(falling(8))))
    assert unet.image_calls == {"exact": 6, "displaced": 9}


@pytest.mark.parametrize("name", sequences())
@pytest.mark.parametrize("given", ["numbers", "one tensor"])
@pytest.mark.parametrize("same_text", [True, False])
def test_first_calls_are_exact(made: tuple[Net, Path], name: str, given: str, same_text: bool) -> None:
    net, bundle = made
    for images in sequences()[name]:
        unet = dc.load(bundle, lockstep=True)
        every = torch.tensor([t for image in images for t in image])
        elements = list(every)
        prompt = text(0)
        for i, timesteps in enumerate(images):
            mine: list[Any] = list(timesteps)
            if given == "one tensor":
                mine, elements = elements[: len(timesteps)], elements[len(timesteps) :]
            found = errors(unet, net, Image(noise(10 + i), prompt if same_text else text(i), mine))
            assert max(found[:3]) <= EXACT, (name, i, found)


def test_the_user_says_where_an_image_begins(made: tuple[Net, Path]) -> None:
    net, bundle = made
    unet = dc.load(bundle, lockstep=True)
    elements, prompt = list(torch.tensor(falling(18))), text(0)
    for i, part in enumerate((elements[:10], elements[10:])):
        with dc.image(unet):
            found = errors(unet, net, Image(noise(i), prompt, part))
        assert max(found[:3]) <= EXACT and min(found[3:]) > EXACT
    with dc.image(net):  # the same script on the original
        pass


def test_a_text_written_over_is_another_one(made: tuple[Net, Path]) -> None:
    net, bundle = made
    unet = dc.load(bundle, lockstep=True)
    prompt = text(0)
    calls = iter(Image(noise(1), prompt, falling(10)).draw(unet))
    for _ in range(6):
        next(calls)
    prompt.copy_(text(1))
    call, out = next(calls)
    assert (out - net(**call)).norm() / out.norm() <= EXACT


def test_a_stochastic_sampler(made: tuple[Net, Path]) -> None:
    """Elements of one tensor vouch for it; numbers do not, and it says what to do."""
    net, bundle = made
    unet = dc.load(bundle, lockstep=True)
    found = errors(unet, net, Image(noise(1), text(1), list(torch.tensor(falling(10))), 0.4))
    assert min(found[3:]) > EXACT
    with pytest.warns(UserWarning, match=r"dc\.image"):
        found = errors(unet, net, Image(noise(1), text(1), falling(12), 0.4))
    assert max(found) <= EXACT
    with unet.image():
        found = errors(unet, net, Image(noise(1), text(1), falling(10), 0.4))
    assert min(found[3:]) > EXACT


def test_two_models_and_repeats(made: tuple[Net, Path], tmp_path: Path) -> None:
    """Calls of two models in turn do not disturb each other, and the same calls give the same bits."""
    net, bundle = made
    other, second = make(tmp_path / "b", 2, seed=5)
    results = []
    for _ in range(2):
        a, b = dc.load(bundle, lockstep=True), dc.load(second, lockstep=True)
        both = zip(
            Image(noise(1), text(1), falling(9)).draw(a), Image(noise(2), text(2), falling(9)).draw(b), strict=True
        )
        results.append([out for pair in both for _, out in pair])
        assert a.image_calls == b.image_calls == {"exact": 3, "displaced": 6}
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert other is not net


def samplers() -> list[Any]:
    from diffusers import (
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        PNDMScheduler,
        UniPCMultistepScheduler,
    )

    return [
        DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler,
        UniPCMultistepScheduler,
    ]  # fmt: skip


@pytest.mark.parametrize("sampler", samplers(), ids=lambda s: s.__name__)
@pytest.mark.parametrize("guided", [False, True])
def test_what_samplers_make_is_near(sampler: Any, guided: bool) -> None:
    clips = {"clip_sample": False} if "clip_sample" in sampler().config else {}  # no linear combination then
    scheduler, batch = sampler(**clips), 2 if guided else 1
    scheduler.set_timesteps(20)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(batch, 4, 4, generator=generator) / 2
    x = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
    trajectory, far, departures = Trajectory(), [], []
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(torch.cat([x] * batch), t)
        departures.append(trajectory.departure(given))
        far.append(trajectory.departure(torch.randn(given.shape, generator=generator)))
        out = torch.einsum("bchw,bcd->bdhw", torch.tanh(given), weight)
        trajectory.add(given, out)
        whole = out[:1] + 7.5 * (out[1:] - out[:1]) if guided else out
        x = scheduler.step(whole, t, x).prev_sample
    assert max(departures[1:]) <= NEAR, departures
    assert min(far[1:]) > FAR


def test_departure_of_what_says_nothing() -> None:
    trajectory, x = Trajectory(), torch.randn(SHAPE)
    assert trajectory.departure(x) == math.inf
    trajectory.add(x, torch.randn(1, 3, 5, 5))
    assert trajectory.departure(x[..., :4]) == math.inf  # another size
    assert trajectory.departure(torch.full(SHAPE, math.nan)) == math.inf
    assert trajectory.departure(torch.zeros(SHAPE)) == math.inf
    assert trajectory.departure(2 * x + 1) < 1e-6
    trajectory.add(torch.full(SHAPE, math.nan), x)
    assert trajectory.departure(x) == math.inf


def test_a_mask_beside_the_image_is_left_out() -> None:
    trajectory, x, out = Trajectory(), torch.randn(1, 9, 8, 8), torch.randn(1, 4, 8, 8)
    trajectory.add(x, out)
    moved = torch.cat([0.9 * x[:, :4] - 0.1 * out, torch.randn(1, 5, 8, 8)], 1)
    assert trajectory.departure(moved) < 1e-6


def test_conditioning_is_compared_by_value_where_its_memory_changed() -> None:
    seen, a = ConditioningHistory(["text"]), text(1)
    assert seen.compare(0, {"text": a}) is Change.FIRST
    assert seen.compare(0, {"text": a.detach()}) is Change.NONE
    assert seen.compare(0, {"text": a.clone()}) is Change.NONE
    assert seen.compare(1, {"text": text(2)}) is Change.FIRST
    assert seen.compare(0, {"text": text(2)}) is Change.OTHER
    with torch.inference_mode():
        b = text(3)
        assert seen.compare(0, {"text": b}) is Change.OTHER
        b.zero_()  # inference tensors do not count what is written to them
        assert seen.compare(0, {"text": b}) is Change.OTHER


def regular(values: list[Tensor]) -> list[bool]:
    schedule = TimestepSchedule()
    return [schedule.continues(v) for v in values]


def test_a_regular_schedule() -> None:
    t = torch.tensor(falling(6))
    assert regular(list(t)) == [False, True, True, True, True, True]
    assert regular([t[0], t[1], t[1], t[2], t[2]]) == [False, True, True, True, True]
    assert regular([t[0], t[1], t[3]]) == [False, True, False]  # skips one
    assert regular([t[0], torch.tensor(961.0), t[2]]) == [False, False, False]
    assert regular([t[0], t.clone()[1]]) == [False, False]
    assert regular([t[0].expand(2), t[1].expand(2)]) == [False, True]
    schedule = TimestepSchedule()
    assert not schedule.continues(t[0]) and schedule.continues(t[1])
    t += 1  # another schedule in the same memory
    assert not schedule.continues(t[2])


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_on_processes(tmp_path: Path, ranks: int) -> None:
    """All sequences one after another in one process a rank, twice: exact first calls, and the same bits."""
    make(tmp_path / "b", ranks)
    found = launch(draw_all, (str(tmp_path / "b"),), ranks)
    firsts, digests = found[0]
    assert len(firsts) >= 200 and max(firsts) <= EXACT
    assert digests[0] == digests[1]
    assert all(other[1] == digests for other in found.values())
