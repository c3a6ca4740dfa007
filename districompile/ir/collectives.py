# SPDX-License-Identifier: Apache-2.0
"""Named access to the arguments of the two collective operators, ``fetch`` and ``reduce``.

Both are called with positional arguments in a graph. Passes read them by name:

    fetch = FetchArgs.of(node)
    node.args = dataclasses.replace(fetch, purpose="conv").node_args()
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, cast

from torch import fx

from districompile.errors import ConvertError
from districompile.ir.layout import PerRank
from districompile.ir.ops import ops


@dataclasses.dataclass(frozen=True)
class FetchArgs:
    """Arguments of a ``fetch``: rank r owns rows [bounds[r], bounds[r + 1]) and gets rows [lo[r], hi[r]).

    ``bounds``, ``lo`` and ``hi`` count the elements of dim ``dim`` of the global tensor, so that rows outside of
    [0, bounds[-1]) are beyond its border. ``edge`` says what stands there: "zeros" (``fill``), "circular", "reflect" or
    "replicate". ``order`` is "rows", or "own_first": from the rank's own rows on, cyclically. ``purpose`` is what the
    rows are for, which ``--displace`` selects by. ``rank`` is the position of each rank, for the fake kernel.
    """

    x: fx.Node
    dim: int
    bounds: tuple[int, ...]
    lo: tuple[int, ...]
    hi: tuple[int, ...]
    edge: str
    order: str
    fill: float
    rank: int | PerRank[int]
    module_path: str
    purpose: str

    @staticmethod
    def of(node: fx.Node) -> FetchArgs:
        """Read the arguments of a ``fetch`` node. Raise :class:`ConvertError` for another node."""
        if not is_fetch(node):
            raise ConvertError(f"{node.name} is no fetch, but {node.target}")
        x, dim, bounds, lo, hi, *rest = cast(tuple[Any, ...], node.args)
        return FetchArgs(x, dim, tuple(bounds), tuple(lo), tuple(hi), *rest)

    def node_args(self) -> tuple[Any, ...]:
        """Return the arguments in the order of the operator's schema, as a node holds them."""
        rows = (list(self.bounds), list(self.lo), list(self.hi))
        return (self.x, self.dim, *rows, self.edge, self.order, self.fill, self.rank, self.module_path, self.purpose)

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return len(self.bounds) - 1

    @property
    def gathers_all(self) -> bool:
        """Whether every rank wants all rows."""
        return all(a == 0 for a in self.lo) and all(b == self.bounds[-1] for b in self.hi)


@dataclasses.dataclass(frozen=True)
class ReduceArgs:
    """Arguments of a ``reduce``: ``op`` ("sum", "max" or "min") over the ranks of ``x``, which all have one shape."""

    x: fx.Node
    op: Literal["sum", "max", "min"]
    module_path: str
    purpose: str

    @staticmethod
    def of(node: fx.Node) -> ReduceArgs:
        """Read the arguments of a ``reduce`` node. Raise :class:`ConvertError` for another node."""
        if not is_reduce(node):
            raise ConvertError(f"{node.name} is no reduce, but {node.target}")
        return ReduceArgs(*cast(tuple[Any, ...], node.args))

    def node_args(self) -> tuple[Any, ...]:
        """Return the arguments in the order of the operator's schema, as a node holds them."""
        return self.x, self.op, self.module_path, self.purpose


def is_fetch(node: fx.Node) -> bool:
    """Return whether a node is a ``fetch``."""
    return node.target is ops.fetch.default


def is_reduce(node: fx.Node) -> bool:
    """Return whether a node is a ``reduce``."""
    return node.target is ops.reduce.default


def fetches(graph: fx.Graph) -> list[fx.Node]:
    """Return the ``fetch`` nodes of a graph, in order; a list, so that the graph may change meanwhile."""
    return [n for n in graph.nodes if is_fetch(n)]
