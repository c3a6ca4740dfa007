# SPDX-License-Identifier: Apache-2.0
"""Receive gathered rows around the rank's own, so that all are read from one buffer.

Before:

    %scaled_dot_product_attention_fetch_up_halo = dc.exchange(..., [16, 1, 4])
    %scaled_dot_product_attention_fetch_up_rows = dc.assemble(..., %linear_1, ...)

After:

    %scaled_dot_product_attention_fetch_up_halo = dc.exchange(..., [32, 1, 4])
    %scaled_dot_product_attention_fetch_up_rows = dc.assemble_in_place(..., %linear_1, ...)

The pass only marks fetches. The pictures show the graph as ``lower-collectives`` leaves it.

``assemble`` copies the received rows and the own rows into a new tensor at every step. With ``assemble_in_place``, an
engine that may write to its inputs copies the own rows only. The buffer takes memory: once where it is large, twice
where it is small (decision 30). The pass therefore changes nothing if all such buffers together have more than
``share`` of the weights' bytes.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar

from torch import fx

from districompile.ir.collectives import FetchArgs, fetches
from districompile.ir.meta import local_tensors, set_in_place
from districompile.ir.unit import CompilationUnit, Stage


@dataclasses.dataclass(frozen=True)
class InPlaceGather:
    """The pass ``in-place-gather``: it leaves fetches of less than ``least`` bytes, which are assembled where read."""

    share: float = 0.75
    least: int = 1 << 16

    name: ClassVar[str] = "in-place-gather"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "spmd"
    gives: ClassVar[Stage] = "spmd"

    def run(self, unit: CompilationUnit) -> None:
        found = [n for n in fetches(unit.graph) if _gathers_rows(FetchArgs.of(n)) and _bytes(n) >= self.least]
        used = {str(n.target) for n in unit.graph.nodes if n.op == "get_attr"}  # passes may have fused some
        weights = sum(spec.nbytes for name, (spec, _) in unit.captured.weights.items() if name in used)
        if sum(map(_bytes, found)) <= self.share * weights:
            for node in found:
                set_in_place(node)


def _gathers_rows(fetch: FetchArgs) -> bool:
    """Return whether every rank reads all rows of an image, and owns some. Statistics of norms are no such rows."""
    return (
        fetch.purpose not in ("output", "norm")
        and fetch.gathers_all
        and all(a < b for a, b in itertools.pairwise(fetch.bounds))
    )


def _bytes(fetch: fx.Node) -> int:
    """Return the bytes of the own rows of the rank that has most."""
    return max(t.numel() * t.element_size() for t in local_tensors(FetchArgs.of(fetch).x))
