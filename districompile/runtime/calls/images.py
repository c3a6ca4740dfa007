# SPDX-License-Identifier: Apache-2.0
"""Find the image that a call belongs to, by its timestep, its conditioning, and how far its sample moved.

A call continues the image of the calls before it only if all of these hold:

1. Its timestep continues in the image's direction (:mod:`districompile.runtime.calls.call_tracker`).
2. Its conditioning is that of the stream's last call: the same memory, or else equal values.
3. Its sample is one that a sampler makes from the last calls. This is measured, and the host waits for the result,
   unless the timesteps are successive elements of one tensor, as when a sampler iterates over a tensor. On a GPU such
   timesteps are evidence enough once the first moves of the image were measured. They also allow a stochastic sampler.

Any other call begins a new image, whose first calls are exact. That costs time, but never the image. A user can state
instead that calls belong to one image (:meth:`ImageTracker.stated`). docs/decisions/0039 derives and measures this.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from districompile.runtime.calls.call_tracker import CallTracker, Decision
from districompile.runtime.calls.evidence import Change, ConditioningHistory, TimestepSchedule, Trajectory

NEAR = 0.1  # departure of a deterministic sampler: rounding, clipping, a mask's edge
FAR = 0.8  # largest departure of a stochastic sampler; independent noise has 1
TRIAL = 3  # moves of an image that are measured in any case
_OFTEN = 8  # consecutive images that may be the steps of a stochastic sampler


class ImageTracker:
    """Track the calls of one denoiser in the process whose decisions hold for all.

    ``conditioning`` are the paths of inputs that stay the same within an image.
    """

    def __init__(self, warmup_steps: int, conditioning: Sequence[str]) -> None:
        self._streams = CallTracker(warmup_steps)
        self._conditioning = ConditioningHistory(conditioning)
        self._schedule = TimestepSchedule()
        self._trajectory = Trajectory()
        self._moves = 0  # calls of this image after its first
        self._is_stated = False  # the user states that all calls belong to one image
        self._unclear = 0  # number of consecutive images that began with a departure between NEAR and FAR

    def reset(self) -> None:
        """Begin a new image with the next call."""
        self._streams.reset()

    @contextlib.contextmanager
    def stated(self) -> Iterator[None]:
        """Treat calls inside as one image, as far as their timesteps allow it. Nothing is measured."""
        self.reset()
        self._is_stated = True
        try:
            yield
        finally:
            self._is_stated = False
            self.reset()

    def next(
        self, timestep: float | None, given_timestep: Any, given: Mapping[str, Tensor], sample: Tensor,
        stated: bool = False,
    ) -> tuple[Decision, bool]:  # fmt: skip
        """Decide a call, and return whether its conditioning differs from that of its stream's last call.

        ``given_timestep`` is the timestep as the caller passed it, and ``given`` the inputs by path. ``stated``: the
        caller chose the phase, so the call is assumed to continue its image.
        """
        stream = self._streams.continuing(timestep)
        regular = self._schedule.continues(given_timestep)
        change = self._conditioning.compare(stream or 0, given)
        if stream is not None and not (stated or self._is_stated or self._goes_on(change, regular, sample)):
            self._streams.reset()
        decision = self._streams.next(timestep)
        if decision.reset:
            self._moves = 0
            self._schedule.reset()
            self._trajectory.reset()
            self._conditioning.reset()
            self._conditioning.compare(decision.stream, given)
            return decision, True
        self._moves += 1
        return decision, change is not Change.NONE

    def observe(self, sample: Tensor, output: Tensor) -> None:
        """Store a call's sample and output. They must not be written to later."""
        self._trajectory.add(sample, output)

    def _goes_on(self, change: Change, regular: bool, sample: Tensor) -> bool:
        if change is Change.OTHER:
            return False
        if regular and self._moves >= TRIAL and sample.device.type != "cpu":
            return True  # without a wait; a jump is detected two calls later (districompile.runtime.calls.drift)
        departure = self._trajectory.departure(sample)
        if departure <= NEAR:
            self._unclear = 0
            return True
        if departure > FAR:  # also if nothing could be computed
            return False
        if regular:
            return True
        self._unclear += 1
        if self._unclear == _OFTEN:
            warnings.warn(
                "a stochastic sampler's steps cannot be told from other images, so that each is computed exactly: pass "
                "its timesteps as elements of one tensor, or put the calls of an image inside `with dc.image(unet):`",
                stacklevel=2,
            )
        return False
