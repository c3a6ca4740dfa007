# SPDX-License-Identifier: Apache-2.0
"""Modules that ask for values of their own constants, and modules that write to their weights without effect."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import districompile as dc
from districompile.errors import CaptureError


class Around(nn.Module):
    """A function between two convolutions."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1), function

    def forward(self, sample: Tensor) -> Tensor:
        return self.last(self.function(self.first(sample)))


def check(module: nn.Module, ranks: int = 3) -> None:
    sample = torch.randn(1, 3, 16, 12)
    with torch.no_grad():
        want = module.eval()(sample)
    got = dc.convert(module, (sample,), ranks=ranks).simulate(sample)
    assert got.shape == want.shape and (got - want).norm() <= 1e-5 * want.norm()


def resize(x: Tensor, factor: float) -> Tensor:
    """Resize rows by the weighted sum of neighbours, whose number and border follow from tensors made of sizes."""
    rows = x.shape[2]
    count = int(torch.ceil(torch.tensor(rows * factor)))
    grid = torch.arange(count) / factor + (rows - 1) / 2 - (count - 1) / (2 * factor)
    first = torch.ceil(grid - 2 - 1e-6).long()
    seen = first[:, None] + torch.arange(4)
    border = [max(-seen[0, 0].item(), 0), max(int(seen[-1, -1]) - rows + 1, 0)]
    weights = (2 - (grid[:, None] - seen).abs()).clamp_min(0)
    weights /= weights.sum(1, keepdim=True)
    padded = F.pad(x, [0, 0, *border], "reflect")
    return (padded[:, :, seen + border[0]] * weights[..., None]).sum(3)


@pytest.mark.parametrize("factor", [0.5, 2.0, 0.75])
def test_sizes_from_tensors_that_are_made_of_sizes(factor: float) -> None:
    check(Around(lambda x: resize(x, factor)))


def test_what_a_module_writes_is_known_too() -> None:
    def doubled(x: Tensor) -> Tensor:
        count = torch.zeros(3)
        count[1] = 4
        part = count[1:2]
        part.add_(2)
        return x * 2 if count.sum() > 5 and count.tolist() == [0, 6, 0] else x

    check(Around(doubled))


@pytest.mark.parametrize("kind", ["input", "random", "drawn", "written", "input in place"])
def test_values_that_are_not_known(kind: str) -> None:
    def ask(x: Tensor) -> Tensor:
        number = torch.ones(2)
        if kind == "input":
            number = x.mean((0, 1, 2, 3))[None]
        elif kind == "random":
            number = torch.rand(2)
        elif kind == "drawn":
            number.view(2).uniform_()
        elif kind == "written":
            number[0] = x.sum()
        else:
            number.view(2, 1).add_(x.sum())
        return x * 2 if number[0].item() > 0.5 else x

    with pytest.raises(CaptureError):
        dc.capture(Around(ask), (torch.randn(1, 3, 16, 12),))


class Clamped(nn.Module):
    """A scale that is clamped at every call, for training's sake."""

    def __init__(self, scale: float, least: float = -math.inf, buffer: bool = False) -> None:
        super().__init__()
        self.least = least
        value = torch.full((8,), scale)
        if buffer:
            self.register_buffer("scale", value)
        else:
            self.scale = nn.Parameter(value)

    def forward(self, x: Tensor) -> Tensor:
        self.scale.data.clamp_(min=self.least, max=math.log(100))
        return x * self.scale.exp()[:, None, None]


@pytest.mark.parametrize("buffer", [False, True])
def test_a_write_without_effect(buffer: bool) -> None:
    layer = Clamped(math.log(10), buffer=buffer)
    check(Around(layer))
    assert torch.equal(layer.scale, torch.full((8,), math.log(10)))


@pytest.mark.parametrize("scale", [math.log(101), math.nan])
def test_a_write_with_an_effect_is_refused(scale: float) -> None:
    with pytest.raises(CaptureError, match=r"writes to function.scale as it runs"):
        dc.capture(Around(Clamped(scale)), (torch.randn(1, 3, 16, 12),))
    with pytest.raises(CaptureError, match=r"writes to function.scale as it runs"):  # no data to compare
        dc.capture(Around(Clamped(1.0)).to("meta"), (torch.randn(1, 3, 16, 12, device="meta"),))
