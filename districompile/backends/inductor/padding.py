# SPDX-License-Identifier: Apache-2.0
"""Write padding that repeats or mirrors borders as slices of the image, side by side.

Inductor reads such borders through clamped and mirrored indices. Its analysis of tilings for a GPU substitutes numbers
into them, and torch 2.11 to 2.13 fail there for some ("is not comparable", pytorch/pytorch#172168). Slices have plain
indices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
_MODES = ("replicate", "reflect")


def pad(x: Tensor, sides: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """Compute ``aten.pad``. ``sides`` are pairs (before, after), of the last dim first."""
    if mode not in _MODES or any(n < 0 for n in sides):
        whole: Tensor = aten.pad.default(x, list(sides), mode, value)
        return whole
    for i in range(len(sides) // 2):
        dim, before, after = x.ndim - 1 - i, sides[2 * i], sides[2 * i + 1]
        first, last = (_border(x, dim, n, mode, end=end) for n, end in ((before, False), (after, True)))
        x = torch.cat([part for part in (first, x, last) if part is not None], dim)
    return x


def _border(x: Tensor, dim: int, count: int, mode: str, *, end: bool) -> Tensor | None:
    """Return ``count`` rows to write before ``x``, or behind it with ``end``."""
    size = x.shape[dim]
    if count == 0:
        return None
    if mode == "replicate":
        return x.narrow(dim, size - 1 if end else 0, 1).expand([count if d == dim else -1 for d in range(x.ndim)])
    if count >= size:
        raise ValueError(f"{count} rows cannot be mirrored from {size}")
    return x.narrow(dim, size - 1 - count if end else 1, count).flip(dim)


def of_mode(mode: str) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """Return the lowering of an operator that pads by one mode only."""

    def lowering(x: Tensor, padding: Sequence[int]) -> Tensor:
        return pad(x, padding, mode)

    return lowering


PADDINGS: dict[Any, Callable[..., Tensor]] = {
    aten.pad.default: pad,
    **{getattr(aten, f"replication_pad{n}d").default: of_mode("replicate") for n in (1, 2, 3)},
    **{getattr(aten, f"reflection_pad{n}d").default: of_mode("reflect") for n in (1, 2, 3)},
}
