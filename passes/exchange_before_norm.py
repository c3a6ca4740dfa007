# SPDX-License-Identifier: Apache-2.0
"""Exchange the rows around a patch before they are normalised, together with the statistics of the norm.

Before:

    %group_norm_fetch_halo = dc.exchange(%group_norm_moments_announced, ...)
    %group_norm = dc.normalize(%slice_tensor, %merge_moments_default, 2, @norm.weight, @norm.bias, 1e-05)
    %silu = aten.silu(%group_norm)
    %conv2d_fetch_boundary = dc.pack_boundary(%silu, 2, 1, 1)
    %conv2d_fetch_halo = dc.exchange(%conv2d_fetch_boundary, ...)
    %conv2d_fetch_rows = dc.assemble(%conv2d_fetch_halo, %silu, ...)

After:

    %group_norm_fetch_halo = dc.exchange(%group_norm_moments_announced, ...)
    %conv2d_fetch_boundary_early = dc.pack_boundary(%slice_tensor, 2, 1, 1)
    %conv2d_fetch_halo = dc.exchange(%conv2d_fetch_boundary_early, ...)
    %group_norm = dc.normalize(%slice_tensor, %merge_moments_default, 2, @norm.weight, @norm.bias, 1e-05)
    %silu = aten.silu(%group_norm)
    %slice_tensor_around = aten.permute(%conv2d_fetch_halo, [1, 2, 0, 3])
    %group_norm_around = dc.normalize(%slice_tensor_around, %merge_moments_default, ...)
    %silu_around = aten.silu(%group_norm_around)
    %conv2d_fetch_rows = dc.assemble(..., %silu, ...)

An exact step waits once for both transfers instead of once for each. Every rank normalises the rows that it receives
itself: the same operators on the same numbers, for a few rows more. Rows beyond the border of the image are received
as -inf, and become the fill value of the convolution after the activation. A rank that really has an infinite value
has a mean that is not finite, so that all of its group is NaN on every rank, with this pass or without it.

The displaced phase normalises the previous step's rows by this step's statistics. Its results therefore change a
little, and the pass is not exact.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import fx

from districompile.ir.graph import eliminate_dead_code
from districompile.ir.layout import PerRank
from districompile.ir.meta import collective_of, layout_of, local_specs, local_tensors, set_collective
from districompile.ir.ops import ops
from districompile.ir.unit import CompilationUnit, Stage
from districompile.plan.plan import Exchange
from districompile.sharding.builder import ShardingBuilder

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class ExchangeBeforeNorm:
    """The pass ``exchange-before-norm``: it runs on the lowered graph, before the phases part."""

    name: ClassVar[str] = "exchange-before-norm"
    exact: ClassVar[bool] = False
    needs: ClassVar[Stage] = "lowered"
    gives: ClassVar[Stage] = "lowered"

    def run(self, unit: CompilationUnit) -> None:
        builder = ShardingBuilder.of(unit)
        packed: dict[tuple[Any, ...], fx.Node] = {}
        for assembled in [n for n in unit.graph.nodes if n.target is ops.assemble.default]:
            halo = _Halo.of(assembled)
            if halo is not None:
                _move(builder, halo, packed)
        eliminate_dead_code(unit.graph)


@dataclasses.dataclass(frozen=True)
class _Halo:
    """An exchange of rows of a value that ``steps`` compute from ``root``: a norm and pointwise operators.

    ``statistics`` is the exchange of the statistics that the norm reads.
    """

    assembled: fx.Node
    exchange: fx.Node
    plan: Exchange
    root: fx.Node
    steps: tuple[fx.Node, ...]
    statistics: fx.Node

    @staticmethod
    def of(assembled: fx.Node) -> _Halo | None:
        """Return what an ``assemble`` node reads, or None where its exchange cannot move."""
        exchange, value, dim = assembled.args[:3]
        assert isinstance(exchange, fx.Node) and isinstance(value, fx.Node) and isinstance(dim, int)
        plan = collective_of(exchange)
        if not isinstance(plan, Exchange) or plan.purpose == "output" or len(exchange.users) != 1 or dim < 2:
            return None
        steps = _steps(value, dim)
        norms = [n for n in steps or () if n.target is ops.normalize.default]
        if steps is None or len({n.args[:2] for n in norms}) != 1:
            return None
        root, stats = norms[0].args[:2]
        assert isinstance(root, fx.Node) and isinstance(stats, fx.Node)
        statistics = _exchange_of(stats, root)
        before, after = local_tensors(root)[0].dtype, local_tensors(value)[0].dtype
        if statistics is None or not before.is_floating_point or before.itemsize > after.itemsize:
            return None
        return _Halo(assembled, exchange, plan, root, tuple(steps), statistics)


def _steps(value: fx.Node, dim: int) -> list[fx.Node] | None:
    """Return the norms and the pointwise operators that compute ``value``, in order, or None if there are others."""
    found: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> bool:
        if node not in found and node.target is not ops.normalize.default:
            sources = _row_sources(node, dim)
            if not sources or not all(map(visit, sources)):
                return False
        found.setdefault(node)
        return True

    return list(found) if visit(value) else None


def _row_sources(node: fx.Node, dim: int) -> list[fx.Node]:
    """Return the operands of a pointwise operator that have rows in ``dim``; nothing if they are not known."""
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    if not pointwise or node.kwargs or any(isinstance(a, PerRank) for a in node.args):
        return []
    shapes = [t.shape for t in local_tensors(node)]
    sources = []
    for operand in node.all_input_nodes:
        own = [t.shape for t in local_tensors(operand)]
        if own == shapes:
            sources.append(operand)
        elif not _same_for_all_rows(operand, own, dim - len(shapes[0])):
            return []
    return sources


def _same_for_all_rows(operand: fx.Node, shapes: list[torch.Size], dim: int) -> bool:
    """Return whether a replicated operand is broadcast along dim ``dim``, which is counted from the last one."""
    layout = layout_of(operand)
    replicated = operand.op == "get_attr" or (layout is not None and layout.sharded_axis is None)
    return replicated and all(len(s) < -dim or s[dim] == 1 for s in shapes)


def _exchange_of(stats: fx.Node, root: fx.Node) -> fx.Node | None:
    """Return the exchange of the statistics of ``root`` that ``stats`` merges, if it is that."""
    if stats.target is not ops.merge_moments.default:
        return None
    gathered = stats.all_input_nodes[0]
    exchange = gathered.all_input_nodes[0]
    if gathered.target is not ops.assemble.default or exchange.target is not ops.exchange.default:
        return None
    sent = exchange.all_input_nodes[0]
    moments = sent.all_input_nodes[0] if sent.target is ops.announce.default else sent
    return exchange if moments.target is ops.moments.default and moments.args[0] is root else None


def _move(builder: ShardingBuilder, halo: _Halo, packed: dict[tuple[Any, ...], fx.Node]) -> None:
    """Exchange rows of the root beside the statistics, and repeat the steps on what is received."""
    exchange, source = halo.exchange, halo.root
    boundary = exchange.all_input_nodes[0]
    anchor = halo.statistics
    if boundary.target is ops.pack_boundary.default:
        key = (halo.root, *boundary.args[1:])
        if key not in packed:
            with builder.before(boundary):
                packed[key] = builder.emit(ops.pack_boundary.default, *key, name=f"{boundary.name}_early")
            anchor.append(packed[key])
        source = anchor = packed[key]
    exchange.replace_input_with(boundary, source)
    anchor.append(exchange)
    builder.set_results(exchange)
    padded = any(row < 0 for rows in halo.plan.result_rows for row, _ in rows)
    specs = local_specs(source), local_specs(exchange)
    fill = -math.inf if padded else halo.plan.fill
    set_collective(
        exchange, dataclasses.replace(halo.plan, source=source.name, specs=specs[0], results=specs[1], fill=fill)
    )
    _repeat(builder, halo, padded)


def _repeat(builder: ShardingBuilder, halo: _Halo, padded: bool) -> None:
    """Repeat the steps on the received rows, which are dim 0, and assemble the result."""
    dim, rank = halo.assembled.args[2], local_tensors(halo.root)[0].ndim
    assert isinstance(dim, int)
    order = [*range(1, dim + 1), 0, *range(dim + 1, rank)]
    back = [order.index(d) for d in range(rank)]
    with builder.before(halo.assembled):
        received = builder.emit(aten.permute.default, halo.exchange, order, name=f"{halo.root.name}_around")
        again = {halo.root: received}
        for step in halo.steps:
            args = fx.map_arg(step.args, lambda n: again.get(n, n))
            again[step] = builder.emit(step.target, *args, name=f"{step.name}_around")
        rows = again[halo.steps[-1]]
        if padded:
            outside = builder.emit(aten.eq.Scalar, received, -math.inf, name=f"{halo.root.name}_outside")
            rows = builder.emit(aten.masked_fill.Scalar, rows, outside, halo.plan.fill)
        rows = builder.emit(aten.permute.default, rows, back)
    halo.assembled.replace_input_with(halo.exchange, rows)
