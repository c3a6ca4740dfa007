# SPDX-License-Identifier: Apache-2.0
"""Find stacks of equal blocks on residual streams, for ``reuse-deep``.

A *residual stream* is a chain of additions ``x + f(x)``. Each addition is a *link*. A *stack* is a run of links whose
computations repeat with a period: the additions of one block. Between two points of a stack, every value that later
nodes read must lie on a stream, as that of an image or of its text. It then equals its stream's value before, plus a
change, which can be kept.

Everything is found from the graph: nothing is known about classes or names.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import fx

from districompile.ir.flops import flops_of
from districompile.ir.meta import local_results
from districompile.ir.unit import CompilationUnit

aten = torch.ops.aten
_MOVES = {
    aten.slice.Tensor, aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default,
    aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim, aten.clone.default, aten.cat.default,
    aten.unflatten.int, aten.flatten.using_ints, aten._to_copy.default, aten.contiguous.default,
}  # fmt: skip
_REPEATS = 3  # blocks of the smallest stack: one is kept, and one is computed at either end
_ALIKE = 0.5  # of the work of a block: the first and the last of a stack may have so much less, or more


@dataclasses.dataclass(frozen=True)
class Crossing:
    """A value that nodes behind a kept part read: kept itself, or as its change since ``base``."""

    value: fx.Node
    base: fx.Node | None = None


@dataclasses.dataclass(frozen=True)
class _Part:
    """Nodes that a reused step leaves out, their work, and what crosses from them."""

    crossings: list[Crossing]
    nodes: frozenset[fx.Node]
    work: float


def block_crossings(unit: CompilationUnit) -> list[list[Crossing]]:
    """Return, for each number of blocks computed at either end, what crosses from the blocks in between."""
    flow = _Flow(unit)
    chains = _chains(flow)
    stacks: list[list[_Part | None]] = []
    for chain in chains:
        for start, end, period in _runs(flow, chain):
            taken = frozenset().union(*(parts[0].nodes for parts in stacks if parts[0] is not None))
            if any(n in taken for n in chain[start : end + 1]):
                continue  # another stream through the same blocks, such as the text's
            found = [_parts(flow, chains, chain, start + k, end, period) for k in range(period)]
            found = [parts for parts in found if parts and parts[0] is not None]
            if found:
                stacks.append(max(found, key=lambda parts: (parts[0].work, -len(parts[0].crossings))))  # type: ignore[union-attr]
    levels = itertools.zip_longest(*stacks)
    return [[c for part in level if part is not None for c in part.crossings] for level in levels]


def _parts(
    flow: _Flow, chains: Sequence[Sequence[fx.Node]], chain: Sequence[fx.Node], start: int, end: int, period: int
) -> list[_Part | None]:
    """Return what is left out with 1, 2, ... blocks computed at either end of a stack."""
    if end - start < _REPEATS * period - (period - 1):
        return []
    points = _points(flow, chain, start, end, period)
    blocks = len(points) - 1
    return [_part(flow, chains, chain, points[k], points[blocks - k]) for k in range(1, (blocks - 1) // 2 + 1)]


class _Flow:
    """The nodes that depend on the image, and what each depends on, as sets of bits."""

    def __init__(self, unit: CompilationUnit) -> None:
        self.nodes: list[fx.Node] = []
        self.number: dict[fx.Node, int] = {}
        self.before: list[int] = []  # the bits of all ancestors
        self._work: dict[fx.Node, float] = {}
        for node in unit.graph.nodes:
            sources = [self.number[n] for n in node.all_input_nodes if n in self.number]
            image = node.op == "placeholder" and node.name in unit.rows
            if image or (node.op == "call_function" and sources):
                bits = 0
                for s in sources:
                    bits |= self.before[s] | 1 << s
                self._work[node] = flops_of(node, 0)
                self.number[node] = len(self.nodes)
                self.nodes.append(node)
                self.before.append(bits)

    def work(self, nodes: Iterable[fx.Node]) -> float:
        return sum(self._work[n] for n in nodes)

    def depends(self, node: fx.Node, on: fx.Node) -> bool:
        return bool(self.before[self.number[node]] >> self.number[on] & 1)

    def between(self, first: fx.Node, last: fx.Node) -> list[fx.Node]:
        """Return what ``last`` needs besides ``first`` and what that needed."""
        bits = self.before[self.number[last]] & ~(self.before[self.number[first]] | 1 << self.number[first])
        return [n for i, n in enumerate(self.nodes) if bits >> i & 1]


def _shape(node: fx.Node) -> tuple[object, ...]:
    return tuple(tuple(getattr(t, "shape", ())) for t in local_results(node))


def _chains(flow: _Flow) -> list[list[fx.Node]]:
    """Return the residual streams, the longest first: values, each of which adds something to the one before."""
    earlier: dict[fx.Node, fx.Node] = {}
    for node in flow.nodes:
        if node.target is aten.add.Tensor and len(node.args) == 2:
            source = _continued(flow, node)
            if source is not None:
                earlier[node] = source
    length: dict[fx.Node, int] = collections.defaultdict(int)
    follower: dict[fx.Node, fx.Node] = {}
    for node in sorted(earlier, key=flow.number.__getitem__, reverse=True):
        source = earlier[node]
        if length[node] + 1 > length[source]:
            length[source], follower[source] = length[node] + 1, node
    chains = []
    for head in (n for n in follower if n not in earlier or follower.get(earlier[n]) is not n):
        chain = [head]
        while chain[-1] in follower:
            chain.append(follower[chain[-1]])
        chains.append(chain)
    return sorted(chains, key=len, reverse=True)


def _continued(flow: _Flow, node: fx.Node) -> fx.Node | None:
    """Return the stream's value that an addition adds something to, which depends on that value as well."""
    a, b = node.args
    for carried, added in ((a, b), (b, a)):
        if not (isinstance(carried, fx.Node) and isinstance(added, fx.Node) and added in flow.number):
            continue
        source = _moved(flow, carried)
        for value in (source, carried):  # a stream may begin with a moved value
            known = value is not None and value in flow.number
            if value is not None and known and _shape(value) == _shape(node) and flow.depends(added, value):
                return value
    return None


