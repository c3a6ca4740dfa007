# SPDX-License-Identifier: Apache-2.0
"""Draw the cells of one kind of pipeline: one pipeline on one device, one on all ranks, both made once.

All cells of a kind use the same conversions and engines, as a user's script does that changes schedulers. A session is
for one process that simulates its ranks, or for one rank of several processes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

import districompile as dc

STEPS = 6
ROUNDING = 1e-6  # of float32 outputs, relative: what other kernels and another order of sums change
OWN = "its own"
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": False},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "LMSDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "DDPMScheduler": {"clip_sample": False},
    "LCMScheduler": {},
}


class OneDeviceFails(Exception):
    """One device cannot draw this cell, or draws no finite values."""


def _seeded(draw: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """Seed the global generator before each picture: some pipelines give their scheduler no generator of its own."""

    def drawn(steps: int) -> Tensor:
        torch.manual_seed(0)
        return draw(steps)

    return drawn


class Session:
    """The cells of ``kind``, by mode and scheduler. ``distributed``: this is one of ``ranks`` processes."""

    def __init__(self, kind: Any, ranks: int, cache: Path, distributed: bool) -> None:
        self._kind, self._distributed = kind, distributed
        (self._one, one), (self._pipe, ours) = kind.make(), kind.make()
        self._draw_one, self._draw = _seeded(one), _seeded(ours)
        self._own = type(self._one.scheduler), dict(self._one.scheduler.config)
        self._wanted: dict[tuple[str, int], Tensor] = {}
        self._said: list[str] = []
        enable = functools.partial(dc.enable, self._pipe, ranks, backend="eager", cache=cache, warmup_steps=2)
        self._enabled = enable(lockstep=not distributed, drift_limit=0.0, components=kind.components)

    def close(self) -> None:
        """Give up the engines."""
        with contextlib.suppress(Exception):  # after an error, which is the result
            self._enabled.close()

    def cell(self, scheduler: str, mode: str) -> dict[str, Any]:
        """Draw a cell twice. Return its error, whether both were the same bits, and its calls.

        Raises :class:`OneDeviceFails` if there is nothing to compare with.
        """
        wanted = self._want(scheduler, STEPS - (mode == "two images"))
        self._pipe.scheduler = self._scheduler(scheduler)
        self._enabled.phase = None
        self._enabled.reset()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = self._two_images(wanted) if mode == "two images" else self._one_image(wanted, mode)
        messages = {str(w.message) for w in said if "divided" in str(w.message) or "exact" in str(w.message)}
        return {**found, **({"said": sorted(messages)[:3]} if messages else {})}

    def sensitivity(self, scheduler: str, mode: str) -> float | None:
        """Return how much the picture of one device changes where each value of its denoiser is off by rounding.

        None for a pipeline whose denoiser is not called ``unet``.
        """
        net = getattr(self._one, "unet", None)
        if net is None:
            return None
        steps = STEPS - (mode == "two images")
        wanted = self._want(scheduler, steps)
        generator = torch.Generator().manual_seed(0)

        def noisy(module: Any, args: Any, output: Any) -> Any:
            value = output[0]
            value.mul_(1 + ROUNDING * torch.randn(value.shape, generator=generator))

        hook = net.register_forward_hook(noisy)
        try:
            self._one.scheduler = self._scheduler(scheduler)
            return error_of(self._draw_one(steps), wanted)
        finally:
            hook.remove()

    def _one_image(self, wanted: Tensor, mode: str) -> dict[str, Any]:
        self._enabled.phase = None if mode == "displaced" else "exact"
        first = self._draw(STEPS)
        calls = self._calls()
        same = torch.equal(first, self._draw(STEPS))
        return {"error": error_of(first, wanted), "same": same, "calls": calls, **self._ranks(first)}

    def _two_images(self, wanted: Tensor) -> dict[str, Any]:
        """Draw an image after another one: the same bits as without one before it; its exact phase is compared."""
        self._draw(STEPS)
        second = self._draw(STEPS - 1)
        calls = self._calls()
        self._enabled.reset()
        same = torch.equal(second, self._draw(STEPS - 1))
        with self._enabled.exact():
            error = error_of(self._draw(STEPS - 1), wanted)
        return {"error": error, "same": same, "calls": calls}

    def _want(self, scheduler: str, steps: int) -> Tensor:
        if (scheduler, steps) not in self._wanted:
            try:
                self._one.scheduler = self._scheduler(scheduler)
                found = self._draw_one(steps)
            except Exception as e:
                raise OneDeviceFails(first_line(e)) from e
            if not found.isfinite().all():
                raise OneDeviceFails("values that are not finite")
            self._wanted[scheduler, steps] = found
        return self._wanted[scheduler, steps]

    def _scheduler(self, name: str) -> Any:
        own, config = self._own
        cls: Any = own if name == OWN else getattr(diffusers, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cls.from_config(config, **({} if name == OWN else SCHEDULERS[name]))

    def _calls(self) -> dict[str, list[str]]:
        """Return the calls of the last image by network, exact + displaced, of each conversion that is loaded."""
        loaded = {n: live.modules for n, live in self._enabled.components.items() if live.modules}
        return {n: [f"{m.image_calls['exact']}+{m.image_calls['displaced']}" for m in ms] for n, ms in loaded.items()}

    def _ranks(self, picture: Tensor) -> dict[str, bool]:
        if not self._distributed:
            return {}
        import torch.distributed as dist

        own = hashlib.sha256(picture.numpy().tobytes()).hexdigest()
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, own)
        return {"ranks_equal": len(set(every)) == 1}


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def error_of(got: Tensor, want: Tensor) -> float:
    """Return the largest difference, relative to the largest value of one device, to three digits."""
    error = float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-12))
    return float(f"{error:.3g}")
