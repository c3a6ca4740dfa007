# SPDX-License-Identifier: Apache-2.0
"""Halos that travel with the statistics of a norm: the exact phase is the same, with fewer waits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import districompile as dc
from districompile.plan.plan import Exchange, Wait
from tests.small_models import captured, first, reference, relative_error

NAME = "exchange-before-norm"


class Block(nn.Module):
    """A norm, an activation and a convolution, twice; ``scaled`` adds a modulation."""

    def __init__(self, activation: str = "silu", mode: str = "zeros", scaled: bool = False) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(2, 8) for _ in "ab")
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode) for _ in "ab")
        self.activation, self.scaled = activation, scaled
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, sample: Tensor, scale: Tensor) -> Tensor:
        x = sample
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = norm(x)
            if self.scaled:
                y = y * (1 + scale[:, None, None, None]) + scale.sin()[:, None, None, None]
            if self.activation == "swish":  # as some networks spell it: two operators read the norm
                y = y * torch.sigmoid(y)
            elif self.activation == "silu":
                y = F.silu(y)
            x = x + conv(y)
        return x


def waits(program: dc.Program, phase: str = "exact") -> int:
    return sum(isinstance(step, Wait) for step in program.plan.phases[phase].steps)


BLOCKS = {
    "silu": Block(),
    "none": Block("none"),
    "swish": Block("swish"),
    "scaled": Block(scaled=True),
    "circular": Block(mode="circular"),
    "reflect": Block(mode="reflect"),
}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_waits_once_for_both(name: str, ranks: int) -> None:
    torch.manual_seed(0)
    inputs = {"sample": torch.randn(2, 8, 14, 6) * 3 + 5, "scale": torch.tensor([0.3, 0.7])}
    plain, moved = (dc.convert(BLOCKS[name], kwargs=inputs, ranks=ranks, optimise=o) for o in ("", NAME))
    want = BLOCKS[name](**inputs)
    assert relative_error(moved.simulate(**inputs), want) <= 1e-6
    # One for each norm; a padding that reads rows is an operator between norm and convolution, and stays
    assert waits(moved) == waits(plain) - (0 if name in ("circular", "reflect") else 2)
    assert [c.sent_bytes(0) for c in moved.plan.collectives.values()] == [
        c.sent_bytes(0) for c in plain.plan.collectives.values()
    ]
    for _ in range(8):  # with constant inputs, displaced steps end where the exact one is
        got = moved.simulate(phase="displaced", **inputs)
    assert relative_error(got, want) <= 1e-5


def test_the_border_of_the_image_is_still_the_fill_value() -> None:
    """Rows beyond the border arrive as -inf. They are filled after the activation, as nothing is normalised there."""
    inputs = {"sample": torch.randn(1, 8, 8, 4) + 30, "scale": torch.ones(1)}
    program = dc.convert(BLOCKS["silu"], kwargs=inputs, ranks=2, optimise=NAME)
    fills = [c.fill for c in program.plan.collectives.values() if isinstance(c, Exchange) and c.purpose == "conv"]
    assert fills == [-math.inf] * 2
    assert relative_error(program.simulate(**inputs), BLOCKS["silu"](**inputs)) <= 1e-6


def test_a_value_that_is_not_finite_is_seen_on_every_rank() -> None:
    inputs = {"sample": torch.randn(1, 8, 8, 4), "scale": torch.ones(1)}
    program = dc.convert(BLOCKS["silu"], kwargs=inputs, ranks=2, optimise=NAME)
    inputs["sample"][0, 0, 4, 0] = -math.inf  # a row that the other rank receives
    got, want = program.simulate(**inputs), BLOCKS["silu"](**inputs)
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().any(1).all()


class Elsewhere(nn.Module):
    """Rows that are needed after a norm of another value, after a position, and before a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.position = nn.Parameter(torch.randn(1, 8, 14, 1))

    def forward(self, sample: Tensor) -> Tensor:
        a = self.conv(F.silu(self.norm(sample) + self.position))  # each row has a summand of its own
        return self.norm(self.conv(F.silu(sample))) + a


def test_other_exchanges_stay_where_they_are() -> None:
    sample = torch.randn(1, 8, 14, 6)
    plain, moved = (dc.convert(Elsewhere(), (sample,), ranks=2, optimise=o) for o in ("", NAME))
    assert moved.graph_text("exact") == plain.graph_text("exact")


@pytest.mark.slow
@pytest.mark.parametrize("name, ranks", [("unet2d", 3), ("sdxl", 2)])
def test_networks(name: str, ranks: int) -> None:
    _, kwargs, want = reference(name, 1, 20, 8)
    plain, moved = (dc.convert(captured(name, 1, 20, 8), ranks=ranks, optimise=o) for o in ("", NAME))
    assert relative_error(first(moved.simulate(**kwargs)), want) <= 1e-5
    assert waits(moved) < 0.75 * waits(plain) and waits(moved, "displaced") == waits(plain, "displaced")


@pytest.mark.parametrize("backend", ["onnxruntime", "eager"])
def test_engines(backend: str, tmp_path: object) -> None:
    torch.manual_seed(0)
    inputs = {"sample": torch.randn(1, 8, 12, 6), "scale": torch.ones(1)}
    program = dc.convert(BLOCKS["silu"], kwargs=inputs, ranks=2, optimise=NAME)
    program.save(f"{tmp_path}/b", backend)
    unet = dc.load(f"{tmp_path}/b", lockstep=True)
    assert relative_error(unet(**inputs), BLOCKS["silu"](**inputs)) <= 1e-5


def test_all_has_it_where_there_is_no_displaced_phase() -> None:
    inputs = {"sample": torch.randn(1, 8, 12, 6), "scale": torch.ones(1)}
    both, exact = (
        dc.convert(BLOCKS["silu"], kwargs=inputs, ranks=2, optimise="all", phases=p) for p in ("both", "exact")
    )
    assert NAME not in both.plan.options.optimise and NAME in exact.plan.options.optimise
    assert waits(exact) == waits(both) - 2
