"""Receive keys and values around room for the rank's own: they are written into it, and all are read where they are.

%f = dc.exchange(%x_strips, [512, 1, 2560])         %f = dc.exchange(%x_strips, [1024, 1, 2560])
%y = dc.place(%f, %x, 1, 0, 512, 0, 512)       ->   %y = dc.insert(%f, %x, 1, 0, 0, 512)

``place`` copies what was received and what is the rank's own into a tensor of their own at every step; with room, an
engine that may write its inputs copies the own rows alone. Room is memory, once where it is much and twice where it is
little (decision 30): it is left only as long as all rooms together are less than ``share`` of the weights.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from torch import fx

from districompile.ir.ops import ops
from districompile.unit import Stage, Unit


@dataclasses.dataclass(frozen=True)
class LeaveRoom:
    """Marks fetches (``meta["room"]``) for ``lower-collectives``. Requires the local stage. Rows of less than ``least``
    bytes are left: what reads them puts them together in passing."""

    share: float = 0.75
    least: int = 1 << 16

    name: ClassVar[str] = "leave-room"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "local"
    gives: ClassVar[Stage] = "local"

    def run(self, unit: Unit) -> None:
        found = [n for n in unit.graph.nodes if n.target is ops.fetch.default and _whole(n) and _bytes(n) >= self.least]
        used = {str(n.target) for n in unit.graph.nodes if n.op == "get_attr"}  # passes may have joined some
        weights = sum(spec.nbytes for name, (spec, _) in unit.captured.weights.items() if name in used)
        if sum(map(_bytes, found)) <= self.share * weights:
            for node in found:
                node.meta["room"] = True


def _whole(fetch: fx.Node) -> bool:
    """Whether every rank wants all rows, and has some of its own. Statistics of norms are no rows of an image."""
    args: Any = fetch.args
    _, _, bounds, lo, hi, _, _, _, _, _, kind = args
    ranks = range(len(bounds) - 1)
    wants = all(lo[r] == 0 and hi[r] == bounds[-1] for r in ranks)
    return kind not in ("output", "norm") and wants and all(bounds[r] < bounds[r + 1] for r in ranks)


def _bytes(fetch: fx.Node) -> int:
    """Of the tallest rank's own rows."""
    args: Any = fetch.args
    return max(int(math.prod(t.shape) * t.element_size()) for t in args[0].meta["local"])
