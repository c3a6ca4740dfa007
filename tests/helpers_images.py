"""A small denoiser with a text, and the ways in which samplers and users call one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import districompile as dc

SHAPE = (1, 4, 12, 8)


class Net(nn.Module):
    """A convolution, a group norm and a text. Its outputs are about as large as its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.norm, self.text, self.time = nn.GroupNorm(2, 8), nn.Linear(6, 8), nn.Linear(1, 8)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = self.first(sample) + self.text(text).mean(1)[..., None, None]
        x = x + self.time(timestep.reshape(-1, 1).float() / 1000)[..., None, None]
        result: Tensor = self.last(nn.functional.silu(self.norm(x)))
        return result


def noise(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def text(seed: int) -> Tensor:
    return torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(1000 + seed))


def make(folder: Path, ranks: int, seed: int = 0, **options: Any) -> tuple[Net, Path]:
    torch.manual_seed(seed)
    net = Net().eval()
    kwargs = {"sample": noise(0), "timestep": torch.tensor(500.0), "text": text(0)}
    options = {"warmup_steps": 3, "drift_limit": 0.0, **options}
    dc.convert(net, kwargs=kwargs, ranks=ranks, **options).save(folder, backend="eager")
    return net, folder


@dataclasses.dataclass(frozen=True)
class Image:
    """One image: its first sample, its text, and its timesteps (twice the same: a call whose sample is moved on)."""

    sample: Tensor
    text: Tensor
    timesteps: list[Any]
    noise: float = 0.0  # that the sampler adds at each step

    def draw(self, unet: Callable[..., Tensor]) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Every call with its result. The sample is built from the results."""
        x = self.sample
        for i, t in enumerate(self.timesteps):
            call = {"sample": x, "timestep": t if isinstance(t, Tensor) else torch.tensor(float(t)), "text": self.text}
            with torch.no_grad():
                out = unet(**call)
            yield call, out
            x = 0.97 * x - 0.1 * out + self.noise * noise(500 + i)


def errors(unet: Callable[..., Tensor], net: Net, image: Image) -> list[float]:
    """How far each call of an image is from the original module's result for the same call."""
    found = []
    for call, out in image.draw(unet):
        with torch.no_grad():
            want = net(**call)
        found.append(float((out - want).norm() / want.norm()))
    return found


def differing_ranks(bundle: str) -> dict[str, Any]:
    """What one rank of several gets where the ranks are called differently, and that the next image is right."""
    import os

    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    net = Net().eval()
    unet = dc.load(bundle, timeout=20)
    got: dict[str, Any] = {}

    def attempt(name: str, action: Callable[[], Any]) -> None:
        try:
            got[name] = action()
        except dc.Error as e:
            got[name] = f"{type(e).__name__}: {e}"
        found = errors(unet, net, Image(noise(7), text(7), [900.0 - 20 * i for i in range(5)]))
        got[name, "next image"] = found

    def call(sample: Tensor, t: float, prompt: Tensor) -> Tensor:
        with torch.no_grad():
            return unet(sample=sample, timestep=torch.tensor(t), text=prompt)

    def other_text() -> float:
        out = call(noise(1 + rank), 500.0, text(rank))  # rank 0's hold
        with torch.no_grad():
            want = net(noise(1), torch.tensor(500.0), text(0))
        return float((out - want).norm() / want.norm())

    def stops() -> None:
        for i in range(3 if rank == 0 else 6):
            call(noise(i), 900.0 - 10 * i, text(0))
        call(noise(9), 950.0, text(1))

    attempt("other text", other_text)
    attempt("other timestep", lambda: call(noise(1), 500.0 - 400 * rank, text(0)))
    attempt("refused", lambda: call(noise(1)[..., : 8 - rank], 500.0, text(0)))
    attempt("stopped", stops)
    unet.close()
    return got
