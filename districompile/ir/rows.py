# SPDX-License-Identifier: Apache-2.0
"""Row arithmetic of ``fetch``, shared by the interpreter and the lowering."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from districompile.errors import ConvertError

EDGES = ("zeros", "circular", "reflect", "replicate")


def source_row(row: int, n: int, edge: str) -> int:
    """Return which of ``n`` rows stands at position ``row``, inside or beyond the border; -1 for the fill value."""
    if 0 <= row < n:
        return row
    if edge == "zeros":
        return -1
    if edge == "circular":
        return row % n
    if edge == "replicate":
        return min(max(row, 0), n - 1)
    if edge == "reflect":
        row = abs(row)
        return 2 * (n - 1) - row if row > n - 1 else row
    raise ConvertError(f"unknown edge {edge!r}; there are: {', '.join(EDGES)}")


def wanted_rows(
    bounds: Sequence[int], lo: Sequence[int], hi: Sequence[int], edge: str, order: str, rank: int
) -> list[int]:
    """Return the global rows that ``rank`` receives, in order; -1 stands for the fill value."""
    n = bounds[-1]
    rows = [source_row(i, n, edge) for i in range(lo[rank], hi[rank])]
    if order == "own_first":  # from its own rows on, cyclically
        start = bounds[rank] - lo[rank]
        rows = rows[start:] + rows[:start]
    return rows


def owner(bounds: Sequence[int], row: int) -> int:
    """Return the rank that owns ``row``."""
    return bisect.bisect_right(bounds, row) - 1
