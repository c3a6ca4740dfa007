"""A made-up operator, a network that uses it, and the rule that lets districompile cut it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

import districompile as dc
from districompile.cutter import Cutter, Value


@torch.library.custom_op("example::sharpen", mutates_args=())
def sharpen(x: Tensor, amount: float) -> Tensor:
    """Each row minus the mean of the rows above and below, which are zero beyond the border. ``x``: (B, C, H, W)."""
    padded = torch.nn.functional.pad(x, (0, 0, 1, 1))
    return x + amount * (x - (padded[:, :, :-2] + padded[:, :, 2:]) / 2)


@sharpen.register_fake
def _(x: Tensor, amount: float) -> Tensor:
    return torch.empty_like(x)


@dc.rule(
    torch.ops.example.sharpen.default,
    kind="window",
    samples=lambda: [dc.Sample((torch.randn(1, 2, 9, 4), 0.5), (2,))],
)
def sharpen_rule(cut: Cutter, x: Value, amount: float) -> Value:
    """One more row on either side, the operator itself on what was fetched, and those rows cut off again."""
    dim, bounds, _ = dc.rows_of(x)
    window = cut.fetch(x, [(a - 1, b + 1) for a, b in itertools.pairwise(bounds)], kind="conv")
    taller = cut.emit(torch.ops.example.sharpen.default, window, amount)
    return cut.value(cut.emit(torch.ops.aten.slice.Tensor, taller, dim, 1, -1), x.layout)


class Network(nn.Module):
    """Small, but with a convolution, attention and the operator above."""

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
