# SPDX-License-Identifier: Apache-2.0
"""The state of a stream of calls that the planned executor carries from one call to the next."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator

import torch

from districompile.runtime.transports.base import ReceiveBuffer, TransferPlan

NO_STATE = (
    "Run the exact phase first: leave `phase` unset, or set it to 'exact' for the first calls of an image. "
    "A call whose timestep is that of the call before, or goes back, begins one"
)
"""What to do where a call reads what no earlier call of its image left."""


@dataclasses.dataclass
class BufferState:
    """Double-buffer positions and pending transfers that are carried between calls. Equal on all ranks.

    ``buffer_index`` has, by collective, the buffer of the two that it was last received in. ``last_transfer`` has, by
    collective, its last transfer; None if an engine made its value. ``pending`` holds the transfers that were posted
    but not waited for, in order. ``parity`` has, by message, which of its two signals was last used. ``kept`` has, by
    state, the buffer of the two that holds its value.
    """

    buffer_index: dict[str, int] = dataclasses.field(default_factory=dict)
    last_transfer: dict[str, TransferPlan | None] = dataclasses.field(default_factory=dict)
    pending: dict[TransferPlan, None] = dataclasses.field(default_factory=dict)
    parity: dict[int, int] = dataclasses.field(default_factory=dict)
    kept: dict[str, int] = dataclasses.field(default_factory=dict)

    def copy(self) -> BufferState:
        return BufferState(*(dict(getattr(self, f.name)) for f in dataclasses.fields(self)))

    @functools.cached_property
    def signature(self) -> tuple[object, ...]:
        """A key that is equal if the next call does the same on the same memory.

        It is cached: change only copies afterwards.
        """
        return tuple(frozenset(getattr(self, f.name).items()) for f in dataclasses.fields(self))


@dataclasses.dataclass(eq=False)
class ExecutorState:
    """The memory of one stream of calls, and its contents."""

    number: int
    buffer: ReceiveBuffer
    kept: torch.Tensor
    buffers: BufferState
    transfers: dict[tuple[object, ...], TransferPlan] = dataclasses.field(default_factory=dict)


def result_of(steps: Generator[None, None, list[torch.Tensor]]) -> list[torch.Tensor]:
    """Run all steps of a call. Return the result of its generator."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: list[torch.Tensor] = end.value
            return result
