# SPDX-License-Identifier: Apache-2.0
"""Place the values of a call in one block of memory. Values that are never alive together may share memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from districompile.errors import BundleError
from districompile.ir.check_graph import machine_bytes

ALIGN = 256  # bytes: device allocators return such addresses, and engines rely on them


def aligned(nbytes: int) -> int:
    """Return ``nbytes``, rounded up to a multiple of :data:`ALIGN`."""
    return -(-nbytes // ALIGN) * ALIGN


def allocate(nbytes: int, device: torch.device) -> torch.Tensor:
    """Allocate zeroed memory (uint8) at an address that :data:`ALIGN` divides, on any device.

    Raises :class:`BundleError` for more than this machine has.
    """
    if device.type == "cpu" and nbytes > machine_bytes():
        raise BundleError(f"the plan asks for {nbytes} bytes, this machine has {machine_bytes()}: convert again")
    memory = torch.zeros(nbytes + ALIGN, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % ALIGN
    return memory[start : start + nbytes]


@dataclasses.dataclass(frozen=True)
class Interval:
    """``nbytes`` that are in use from step ``first`` to step ``last``, both included."""

    name: str
    nbytes: int
    first: int
    last: int

    def overlaps(self, other: Interval) -> bool:
        """Return whether both are in use at some step."""
        return self.first <= other.last and other.first <= self.last


def place(intervals: Iterable[Interval]) -> tuple[dict[str, int], int]:
    """Return an aligned offset for each interval, and the size of the block.

    Intervals that overlap in time do not overlap in memory.

    The algorithm is greedy by size (Pisarchyk and Lee, "Efficient memory management for deep neural net inference",
    arXiv 2001.03288).
    """
    placed: list[tuple[Interval, int, int]] = []  # with start and end in the block
    offsets: dict[str, int] = {}
    for interval in sorted(intervals, key=lambda i: (-i.nbytes, i.first, i.name)):
        size = aligned(max(1, interval.nbytes))
        at = 0
        for start, end in sorted((s, e) for other, s, e in placed if other.overlaps(interval)):
            if start - at >= size:
                break
            at = max(at, end)
        placed.append((interval, at, at + size))
        offsets[interval.name] = at
    return offsets, max((end for _, _, end in placed), default=0)
