# SPDX-License-Identifier: Apache-2.0
"""Find the image's rows in every value, and choose where rows are divided among the ranks.

Before:

    %conv2d = aten.conv2d(%silu, @conv.weight, None, [1, 1], [1, 1])

After:

    %conv2d = aten.conv2d(%silu, @conv.weight, None, [1, 1], [1, 1])

The rules run with one rank, which owns all rows. No node changes. The results are ``unit.shardings`` (the sharded value
of every node), the heights of all maps, and the cut points: the same fractions of the height for all maps.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from districompile.errors import ConvertError
from districompile.ir.layout import choose_cut_points
from districompile.ir.meta import tensor_of
from districompile.ir.unit import CompilationUnit, Stage
from districompile.sharding.builder import ShardedValue
from districompile.sharding.propagate import propagate


@dataclasses.dataclass(frozen=True)
class PropagateShardings:
    """The pass ``propagate-shardings``: it requires explicit casts.

    It sets ``unit.shardings``, ``unit.row_counts`` and ``unit.cut_points``. It raises :class:`ConvertError` where there
    are fewer rows than ranks, with the number of ranks that are possible.
    """

    name: ClassVar[str] = "propagate-shardings"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "global"
    gives: ClassVar[Stage] = "global"

    def run(self, unit: CompilationUnit) -> None:
        found = propagate(unit.graph, unit.rows, (0.0, 1.0), unit.captured.fake_mode)
        unit.shardings = found.values
        sizes = {n for value in found.values.values() for n in _row_counts(value)}
        unit.row_counts = tuple(sorted(sizes, reverse=True))
        ranks = unit.options.ranks
        if unit.rows and max(sizes, default=0) < ranks:
            most = max(sizes, default=1)
            raise ConvertError(
                f"{' and '.join(unit.rows)}: {most} rows are too few for {ranks} ranks; "
                f"use at most {most} ranks, or a taller image"
            )
        unit.cut_points = choose_cut_points(_rows(unit, ranks), ranks, sizes) if unit.rows else (0.0, 1.0)


def _rows(unit: CompilationUnit, ranks: int) -> int:
    """Return the height for which the cut points are chosen: the tallest input's.

    Where that has fewer rows than ranks (a decoder's latents), it is the smallest height that has enough.
    """
    tallest = max(_height(unit, name) for name in unit.rows)
    return tallest if tallest >= ranks else min(n for n in unit.row_counts if n >= ranks)


def _height(unit: CompilationUnit, placeholder: str) -> int:
    node = next(n for n in unit.graph.nodes if n.name == placeholder)
    return int(tensor_of(node).shape[unit.rows[placeholder]])


def _row_counts(value: Any) -> list[int]:
    if isinstance(value, ShardedValue):
        return [value.layout.sharded_axis.rows] if value.layout.sharded_axis is not None else []
    return [n for v in value for n in _row_counts(v)] if isinstance(value, tuple) else []
