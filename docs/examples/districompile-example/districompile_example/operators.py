"""Operators without rules: one with several results, one that writes to its argument. They are computed on gathered
inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from districompile import extend


@torch.library.custom_op("example::extremes", mutates_args=())
def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Give the smallest and the largest value of each channel. ``x``: (B, C, H, W); results: (B, C, 1, 1)."""
    return x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)


@extremes.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:2], 1, 1)
    return x.new_empty(shape), x.new_empty(shape)


@torch.library.custom_op("example::scale_", mutates_args=("x",))
def scale_(x: Tensor, factor: float) -> None:
    """Multiply ``x`` in place."""
    x.mul_(factor)


extend.operator(torch.ops.example.extremes.default, torch.ops.example.scale_.default)


@extend.decomposition(torch.ops.example.scale_.default)
def scale_of_aten(x: Tensor, factor: float) -> None:
    """Do the same by an operator of PyTorch."""
    x.mul_(factor)


class Normalise(nn.Module):
    """A network that scales in place and moves each channel to the range from 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        x = self.first(sample)
        scale_(x[:, :2], 2.0)
        low, high = extremes(x)
        return (x - low) / (high - low)


def network() -> tuple[nn.Module, tuple[()], dict[str, Tensor]]:
    """Return the network and the arguments of a call."""
    torch.manual_seed(0)
    return Normalise(), (), {"sample": torch.randn(1, 3, 12, 8)}
