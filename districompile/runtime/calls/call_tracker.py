# SPDX-License-Identifier: Apache-2.0
"""Assign each call of the denoiser to a stream of calls and to a phase.

A sampler calls the denoiser with timesteps in one direction, normally down. It may call several times with one
timestep: once per guidance half, or twice a step (Heun). Values of the last step are valid only within one such series
of calls. The stream of a call is therefore its position among the calls with equal timestep:

    two calls a step     t0 t0 t1 t1 t2 t2 ...    streams 0 1 0 1 0 1
    Heun                 t0 t1 t1 t2 t2 t3 ...    streams 0 0 1 0 1 0

A call whose place is unclear runs in the exact phase. That costs time, but never the image.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from districompile.ir.spec import Phase


@dataclasses.dataclass(frozen=True)
class Decision:
    """How to run one call. ``reset``: drop the state of all streams before it."""

    phase: Phase
    stream: int
    reset: bool


class CallTracker:
    """Track the timesteps of one denoiser.

    Whether an image continues also depends on other evidence (:mod:`districompile.runtime.calls.images`).

    - A timestep against the direction of the image so far starts a new image. The direction follows from the image's
      first two distinct timesteps.
    - More than ``max_streams`` calls in a row with one timestep also start a new image: the model takes a single step.
    - Each stream runs ``warmup_steps`` calls of an image in the exact phase, and the rest in the displaced one. A
      stream without a call at the last timestep starts again, because its state is older than a step.
    - Without a timestep every call is exact.
    """

    def __init__(self, warmup_steps: int = 4, max_streams: int = 4) -> None:
        if warmup_steps < 1 or max_streams < 1:
            raise ValueError("warmup_steps and max_streams are at least 1")
        self.warmup_steps = warmup_steps
        self.max_streams = max_streams
        self._timestep: float | None = None  # of the last call
        self._direction: Literal[-1, 0, 1] = 0  # 0: unknown so far
        self._stream = 0  # of the last call
        self._step = 0  # distinct timesteps of this image so far, less one
        self._calls: dict[int, tuple[int, int]] = {}  # stream -> calls in consecutive steps, the last one's step
        self._reset = True  # before the next call

    def reset(self) -> None:
        """Start a new image with the next call, whatever its timestep."""
        self._reset = True

    def continuing(self, timestep: float | None) -> int | None:
        """Return the stream of a call if the image continues; None if its timestep starts a new image."""
        if timestep is None or not math.isfinite(timestep) or self._reset or self._starts_image(timestep):
            return None
        return self._stream + 1 if timestep == self._timestep else 0

    def next(self, timestep: float | None) -> Decision:
        """Decide the next call from its timestep. None: the module takes none."""
        if timestep is None or not math.isfinite(timestep):
            reset, self._reset = self._reset, True
            return Decision("exact", 0, reset)
        stream = self.continuing(timestep)
        reset = stream is None
        if stream is None:
            self._direction, self._step, self._calls, stream = 0, 0, {}, 0
        elif timestep != self._timestep:
            self._direction = self._towards(timestep)
            self._step += 1
        self._reset, self._timestep, self._stream = False, timestep, stream
        calls, last = self._calls.get(stream, (0, self._step))
        if self._step - last > 1:
            calls = 0
        self._calls[stream] = calls + 1, self._step
        return Decision("exact" if calls < self.warmup_steps else "displaced", stream, reset)

    def _towards(self, timestep: float) -> Literal[-1, 0, 1]:
        """Return the direction from the last timestep to this one."""
        if self._timestep is None or timestep == self._timestep:
            return 0
        return 1 if timestep > self._timestep else -1

    def _starts_image(self, timestep: float) -> bool:
        towards = self._towards(timestep)
        if towards == 0:
            return self._timestep is None or self._stream + 1 >= self.max_streams
        return self._direction == -towards
