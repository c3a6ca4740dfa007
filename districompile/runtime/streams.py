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
    """Follows the calls of one denoiser.

    - A timestep that goes against the direction of the image so far starts a new image; its direction is known from
      its first two distinct timesteps on. (An image whose first timestep continues the direction of the last one, as
      when sampling starts above the end of an inversion, is not seen as new: call :meth:`reset` between them.)
    - More than ``max_streams`` calls in a row with one timestep start a new image too: a model of one step.
    - Each stream runs ``warmup_steps`` calls of an image in the warm-up phase, and the rest in the steady one.
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
        self._calls: dict[int, int] = {}  # stream -> calls of this image
        self._reset = True  # before the next call

    def reset(self) -> None:
        """The next call starts a new image, whatever its timestep."""
        self._reset = True

    def next(self, timestep: float | None) -> Decision:
        """Where the next call belongs, given its timestep (None: the module takes none)."""
        if timestep is None or not math.isfinite(timestep):
            reset, self._reset = self._reset, True
            return Decision("warmup", 0, reset)
        reset = self._reset or self._starts_image(timestep)
        if reset:
            self._direction, self._stream, self._calls = 0, 0, {}
        elif timestep == self._timestep:
            self._stream += 1
        else:
            self._direction = self._towards(timestep)
            self._stream = 0
        self._reset = False
        self._timestep = timestep
        calls = self._calls.get(self._stream, 0)
        self._calls[self._stream] = calls + 1
        return Decision("warmup" if calls < self.warmup_steps else "steady", self._stream, reset)

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