def _moved(flow: _Flow, node: fx.Node) -> fx.Node | None:
    """Return the one value whose elements ``node`` holds, moved at most; None where there are several."""
    found: set[fx.Node] = set()
    waiting, seen = [node], {node}
    while waiting:
        n = waiting.pop()
        if n not in flow.number:
            return None
        if n.target in _MOVES:
            more = [s for s in n.all_input_nodes if s not in seen]
            seen.update(more)
            waiting += more
        else:
            found.add(n)
    return found.pop() if len(found) == 1 else None


def _runs(flow: _Flow, chain: Sequence[fx.Node]) -> Iterator[tuple[int, int, int]]:
    """Yield runs of links whose kinds repeat, as (first link, last link + 1, period): those with most work first."""
    numbers: dict[object, int] = {}
    kinds: list[int] = []
    work: list[float] = []
    for first, last in itertools.pairwise(chain):
        inside = flow.between(first, last)
        counts = collections.Counter((str(n.target), _shape(n)) for n in inside)
        kinds.append(numbers.setdefault(frozenset(counts.items()), len(numbers)))
        work.append(flow.work(inside))
    waiting = [(0, len(kinds))]
    while waiting:
        low, high = waiting.pop()
        best = max(_periodic(kinds, work, low, high), default=None)
        if best is not None:
            _, negative, start, end = best
            yield start, end, -negative
            waiting += [(low, start), (end, high)]


def _periodic(
    kinds: Sequence[int], work: Sequence[float], low: int, high: int
) -> Iterator[tuple[float, int, int, int]]:
    """Yield the longest runs of each period as (work, -period, start, end)."""
    for period in range(1, (high - low) // _REPEATS + 1):
        start = low
        for i in range(low, high):
            if i + period >= high or kinds[i] != kinds[i + period]:
                end = i + period
                if end - start >= _REPEATS * period and end <= high and any(work[start:end]):
                    yield sum(work[start:end]), -period, start, end
                start = i + 1


def _points(flow: _Flow, chain: Sequence[fx.Node], start: int, end: int, period: int) -> list[fx.Node]:
    """Return a stream's values at the borders of blocks, the first of which begins with link ``start``.

    A block in front or behind that does as much work belongs to the stack, too: the first and the last one often differ
    a little.
    """
    links = list(range(start, end - period + 1, period))
    usual = flow.work(flow.between(chain[start], chain[start + period]))
    for link in (start - period, links[-1] + period):
        if 0 <= link <= len(chain) - 1 - period:
            found = flow.work(flow.between(chain[link], chain[link + period]))
            if _ALIKE * usual <= found <= usual / _ALIKE:
                links.append(link)
    links.sort()
    return [*(chain[link] for link in links), chain[links[-1] + period]]


def _part(
    flow: _Flow, chains: Sequence[Sequence[fx.Node]], chain: Sequence[fx.Node], first: fx.Node, last: fx.Node
) -> _Part | None:
    """Return what lies between two points of a stream; None where a value that crosses is on no stream."""
    inside = {n for n in flow.nodes if n is not last and flow.depends(n, first) and not flow.depends(n, last)}
    bases: dict[fx.Node, fx.Node] = {n: first for n in chain if n in inside or n is last}
    ends = [last]
    for other in chains:
        if other is chain or not any(n in inside for n in other):
            continue
        earlier = [n for n in other if not flow.depends(n, first) and n is not first]
        if earlier and _shape(earlier[-1]) == _shape(other[-1]):
            mine = [n for n in other if n in inside]
            bases.update(dict.fromkeys(mine, earlier[-1]))
            ends.append(mine[-1])
    inner = {n for n in inside if n not in ends and not any(flow.depends(n, end) for end in ends)}
    part = inner.union(ends)
    crossings: list[Crossing] = []
    for node in sorted(part, key=flow.number.__getitem__):
        if any(user not in part for user in node.users):
            if node not in bases:
                return None
            crossings.append(Crossing(node, bases[node]))
    return _Part(crossings, frozenset(part), flow.work(part))
