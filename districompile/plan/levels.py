# SPDX-License-Identifier: Apache-2.0
"""The order in which an exact phase computes its nodes: by the transfers that they wait for."""

from __future__ import annotations

import operator
from collections.abc import Collection

from torch import fx

from districompile.ir.ops import ops

_ASSEMBLIES = (ops.assemble.default, ops.assemble_in_place.default)


def by_level(graph: fx.Graph, collectives: Collection[fx.Node]) -> list[fx.Node]:
    """Order the nodes by the number of ``collectives`` that they have to wait for, one after the other.

    A phase then waits no more often than its longest chain of transfers does. In the graph's own order, views of one
    transfer's result may stand before the source of the next one, which would wait for the first. A node that waits for
    nothing is computed where it is first read, and so is the assembly of received rows. On each level, nodes keep the
    graph's order.
    """
    level: dict[fx.Node, int] = {}
    for node in graph.nodes:
        level[node] = max((level[s] + (s in collectives) for s in node.all_input_nodes), default=0)
    for node in reversed(graph.nodes):
        movable = node.op == "call_function" and node not in collectives and node.target is not operator.getitem
        parts = [u for u in node.users if u.target is operator.getitem]  # of several results: no tuple leaves a segment
        readers = [u for n in (parts or [node]) for u in n.users]
        if movable and readers and (not level[node] or node.target in _ASSEMBLIES):
            level[node] = max(level[node], min(level[u] for u in readers))
        for part in parts:
            level[part] = level[node]
    return sorted(graph.nodes, key=level.__getitem__)
