# SPDX-License-Identifier: Apache-2.0
"""What the trainings of the demo's autoencoder and UNet share: a log, a clock, and an optimizer with averages."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Log:
    """Progress on the terminal, and the same as JSON lines in a file."""

    def __init__(self, path: Path, start: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._start = start

    def __call__(self, **record: Any) -> None:
        seconds = round(time.time() - self._start, 1)
        line = json.dumps({"seconds": seconds, **record})
        print(line, flush=True)
        self._file.write(line + "\n")
        self._file.flush()


class Clock:
    """The way from now to a deadline; its progress drives the learning rate."""

    def __init__(self, deadline: float) -> None:
        self._start = time.time()
        self._seconds = max(deadline - self._start, 1e-3)

    def progress(self) -> float:
        return min(1.0, (time.time() - self._start) / self._seconds)


def cosine_rate(progress: float, peak: float) -> float:
    """A short linear rise, then half a cosine down to a hundredth of the peak."""
    if progress < 0.02:
        return peak * (0.02 + progress / 0.02 * 0.98)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - 0.02) / 0.98)))


def half_precision(device: torch.device) -> torch.autocast:
    """Bfloat16 where that is fast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


class Trainee:
    """Modules with their optimizer and an average of their weights over time."""

    def __init__(self, modules: list[nn.Module], device: torch.device, peak: float) -> None:
        self._peak, self._steps = peak, 0
        self._weights: list[Tensor] = [p for m in modules for p in m.parameters()]
        self._average = [p.detach().clone() for p in self._weights]
        self._optimizer = torch.optim.AdamW(
            self._weights,
            lr=peak,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            fused=device.type == "cuda",
        )

    def step(self, loss: Tensor, progress: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = cosine_rate(progress, self._peak)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._steps += 1
        # A short memory at first, or the average would remember the random start.
        keep = min(0.999, self._steps / (self._steps + 20))
        with torch.no_grad():
            torch._foreach_lerp_(self._average, self._weights, 1 - keep)

    def swap_average(self) -> None:
        """Exchange the weights with their average; a second call puts them back."""
        with torch.no_grad():
            for weight, average in zip(self._weights, self._average, strict=True):
                held = weight.detach().clone()
                weight.copy_(average)
                average.copy_(held)
