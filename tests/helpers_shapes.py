"""A network of several shapes: a picture and a text of any size, with a constant that depends on the picture's size."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import districompile as dc
from districompile.program import Program

SHAPES = ((1, 8, 6, 5), (1, 12, 6, 5), (2, 8, 6, 5), (2, 8, 6, 9))  # batch, height, width, tokens
NEW = (1, 10, 4, 7)


class Net(nn.Module):
    """Convolutions, a group norm, half the size, attention to picture and text, and a constant made for the width."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.text_key, self.text_value = nn.Linear(6, 8), nn.Linear(6, 8)
        self.last = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        width = sample.shape[-1]
        ramp = torch.tensor([0.1 * (i * i % 7) for i in range(width)]) + torch.tensor([0.5, 0.25]).sum()
        x = self.norm(self.first(sample) * ramp) + timestep.reshape(-1, 1, 1, 1) * 1e-3
        x = x + nn.functional.interpolate(nn.functional.avg_pool2d(x, 2), size=x.shape[-2:])
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = (f(tokens)[:, None] for f in (self.query, self.key, self.value))
        own = nn.functional.scaled_dot_product_attention(q, k, v)
        both = nn.functional.scaled_dot_product_attention(
            q, self.text_key(text)[:, None], self.text_value(text)[:, None]
        )
        return self.last(x + (own + both)[:, 0].transpose(1, 2).reshape(x.shape))


@functools.cache
def make(seed: int = 0) -> nn.Module:
    return Net(seed).eval().requires_grad_(False)


def call(shape: tuple[int, ...], i: int = 0) -> dict[str, Tensor]:
    """Return the arguments of the i-th call of an image."""
    batch, height, width, tokens = shape
    made = torch.Generator().manual_seed(sum(shape))
    sample = torch.randn(batch, 4, height, width, generator=made) * (1 - 0.02 * i)
    text = torch.randn(batch, tokens, 6, generator=made)
    return {"sample": sample, "timestep": torch.tensor(900.0 - 20 * i), "text": text}


@functools.cache
def program(net: nn.Module, shape: tuple[int, ...], ranks: int = 2, **options: Any) -> Program:
    """Convert ``net`` for a shape, once for all tests. Displaced steps follow the warm-up steps alone."""
    options = {"drift_limit": 0.0, **options}
    return dc.convert(net, (), call(shape), ranks=ranks, rows={"sample": 2}, **options)


def save(
    folder: Path, net: nn.Module, shapes: Any = SHAPES, ranks: int = 2, backend: str = "eager", **options: Any
) -> Path:
    first, *others = (program(net, shape, ranks, **options) for shape in shapes)
    first.save(folder, backend=backend, source="no.such.package:factory", shapes=others)
    return folder


def error(actual: Tensor, wanted: Tensor) -> float:
    return float((actual - wanted).abs().max() / wanted.abs().max())


def image(module: Any, shape: tuple[int, ...], calls: int = 6) -> list[Tensor]:
    """Return the outputs of the calls of one image. The first is exact."""
    return [module(**call(shape, i)) for i in range(calls)]


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def worker(bundle: str, shapes: list[tuple[int, ...]], auto: bool) -> tuple[list[list[bytes]], str]:
    """Run one rank: an image of each shape in turn, twice, then calls of different shapes on two ranks.

    Return the outputs' bytes, and the error of the last calls."""
    import os

    module = dc.load(bundle, shapes=dc.AddShapes(module=make()) if auto else None)
    found, said = [], ""
    for shape in (*shapes, *shapes):
        with module.image():
            found.append([t.numpy().tobytes() for t in image(module, shape)])
    try:
        module(**call(shapes[int(os.environ["RANK"]) == 1]))
    except dc.RanksDifferError as e:
        said = str(e)
    with module.image():
        found.append([t.numpy().tobytes() for t in image(module, shapes[1])])
    module.close()
    return found, said
