# SPDX-License-Identifier: Apache-2.0
"""Slice a rank's own rows out of an input."""

from __future__ import annotations

import torch

from districompile.plan.plan import SliceInput


def slice_rows(step: SliceInput, source: torch.Tensor, rank: int, place: torch.Tensor) -> None:
    """Copy the rows of ``rank`` from an input into ``place``, without padding the whole input."""
    start, stop = step.starts[rank] - step.above, step.stops[rank] - step.above
    rows = source.shape[step.dim]
    first, last = min(max(start, 0), rows), max(min(stop, rows), 0)
    above = min(max(0, -start), stop - start)
    inside = max(0, last - first)
    if inside < stop - start:
        place.fill_(step.fill)
    place.narrow(step.dim, above if inside else 0, inside).copy_(source.narrow(step.dim, first, inside))
