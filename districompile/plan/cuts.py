# SPDX-License-Identifier: Apache-2.0
"""Choose where a long phase is divided into segments of about equal work.

A later phase is divided so that the transfers of a segment can start before the call ends. An exact phase is divided
where it waits. A part between two waits that is still long, such as the whole phase of one rank, is divided for the
compiler's sake: the parts are compiled beside each other. If there is a later phase beside it, both are divided alike.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, fx

from districompile.ir.ops import ops
from districompile.plan.plan import Collective

COLLECTIVES = (ops.exchange.default, ops.reduce.default)
_FLOPS_PER_BYTE = 1000  # FLOPs of a GPU in the time of a sent byte: an H100 has 250 TFLOP/s in a UNet, and 300 GB/s
_LONG = 300  # nodes of an exact part that is worth an engine of its own


class Cuts:
    """Say after which nodes a phase is divided. ``work`` has the FLOPs of each node that computes, in graph order.

    ``parts`` is the largest number of segments of a later phase. ``outside`` are nodes that belong to no segment.
    """

    def __init__(self, phase: str, work: Mapping[fx.Node, float], outside: Collection[fx.Node], parts: int) -> None:
        self._exact, self._work = phase == "exact", work
        self._parts = min(parts, max(1, len(work) // _LONG)) if self._exact else parts
        self._quota = sum(work.values()) / self._parts
        inside = {n: w for n, w in work.items() if n not in outside}
        self._last = None if self._exact else _last_cut(inside, parts)
        self._done, self._left = 0.0, sum(work.values())

    def after(self, node: fx.Node, current: Sequence[fx.Node], own: float, segments: int, pending: bool) -> bool:
        """Return whether to divide after ``node``, the newest of the segment ``current``. Ask once for each node.

        ``own`` is the work of ``current``, ``segments`` the number of segments before it, and ``pending`` whether
        exact transfers are under way.
        """
        work = self._work[node]
        self._done, self._left = self._done + work, self._left - work
        if self._parts < 2 or not work:
            return False
        if self._exact:
            full = own >= self._quota and self._left >= self._quota / 2 and not pending
        else:
            full = self._done >= self._quota * (segments + 1)
            if segments + 2 == self._parts and self._last is not None:
                full = node is self._last
            full = full and segments + 1 < self._parts
        return full and not _cuts_a_tuple(current)


def divided_like(nodes: Sequence[fx.Node], parts: Sequence[Collection[str]]) -> list[list[fx.Node]] | None:
    """Divide ``nodes`` as another phase is, whose ``parts`` have the names of its nodes; what it lacks comes first.

    On one rank the phases compute the same, but for what is kept of the conditioning. Divided alike, they share
    engines. Returns None where that is impossible: something that the other phase lacks reads what it computes.
    """
    home = {name: i for i, names in enumerate(parts, 1) for name in names}
    place = {n: home.get(n.name, 0) for n in nodes}
    if any(place.get(source, 0) > place[n] for n in nodes for source in n.all_input_nodes):
        return None
    found: list[list[fx.Node]] = [[] for _ in range(len(parts) + 1)]
    for node in nodes:
        found[place[node]].append(node)
    divided = [part for part in found if part]
    return None if any(map(_cuts_a_tuple, divided)) else divided


def _cuts_a_tuple(nodes: Sequence[fx.Node]) -> bool:
    """Return whether a result of several tensors would be taken apart outside of ``nodes``. No tuple may leave them."""
    inside = set(nodes)
    return any(u not in inside for n in nodes if not isinstance(n.meta["local"][0], Tensor) for u in n.users)


def _last_cut(work: Mapping[fx.Node, float], parts: int) -> fx.Node | None:
    """Choose the node after which the last segment begins.

    Transfers of the last segment overlap with no computation, and those of the segment before it only with the last
    segment. The last segment therefore begins where few bytes remain exposed, and not before its share of the work.
    """
    sent = {n: max((_sent(u) for u in n.users if u.target in COLLECTIVES), default=0.0) for n in work}
    total, everything = sum(work.values()), sum(sent.values())
    done, left, before = 0.0, everything, 0.0
    exposed: dict[fx.Node, float] = {}  # bytes
    for node, flops in work.items():
        done, left = done + flops, left - sent[node]
        if done >= total * (parts - 2) / parts:
            before += sent[node]
        if done >= total * (parts - 1) / parts and (flops or sent[node]):
            exposed[node] = left + max(0.0, before - (total - done) / _FLOPS_PER_BYTE)
    most = min(exposed.values(), default=0.0) + everything / 100
    return next((n for n, e in exposed.items() if e <= most), None)


def _sent(collective: fx.Node) -> float:
    plan: Collective = collective.meta["collective"]
    return float(max(map(plan.sent_bytes, range(len(plan.specs)))) if plan.displaced else 0)
