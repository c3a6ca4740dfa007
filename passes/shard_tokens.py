# SPDX-License-Identifier: Apache-2.0
"""Divide tokens that stand beside the image's, such as a text's, among the ranks as well.

Before:

    %mul = aten.mul(%text, %timestep)
    %cat = aten.cat([%mul, %permute_default], 1)
    %linear = aten.linear(%cat, @qkv.weight, None)
    %slice_tensor_1 = aten.slice(%split_part_1, 1, 7, 23)
    %scaled_dot_product_attention_fetch = dc.fetch(%slice_tensor_1, dim=1, want=[0..32, 0..32], ...)

After:

    %slice_tensor_1 = aten.slice(%text, 1, 0|4, 4|7)
    %mul = aten.mul(%slice_tensor_1, %timestep)
    %cat = aten.cat([%mul, %permute_default], 1)
    %linear = aten.linear(%cat, @qkv.weight, None)
    %scaled_dot_product_attention_fetch = dc.fetch(%split_part_1, dim=1, want=[0..39, 0..39], ...)

The pass changes no node: its result is ``unit.tokens``, the replicated values of which each rank takes its own tokens.
The pictures show the graph as ``partition`` leaves it. A joint sequence has two sharded segments, ``(B, 7* + 32*, C)``,
and every operator that treats tokens alike computes a rank's own ones alone. Attention gathers the keys of all segments
in one fetch.

A sequence is divided where it begins: at the input, or at the first operator that mixes its tokens. The pass compares
the partitioned graphs with and without: work, bytes and transfers of the busiest rank. Keys and values that depend on
the conditioning alone stay as they are, as ``cache-conditioning`` computes them once an image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from districompile.ir.collectives import FetchArgs, ReduceArgs, is_fetch, is_reduce
from districompile.ir.flops import flops_of
from districompile.ir.graph import eliminate_dead_code, of_type
from districompile.ir.layout import scale_bounds
from districompile.ir.meta import local_tensors
from districompile.ir.report_builder import Tokens
from districompile.ir.spec import names_timestep
from districompile.ir.unit import CompilationUnit, Stage
from districompile.sharding.builder import ShardedValue
from districompile.sharding.propagate import Propagated, carried, propagate

aten = torch.ops.aten
_JOINS = {aten.cat.default, aten.concat.default}
_ADDEND_FIRST = {aten.baddbmm.default, aten.addmm.default, aten.einsum.default}  # or an equation
_ATTENTION = {aten.scaled_dot_product_attention.default, aten.softmax.int, aten._softmax.default}


@dataclasses.dataclass(frozen=True)
class ShardTokens:
    """The pass ``shard-tokens``: it requires ``unit.shardings``, and adds those of the sequences that it divides.

    ``flops_per_byte`` is the work that takes as long as receiving a byte; ``flops_per_transfer`` that of one more
    collective. The first is low: a byte that rides in a collective that is made anyway costs its bandwidth alone, and
    narrow networks, which save few FLOPs a byte, are bound by memory traffic rather than by FLOPs.
    """

    flops_per_byte: float = 32.0
    flops_per_transfer: float = 4e9

    name: ClassVar[str] = "shard-tokens"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "global"
    gives: ClassVar[Stage] = "global"

    def run(self, unit: CompilationUnit) -> None:
        joins = list(_joins(unit)) if unit.options.ranks > 1 and unit.rows else []
        if not joins:
            return
        early, late = _sources(unit, joins)
        if not late:
            return
        plain = _Candidate.of(unit, {})
        best = min(
            (_Candidate.of(unit, tokens) for tokens in ([late] if early == late else [late, early])),
            key=lambda c: self._total(c.costs),
        )
        divided = self._total(best.costs) < self._total(plain.costs)
        chosen = best if divided else plain
        unit.tokens, unit.shardings, unit.partitioned = chosen.tokens, chosen.shardings, chosen.found
        unit.report.tokens = Tokens(
            divided,
            {name: _length(unit, name, dim) for name, dim in best.tokens.items()},
            plain.costs.flops - best.costs.flops,
            best.costs.bytes - plain.costs.bytes,
            best.costs.transfers - plain.costs.transfers,
        )

    def _total(self, costs: Costs) -> float:
        return costs.flops + costs.bytes * self.flops_per_byte + costs.transfers * self.flops_per_transfer


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one call: FLOPs and received bytes of the busiest rank, and the number of collectives."""

    flops: float
    bytes: int
    transfers: int


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """The sequences that are divided, and the graph partitioned with them."""

    tokens: dict[str, int]
    shardings: dict[str, Any]
    found: Propagated
    costs: Costs

    @staticmethod
    def of(unit: CompilationUnit, tokens: dict[str, int]) -> _Candidate:
        mode = unit.captured.fake_mode
        shardings = unit.shardings
        if tokens:
            shardings = propagate(unit.graph, unit.rows, (0.0, 1.0), mode, tokens=tokens).values
        found = propagate(unit.graph, unit.rows, unit.cut_points, mode, shardings, tokens)
        eliminate_dead_code(found.graph)
        return _Candidate(tokens, shardings, found, costs_of(found.graph, unit.options.ranks))


