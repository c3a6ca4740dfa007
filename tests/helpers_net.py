"""A small network with every purpose of a transfer, as a bundle of eager engines, and images drawn with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import districompile as dc


class Net(nn.Module):
    """A network with the exchanges of a UNet: halos, statistics, keys and values, rows of a resize."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 4, 3, padding=1)
        self.down = nn.Conv2d(32, 32, 3, 2, 1)
        self.norms = nn.ModuleList(nn.GroupNorm(8, 32) for _ in range(3))
        self.qkv, self.out, self.time = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(1, 32)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = self.first(sample) + self.time(timestep.reshape(-1, 1)).reshape(1, 32, 1, 1)
        skip = x
        x = self.down(nn.functional.silu(self.norms[0](x)))
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norms[1](x).flatten(2).transpose(1, 2)).reshape(b, h * w, 3, 2, 16).unbind(2)
        y = nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + self.out(y.transpose(1, 2).reshape(b, h * w, c)).transpose(1, 2).reshape(b, c, h, w)
        x = nn.functional.interpolate(x, scale_factor=2.0) + skip
        return self.last(nn.functional.silu(self.norms[2](x)))


def make_program(ranks: int, rows: int = 40, cfg: str = "none", **options: Any) -> dc.Program:
    torch.manual_seed(0)
    kwargs = {"sample": torch.randn(2, 4, rows, 32), "timestep": torch.tensor(10.0)}
    options = {"drift_limit": 0.0, **options}  # random samples never settle
    return dc.convert(Net().eval(), kwargs=kwargs, ranks=ranks, warmup_steps=3, cfg=cfg, **options)


def make_bundle(path: Path, ranks: int, rows: int = 40, cfg: str = "none", backend: str = "eager") -> Path:
    make_program(ranks, rows, cfg).save(path, backend=backend)
    return path


def images(unet: Any, steps: int = 9) -> list[bytes]:
    """Draw two images of ``steps`` calls each, the second as a sampler with two calls a step does."""
    device = unet.device
    outputs = []
    for second in (False, True):
        with unet.image():  # random samples are no steps of a sampler
            for i in range(steps):
                generator = torch.Generator().manual_seed(i + steps * second)
                x = torch.randn(2, 4, unet.plan.inputs[0].spec.shape[2], 32, generator=generator)
                t = torch.tensor(100.0 - (i // 2 if second else i))
                outputs.append(unet(sample=x.to(device), timestep=t).cpu().numpy().tobytes())
    return outputs
