"""Which stream of calls, and which phase, a call of the denoiser belongs to.

A sampler calls the denoiser with timesteps that go one way, normally down. It may call several times with one timestep:
once per guidance half, or twice a step (Heun). Stale activations are only good within one such series of calls, so the
calls of an image are told apart by their place among the calls with equal timestep:

    two calls a step     t0 t0 t1 t1 t2 t2 ...    streams 0 1 0 1 0 1
    Heun                 t0 t1 t1 t2 t2 t3 ...    streams 0 0 1 0 1 0

Wherever it is unclear, a call is given an exact phase: that costs time, never the image.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from districompile.ir.plan import Phase


@dataclasses.dataclass(frozen=True)
class Decision:
    """What to do for one call: ``reset`` means that the state of all streams is dropped before it."""

    phase: Phase
    stream: int
    reset: bool


class StreamTracker:
    """Follows the timesteps of one denoiser. Whether an image goes on is also a matter of other evidence than timesteps
    (:mod:`districompile.runtime.images`).

    - A timestep that goes against the direction of the image so far starts a new image; its direction is known from
      its first two distinct timesteps on.
    - More than ``max_streams`` calls in a row with one timestep start a new image too: a model of one step.
    - Each stream runs ``warmup_steps`` calls of an image in the warm-up phase, and the rest in the steady one. A stream
      that had no call at the last timestep begins anew: its state is older than a step.
    - Without a timestep every call is exact.
    """

    def __init__(self, warmup_steps: int = 4, max_streams: int = 4) -> None:
        if warmup_steps < 1 or max_streams < 1:
            raise ValueError("warmup_steps and max_streams are at least 1")
        self.warmup_steps = warmup_steps
        self.max_streams = max_streams
        self._timestep: float | None = None  # of the last call
        self._direction: Literal[-1, 0, 1] = 0  # 0: not known yet
        self._stream = 0  # of the last call
        self._step = 0  # distinct timesteps of this image so far
        self._calls: dict[int, tuple[int, int]] = {}  # stream -> calls in a row of steps, the step of the last one
        self._reset = True  # before the next call

    def reset(self) -> None:
        """The next call starts a new image, whatever its timestep."""
        self._reset = True

    def continuing(self, timestep: float | None) -> int | None:
        """The stream that a call would belong to if the image went on; None where its timestep starts a new image."""
        if timestep is None or not math.isfinite(timestep) or self._reset or self._starts_image(timestep):
            return None
        return self._stream + 1 if timestep == self._timestep else 0

    def next(self, timestep: float | None) -> Decision:
        """Where the next call belongs, given its timestep (None: the module takes none)."""
        if timestep is None or not math.isfinite(timestep):
            reset, self._reset = self._reset, True
            return Decision("warmup", 0, reset)
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
        return Decision("warmup" if calls < self.warmup_steps else "steady", stream, reset)

    def _towards(self, timestep: float) -> Literal[-1, 0, 1]:
        """The direction from the last timestep to this one."""
        if self._timestep is None or timestep == self._timestep:
            return 0
        return 1 if timestep > self._timestep else -1

    def _starts_image(self, timestep: float) -> bool:
        towards = self._towards(timestep)
        if towards == 0:
            return self._timestep is None or self._stream + 1 >= self.max_streams
        return self._direction == -towards