def _joins(unit: CompilationUnit) -> Iterator[tuple[fx.Node, int]]:
    """Yield the replicated sequences that are concatenated with sharded rows, each with the dim of its tokens."""
    changing = _changing(unit)
    for node in unit.graph.nodes:
        if node.target not in _JOINS:
            continue
        operands: Any = node.args[0]
        dim = _joined_dim(node)
        if _sharded_dim(unit, node) != dim:
            continue
        for operand in operands:
            sequence = operand.op in ("placeholder", "call_function") and _sharded_dim(unit, operand) is None
            if sequence and _divides(unit, operand, dim) and (operand in changing or _is_worked_on(node)):
                yield operand, dim


def _sharded_dim(unit: CompilationUnit, node: fx.Node) -> int | None:
    value = unit.shardings.get(node.name)
    return value.sharded_dim if isinstance(value, ShardedValue) else None


def _divides(unit: CompilationUnit, node: fx.Node, dim: int) -> bool:
    """Return whether there are tokens for all ranks."""
    return scale_bounds(unit.cut_points, int(node.meta["val"].shape[dim])) is not None


def _changing(unit: CompilationUnit) -> set[fx.Node]:
    """Return the values that change from step to step: those that read the image or the timestep."""
    inputs = {*unit.rows, *(i.value for i in unit.captured.inputs if names_timestep(i.path, unit.options.timestep))}
    found: set[fx.Node] = set()
    for node in unit.graph.nodes:
        if node.name in inputs or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _is_worked_on(join: fx.Node) -> bool:
    """Return whether a joined sequence is more than the keys and values of attention."""
    seen: set[fx.Node] = set()
    queue = [(join, user) for user in join.users]
    while queue:
        source, node = queue.pop()
        if flops_of(node):
            args: Any = node.args[1:] if node.target in _ADDEND_FIRST else node.args
            if source is (args[0][0] if isinstance(args[0], list | tuple) else args[0]):
                return True
        elif node not in seen:
            seen.add(node)
            queue += [(node, user) for user in node.users]
    return False


def _sources(unit: CompilationUnit, joins: list[tuple[fx.Node, int]]) -> tuple[dict[str, int], dict[str, int]]:
    """Return where the sequences begin, by name, with the dim of their tokens: before and behind their own attention.

    Each is followed upwards through operators that keep its tokens apart. Attention does, as far as its queries are
    concerned; its keys have to be exchanged. Behind it, each rank takes its tokens of what all ranks compute.
    """
    early, mixed = _walk(unit, joins, set())
    read = {n for node in mixed for n in _ancestors(node)}
    return early, _walk(unit, joins, read)[0]


