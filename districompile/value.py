"""What rules are given and give: tensors of the local graph with their layouts."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from districompile.ir.layout import Layout, Refused
from districompile.ir.walk import of_type


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the local graph: the node that holds each rank's part, and how it is laid out.

    ``whole`` is a node holding all of it on every rank, where there is one: reading other ranks' rows is then free.
    """

    node: fx.Node
    layout: Layout
    whole: fx.Node | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def ndim(self) -> int:
        return self.layout.ndim

    @property
    def dtype(self) -> torch.dtype:
        return self.node.meta["local"][0].dtype  # type: ignore[no-any-return]

    @property
    def is_cut(self) -> bool:
        return self.layout.cut is not None

    @property
    def cut_dim(self) -> int | None:
        cut = self.layout.cut
        return None if cut is None else cut.dim


def rows_of(x: Value) -> tuple[int, tuple[int, ...], int]:
    """(dim, bounds, number) of the rows of a cut value, its dim taken as one factor.

    Raises :class:`Refused` where the value is whole, or the rows are not the outermost part of their dim.
    """
    cut = x.layout.cut
    if cut is None:
        raise Refused("the operand that decides is whole")
    factor = x.layout.coarse(cut.dim)
    assert factor.bounds is not None
    return cut.dim, factor.bounds, factor.size


def values_in(x: Any) -> list[Value]:
    """All Values in nested arguments."""
    return of_type(x, Value)
