# SPDX-License-Identifier: Apache-2.0
"""A tensor of the SPMD graph together with its sharding."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from districompile.ir.graph import of_type
from districompile.ir.layout import Layout, Refused
from districompile.ir.meta import local_results


@dataclasses.dataclass(frozen=True, eq=False)
class ShardedValue:
    """A tensor of the SPMD graph: the node that computes each rank's part, and its layout.

    ``replicated`` is a node with the global tensor on every rank, where there is one. Reads of other
    ranks' rows are then free.
    """

    node: fx.Node
    layout: Layout
    replicated: fx.Node | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The global shape."""
        return self.layout.shape

    @property
    def ndim(self) -> int:
        return self.layout.ndim

    @property
    def dtype(self) -> torch.dtype:
        """The dtype, the same on every rank."""
        return local_results(self.node)[0].dtype  # type: ignore[no-any-return]

    @property
    def is_sharded(self) -> bool:
        """Whether the value is divided among the ranks, wholly or in part."""
        return self.layout.sharded_axis is not None

    @property
    def sharded_dim(self) -> int | None:
        """The dim that is sharded, or None."""
        axis = self.layout.sharded_axis
        return None if axis is None else axis.dim


def rows_of(x: ShardedValue) -> tuple[int, tuple[int, ...], int]:
    """Return (dim, bounds, number) of the rows of a sharded value, its dim taken as one factor.

    Raise :class:`Refused` where the value is replicated, or its rows are not the outermost part of their dim.
    """
    axis = x.layout.sharded_axis
    if axis is None:
        raise Refused("the operand that decides is replicated")
    factor = x.layout.merged_dim(axis.dim)
    assert factor.bounds is not None
    return axis.dim, factor.bounds, factor.size


def values_in(x: Any) -> list[ShardedValue]:
    """Return all sharded values in nested arguments."""
    return of_type(x, ShardedValue)