def _walk(
    unit: CompilationUnit, joins: list[tuple[fx.Node, int]], read: set[fx.Node]
) -> tuple[dict[str, int], list[fx.Node]]:
    """Follow the sequences upwards, but not to a node of ``read``. Return where they begin, and attention passed."""
    found: dict[str, int] = {}
    mixed: list[fx.Node] = []
    seen: set[tuple[fx.Node, int]] = set()
    queue = list(joins)
    while queue:
        node, dim = queue.pop()
        if (node, dim) in seen:
            continue
        seen.add((node, dim))
        source, result = (node.args[0], node.args[1]) if _is_item(node) else (node, None)
        assert isinstance(source, fx.Node)
        if any(_has_rows(unit.shardings.get(n.name)) for n in source.all_input_nodes):
            continue  # split off from a joint sequence, of which it will be a sharded segment
        above: list[tuple[fx.Node, int]] = []
        if source.op == "call_function":
            above = list(_carrying(unit, source, result, dim))
        if above and not any(n in read for n, _ in above):
            mixed += [source] if source.target in _ATTENTION else []
            queue += above
        else:
            found[node.name] = dim
    return dict(sorted(found.items())), mixed


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    queue = list(node.all_input_nodes)
    while queue:
        n = queue.pop()
        if n not in found:
            found.add(n)
            queue += n.all_input_nodes
    return found


def _is_item(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def _has_rows(value: Any) -> bool:
    return any(v.is_sharded for v in of_type(value, ShardedValue))


def _carrying(unit: CompilationUnit, node: fx.Node, result: Any, dim: int) -> Iterator[tuple[fx.Node, int]]:
    """Yield the operands, with their dims, whose tokens become the tokens ``dim`` of the result, one to one."""
    operands = [n for n in node.all_input_nodes if n.op != "get_attr" and isinstance(n.meta.get("val"), Tensor)]
    if node.target in _JOINS and _joined_dim(node) == dim:
        if len(operands) == len(node.all_input_nodes) and all(_divides(unit, n, dim) for n in operands):
            yield from ((n, dim) for n in operands)
        return
    for operand in operands:
        shape = operand.meta["val"].shape
        for d in range(len(shape)):
            if not _divides(unit, operand, d):
                continue
            out = carried(node, operand, d, unit.cut_points, unit.captured.fake_mode)
            if result is not None and out is not None:
                out = out[result]
            axis = out.layout.sharded_axis if isinstance(out, ShardedValue) else None
            if axis is not None and (axis.dim, axis.index, axis.rows) == (dim, 0, shape[d]):
                yield operand, d
                break


def _joined_dim(join: fx.Node) -> int:
    dim: Any = join.args[1] if len(join.args) > 1 else join.kwargs.get("dim", 0)
    return int(dim) % int(join.meta["val"].ndim)


def costs_of(graph: fx.Graph, ranks: int) -> Costs:
    flops, received, transfers = [0.0] * ranks, [0] * ranks, 0
    for node in graph.nodes:
        for r in range(ranks):
            flops[r] += flops_of(node, r)
        if is_fetch(node):
            fetch = FetchArgs.of(node)
            for r, result in enumerate(local_tensors(node)):
                own = min(fetch.hi[r], fetch.bounds[r + 1]) - max(fetch.lo[r], fetch.bounds[r])
                rows = max(1, fetch.hi[r] - fetch.lo[r])
                received[r] += result.nbytes * (rows - max(0, own)) // rows
        elif is_reduce(node):
            size = local_tensors(ReduceArgs.of(node).x)[0].nbytes * (ranks - 1)
            received = [n + size for n in received]
        transfers += is_fetch(node) or is_reduce(node)
    return Costs(max(flops), max(received), transfers)


def _length(unit: CompilationUnit, name: str, dim: int) -> int:
    node = next(n for n in unit.graph.nodes if n.name == name)
    return int(node.meta["val"].shape[dim])
