"""An operator with a rule, a decomposition and an ONNX translation, and a small network that uses it."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from districompile import extend


@torch.library.custom_op("example::sharpen", mutates_args=())
def sharpen(x: Tensor, amount: float) -> Tensor:
    """Subtract from each row the mean of the rows above and below, which are zero beyond the border.

    ``x``: (B, C, H, W); the result has the same shape and dtype.
    """
    padded = torch.nn.functional.pad(x, (0, 0, 1, 1))
    return x + amount * (x - (padded[:, :, :-2] + padded[:, :, 2:]) / 2)


@sharpen.register_fake
def _(x: Tensor, amount: float) -> Tensor:
    return torch.empty_like(x)


@extend.rule(
    torch.ops.example.sharpen.default,
    samples=lambda: [extend.Sample((torch.randn(1, 2, 9, 4), 0.5), (2,))],
)
def sharpen_rule(b: extend.ShardingBuilder, x: extend.ShardedValue, amount: float) -> extend.ShardedValue:
    """Fetch one more row on either side, apply the operator, and drop the two rows of the result."""
    dim, bounds, _ = extend.rows_of(x)
    window = b.fetch(x, [(lo - 1, hi + 1) for lo, hi in itertools.pairwise(bounds)], purpose="conv")
    taller = b.emit(torch.ops.example.sharpen.default, window, amount)
    return b.value(b.emit(torch.ops.aten.slice.Tensor, taller, dim, 1, -1), x.layout)


@extend.decomposition(torch.ops.example.sharpen.default)
def sharpen_of_aten(x: Tensor, amount: float) -> Tensor:
    """Compute the same by operators of PyTorch."""
    padded = torch.nn.functional.pad(x, (0, 0, 1, 1))
    return x + amount * (x - (padded[:, :, :-2] + padded[:, :, 2:]) / 2)


@extend.onnx_translation(torch.ops.example.sharpen.default)
def sharpen_onnx(x: Any, amount: float) -> Any:
    """Write the operator as ONNX: each row is added to its neighbours by padding and cropping."""
    from onnxscript import opset20 as op

    above = op.Pad(x, op.Constant(value_ints=[0, 0, 1, 0, 0, 0, -1, 0]))
    below = op.Pad(x, op.Constant(value_ints=[0, 0, -1, 0, 0, 0, 1, 0]))
    half = op.CastLike(op.Constant(value_float=0.5), x)
    factor = op.CastLike(op.Constant(value_float=amount), x)
    return op.Add(x, op.Mul(factor, op.Sub(x, op.Mul(half, op.Add(above, below)))))


class Sharpen(nn.Module):
    """A layer that sharpens images (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return sharpen(x, 0.3)


class Network(nn.Module):
    """A small network with a convolution, attention and the operator above."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = sharpen(self.norm(self.first(sample) + timestep), 0.3)
        tokens = x.flatten(2).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(self.query(tokens), self.key(tokens), self.value(tokens))
        out: Tensor = self.last(x + mixed.transpose(1, 2).reshape(x.shape))
        return out


def network() -> tuple[nn.Module, tuple[()], dict[str, Tensor]]:
    """Return the network and the arguments of a call: a factory for the command line."""
    torch.manual_seed(0)
    return Network(), (), {"sample": torch.randn(1, 3, 13, 8), "timestep": torch.tensor(0.5)}
