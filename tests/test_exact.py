"""The exact phase: N ranks compute what one device computes, whole models, all ranks in this process."""

from __future__ import annotations

import pytest
import torch

import districompile as dc
from tests.small_models import MODELS, captured, first, reference, relative_error

# (batch, rows, columns): not square; 28 rows are uneven for all but 1, 2, 4 and 7 ranks, 20 become 10, 5 and 3 on the
# way down
SIZES = {(2, 28, 16): (1, 2, 3, 4), (1, 20, 24): (3, 5, 8)}
MORE_CHANNELS = ("inpainting", "instruct_pix2pix")  # sd15, but for the channels of its input
ALWAYS = {("sd15", (1, 20, 24)), ("unet2d", (1, 20, 24)), ("vae_decoder", (2, 28, 16))}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(
            name, size, marks=pytest.mark.always if (name, size) in ALWAYS else pytest.mark.slow, id=f"{name}-{size}"
        )
        for name in MODELS
        if name not in MORE_CHANNELS
        for size in SIZES
    ],
)
def test_ranks_equal_one_device(name: str, size: tuple[int, int, int]) -> None:
    _, kwargs, want = reference(name, *size)
    for ranks in SIZES[size]:
        program = dc.convert(captured(name, *size), ranks=ranks)
        assert relative_error(first(program.simulate(**kwargs)), want) <= 1e-5, f"{ranks} ranks"
        report = program.report()
        assert not report.fallbacks()
        # All is cut, but for maps with fewer rows than ranks, which are named
        assert ranks == 1 or program.plan.report.replicated or (report.cut_share() or 0) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_CHANNELS)
def test_more_input_channels(name: str) -> None:
    size = 1, 20, 24
    _, kwargs, want = reference(name, *size)
    program = dc.convert(captured(name, *size), ranks=3)
    assert relative_error(first(program.simulate(**kwargs)), want) <= 1e-5
    assert not program.report().fallbacks()


@pytest.mark.slow
def test_more_rank_counts() -> None:
    size = 1, 28, 16
    _, kwargs, want = reference("sd15", *size)
    for ranks in (6, 7):
        program = dc.convert(captured("sd15", *size), ranks=ranks)
        assert relative_error(first(program.simulate(**kwargs)), want) <= 1e-5, f"{ranks} ranks"


def test_undisplaced_steady_phase_is_exact() -> None:
    module, kwargs, _want = reference("sdxl", 2, 28, 16)
    program = dc.convert(captured("sdxl", 2, 28, 16), ranks=3, displace="none")
    first(program.simulate(**kwargs))
    moved = {**kwargs, "sample": kwargs["sample"] + 0.5}
    with torch.no_grad():
        expected = first(module(**moved))
    assert relative_error(first(program.simulate(phase="displaced", **moved)), expected) <= 1e-5


@pytest.mark.parametrize("mode", ["corrected_async", "stale", "sync"])
def test_displaced_phase_converges_on_unchanging_inputs(mode: str) -> None:
    _, kwargs, want = reference("sd15", 1, 24, 16)
    program = dc.convert(captured("sd15", 1, 24, 16), ranks=3, groupnorm=mode)
    other = {**kwargs, "sample": kwargs["sample"].flip(0, 1) * 1.2}
    program.simulate(**other)
    errors = [relative_error(first(program.simulate(phase="displaced", **kwargs)), want) for _ in range(40)]
    assert errors[0] > 1e-3  # it does use what the call before left
    assert errors[-1] <= 2e-5


def test_two_runs_are_bit_identical() -> None:
    _, kwargs, _ = reference("sd15", 1, 24, 16)
    program = dc.convert(captured("sd15", 1, 24, 16), ranks=2)
    runs = []
    for _ in range(2):
        program.reset()
        program.simulate(**kwargs)
        runs.append(first(program.simulate(phase="displaced", **{**kwargs, "sample": kwargs["sample"] * 1.1})))
    assert torch.equal(*runs)


def test_steady_phase_needs_a_warm_up() -> None:
    _, kwargs, _ = reference("sd15", 1, 24, 16)
    program = dc.convert(captured("sd15", 1, 24, 16), ranks=2)
    with pytest.raises(dc.InputError, match="exact phase first"):
        program.simulate(phase="displaced", **kwargs)


def test_even_ranks_share_their_engines() -> None:
    """With even rows and zero padding all ranks have the same graph."""
    module, kwargs, _ = reference("sdxl", 1, 32, 16)
    program = dc.convert(module, kwargs=kwargs, ranks=4)
    for phase in program.plan.phases.values():
        assert all(len(set(s.engines)) == 1 for s in phase.segments.values())


def test_guidance_halves_on_ranks_of_their_own() -> None:
    module, kwargs, want = reference("sd15", 2, 24, 16)
    program = dc.convert(module, kwargs=kwargs, ranks=4, cfg="split")
    assert program.plan.ranks == 2
    assert program.plan.inputs[0].spec.shape[0] == 1
    assert relative_error(first(program.simulate(**kwargs)), want) <= 1e-5


def test_half_precision() -> None:
    module, kwargs, want = reference("sdxl", 1, 24, 16)
    half = {k: v.to(torch.bfloat16) if k not in ("timestep", "added_cond_kwargs") else v for k, v in kwargs.items()}
    half["added_cond_kwargs"] = {k: v.to(torch.bfloat16) for k, v in kwargs["added_cond_kwargs"].items()}
    module = module.to(torch.bfloat16)
    try:
        got = first(dc.convert(module, kwargs=half, ranks=3).simulate(**half))
    finally:
        module.float()
        reference.cache_clear()
        captured.cache_clear()
    assert got.dtype == torch.bfloat16
    assert relative_error(got, want) <= 5e-2
