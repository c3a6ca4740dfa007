"""Find where the image's rows are in every value, and choose where to cut them.

Runs the rules on one imaginary rank that owns all rows. Changes no node: it fills in ``unit.annotation`` (the layout of
every value), the heights of all maps, and the cut points, which are the same fractions of the height for all of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from districompile.cutter import Value
from districompile.errors import ConvertError
from districompile.ir.layout import choose_fractions
from districompile.propagate import propagate
from districompile.unit import Stage, Unit


@dataclasses.dataclass(frozen=True)
class Annotate:
    """Requires explicit casts. Gives ``unit.annotation``, ``unit.row_counts`` and ``unit.fractions``.

    Raises :class:`ConvertError` where there are fewer rows than ranks, saying how many ranks would do.
    """

    name: ClassVar[str] = "annotate"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "whole"
    gives: ClassVar[Stage] = "whole"

    def run(self, unit: Unit) -> None:
        found = propagate(unit.graph, unit.rows, (0.0, 1.0), unit.captured.fake_mode)
        unit.annotation = found.values
        sizes = {n for value in found.values.values() for n in _row_counts(value)}
        unit.row_counts = tuple(sorted(sizes, reverse=True))
        ranks = unit.options.ranks
        if unit.rows and max(sizes, default=0) < ranks:
            most = max(sizes, default=1)
            raise ConvertError(
                f"{' and '.join(unit.rows)}: {most} rows are too few for {ranks} ranks; "
                f"use at most {most} ranks, or a taller image"
            )
        unit.fractions = choose_fractions(_rows(unit, ranks), ranks, sizes) if unit.rows else (0.0, 1.0)


def _rows(unit: Unit, ranks: int) -> int:
    """The height that the cut points are chosen for: the tallest input's, or, where that has fewer rows than ranks (a
    decoder's latents), the first height that has enough."""
    tallest = max(_height(unit, name) for name in unit.rows)
    return tallest if tallest >= ranks else min(n for n in unit.row_counts if n >= ranks)


def _height(unit: Unit, placeholder: str) -> int:
    node = next(n for n in unit.graph.nodes if n.name == placeholder)
    return int(node.meta["val"].shape[unit.rows[placeholder]])


def _row_counts(value: Any) -> list[int]:
    if isinstance(value, Value):
        return [value.layout.cut.rows] if value.layout.cut is not None else []
    return [n for v in value for n in _row_counts(v)] if isinstance(value, tuple) else []
