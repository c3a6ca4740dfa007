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
        heights = [_height(unit, name) for name in unit.rows]
        ranks = unit.options.ranks
        if heights and max(heights) < ranks:
            raise ConvertError(
                f"{' and '.join(unit.rows)}: {max(heights)} rows are too few for {ranks} ranks; "
                f"use at most {max(heights)} ranks, or a taller image"
            )
        unit.fractions = choose_fractions(heights[0], ranks, sizes) if heights else (0.0, 1.0)


def _height(unit: Unit, placeholder: str) -> int:
    node = next(n for n in unit.graph.nodes if n.name == placeholder)
    return int(node.meta["val"].shape[unit.rows[placeholder]])


def _row_counts(value: Any) -> list[int]:
    if isinstance(value, Value):
        return [value.layout.cut.size] if value.layout.cut is not None else []
    return [n for v in value for n in _row_counts(v)] if isinstance(value, tuple) else []
