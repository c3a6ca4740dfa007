"""A small denoiser with a text input, and the sequences of calls that samplers and users make."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import districompile as dc

SHAPE = (1, 4, 12, 8)
Ts = list[float]


class Net(nn.Module):
    """A network of convolutions, a group norm and a text. Its outputs are about as large as its inputs."""

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
    """One image: its first sample, its text, and its timesteps.

    A timestep may come twice in a row, with another sample in the second call.
    """

    sample: Tensor
    text: Tensor
    timesteps: list[Any]
    noise: float = 0.0  # that the sampler adds at each step

    def draw(self, unet: Callable[..., Tensor]) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Yield every call with its result. Each sample is computed from the previous result."""
        x = self.sample
        for i, t in enumerate(self.timesteps):
            call = {"sample": x, "timestep": t if isinstance(t, Tensor) else torch.tensor(float(t)), "text": self.text}
            with torch.no_grad():
                out = unet(**call)
            yield call, out
            x = 0.97 * x - 0.1 * out + self.noise * noise(500 + i)


def errors(unet: Callable[..., Tensor], net: Net, image: Image) -> list[float]:
    """Return the relative error of each call of an image against the original module's result for the same call."""
    found = []
    for call, out in image.draw(unet):
        with torch.no_grad():
            want = net(**call)
        found.append(float((out - want).norm() / want.norm()))
    return found


def falling(steps: int, start: float = 981.0, step: float = 20.0) -> Ts:
    return [start - step * i for i in range(steps)]


def heun(ts: Ts) -> Ts:
    return [ts[0], *(t for t in ts[1:] for _ in range(2))]


def sequences() -> dict[str, list[list[Ts]]]:
    """Return lists of images by name. An image is its timesteps; each image has a sample of its own."""
    one = [[[999.0 / (i + 2)] for i in range(12)]]
    two = [[[900.0 - 200 * i, 800.0 - 200 * i] for i in range(4)]]
    return {
        "of one step, falling": one,
        "of one step, at one timestep": [[[500.0]] * 10],
        "of two steps, falling": two,
        "of two steps, each as the last": [[[999.0, 499.0]] * 6],
        "of four steps": [[falling(4, 999.0, 250.0)] * 4],
        "interrupted, then one that starts lower": [[falling(10), falling(4, 481.0)]],
        "interrupted, then one that starts where it would have gone on": [[falling(10), falling(8, 781.0)]],
        "inverted, then sampled from above": [[falling(10)[::-1], falling(6, 991.0)], [falling(10)[::-1], falling(6)]],
        "by Heun, interrupted": [[heun(falling(6))[:8], heun(falling(6, 861.0))]],
        "of timesteps without an order": [[[700.0, 100.0, 900.0, 100.0, 800.0, 300.0, 200.0, 150.0]] * 2],
        "an evaluation in order": [[[t] for t in falling(25)]],
    }


def draw_all(bundle: str) -> tuple[list[float], list[str]]:
    """Draw every image of :func:`sequences`, with one text and with one each, in two rounds.

    Return the errors of the first three calls of every image, and a digest of all outputs of each round.
    """
    torch.manual_seed(0)
    net, unet = Net().eval(), dc.load(bundle, timeout=60)
    firsts, digests = [], []
    for _ in range(2):
        digest, seed = hashlib.sha256(), 0
        unet.reset()
        for same_text in (True, False):
            for images in (images for listed in sequences().values() for images in listed):
                for timesteps in images:
                    seed += 1
                    for i, (call, out) in enumerate(
                        Image(noise(seed), text(0 if same_text else seed), list(timesteps)).draw(unet)
                    ):
                        digest.update(out.numpy().tobytes())
                        if i < 3:
                            with torch.no_grad():
                                want = net(**call)
                            firsts.append(float((out - want).norm() / want.norm()))
        digests.append(digest.hexdigest())
    unet.close()
    return firsts, digests


def differing_ranks(bundle: str) -> dict[str, Any]:
    """Call ranks differently. Return this rank's result or error of each attempt, and the errors of the next image."""
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
        out = call(noise(1 + rank), 500.0, text(rank))  # rank 0's inputs count
        with torch.no_grad():
            want = net(noise(1), torch.tensor(500.0), text(0))
        return float((out - want).norm() / want.norm())

    def stops() -> None:
        for i in range(3 if rank == 0 else 6):
            call(noise(i), 900.0 - 10 * i, text(0))
        call(noise(9), 950.0, text(1))

    def ends() -> str:
        for i in range(6):
            if rank == 0 and i == 3:
                unet.stop()  # in place of the call that the others make
                break
            call(noise(i), 900.0 - 10 * i, text(0))
        return "ended"

    attempt("other text", other_text)
    attempt("other timestep", lambda: call(noise(1), 500.0 - 400 * rank, text(0)))
    attempt("refused", lambda: call(noise(1)[..., : 8 - rank], 500.0, text(0)))
    attempt("stopped", stops)
    attempt("ended", ends)
    unet.close()
    return got


def dawdle(bundle: str) -> str:
    """Draw images while rank 1 stops in its caller's code in the middle of one, for the error on rank 0."""
    import os
    import time

    unet = dc.load(bundle, timeout=5)
    for image in range(3):
        for i, (_, _) in enumerate(Image(noise(1), text(1), falling(8)).draw(unet)):
            if os.environ["RANK"] == "1" and image == 2 and i == 4:
                time.sleep(1000)
    return "done"
