"""Which image a call belongs to: by its timestep, its conditioning, and how far its sample moved.

A call continues the image of the calls before it only if all of this holds:

1. its timestep goes on in the image's direction (:mod:`districompile.runtime.streams`);
2. its conditioning is that of the stream's last call: the same memory, or else equal values;
3. its sample is what a sampler makes of the last calls. That is measured, and the host waits for the measure, unless
   the timesteps are successive elements of one tensor, as those that a sampler iterates over. On a GPU they vouch for
   a call once the first moves of the image were measured. They also let a stochastic sampler pass.

Anything else begins a new image, whose first calls are exact: that costs time, never the image. A user who knows
better says so (:meth:`ImageTracker.stated`). Derived and measured in docs/decisions/0039.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from districompile.runtime.evidence import Change, ConditioningHistory, Schedule, Trajectory
from districompile.runtime.streams import Decision, StreamTracker

NEAR = 0.1  # departure of a deterministic sampler: rounding, clipping, a mask's edge
FAR = 0.8  # departure of a stochastic sampler at most; independent noise has 1
TRIAL = 3  # moves of an image that are measured in any case
_OFTEN = 8  # images in a row that a stochastic sampler's steps may be


class ImageTracker:
    """Follows the calls of one denoiser in the process whose decisions count.

    ``conditioning`` are the paths of inputs that stay the same within an image.
    """

    def __init__(self, warmup_steps: int, conditioning: Sequence[str]) -> None:
        self._streams = StreamTracker(warmup_steps)
        self._conditioning = ConditioningHistory(conditioning)
        self._schedule = Schedule()
        self._trajectory = Trajectory()
        self._moves = 0  # calls of this image after its first
        self._is_stated = False  # the user said that all calls are one image's
        self._unclear = 0  # images in a row that began with a departure between NEAR and FAR

    def reset(self) -> None:
        """The next call begins a new image."""
        self._streams.reset()

    @contextlib.contextmanager
    def stated(self) -> Iterator[None]:
        """Calls inside belong to one image, as far as their timesteps allow it; nothing is measured."""
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
        """Where a call belongs, and whether its conditioning is another than that of its stream's last call.

        ``given_timestep`` is the timestep as the caller passed it, ``given`` the inputs by path. ``stated``: the caller
        chose the phase, so that the call is taken to go on.
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
        """Remember a call's sample and output. Nobody may write into them later."""
        self._trajectory.add(sample, output)

    def _goes_on(self, change: Change, regular: bool, sample: Tensor) -> bool:
        if change is Change.OTHER:
            return False
        if regular and self._moves >= TRIAL and sample.device.type != "cpu":
            return True  # nobody waits; a jump is noticed two calls later (districompile.runtime.drift)
        departure = self._trajectory.departure(sample)
        if departure <= NEAR:
            self._unclear = 0
            return True
        if departure > FAR:  # also where nothing can be said
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
