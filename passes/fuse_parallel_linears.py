# SPDX-License-Identifier: Apache-2.0
"""Fuse linears that read the same value into one matrix product.

Before:

    %linear = aten.linear(%transpose, @q.weight)
    %linear_1 = aten.linear(%transpose, @k.weight)
    %linear_2 = aten.linear(%transpose, @v.weight)

After:

    %linear_default = aten.linear(%transpose, @q.weight+2)
    %linear_part = aten.slice(%linear_default, 2, 0, 4)
    %linear_1_part = aten.slice(%linear_default, 2, 4, 8)
    %linear_2_part = aten.slice(%linear_default, 2, 8, 12)

Examples are queries, keys and values; the keys and values that all cross-attentions compute from the text; and the
projections of the time embedding in all residual blocks.

Small products use a GPU poorly: at 1024 px on two GPUs a query projection of SDXL is 40 tiles for 132 multiprocessors,
and all three together are 120. The fused weight is stored in place of its parts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from districompile.ir.graph import insert_before, insert_weight
from districompile.ir.meta import tensor_of
from districompile.ir.spec import TensorSpec
from districompile.ir.unit import CompilationUnit, Stage

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class FuseParallelLinears:
    """The pass ``fuse-parallel-linears``: it fuses linears of one input whose weights are used nowhere else.

    The results are the same products; a backend may sum them in another order.
    """

    name: ClassVar[str] = "fuse-parallel-linears"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "global"
    gives: ClassVar[Stage] = "global"

    def run(self, unit: CompilationUnit) -> None:
        # One capture may serve several conversions, so its own dict of weights must not change
        unit.captured = dataclasses.replace(unit.captured, weights=dict(unit.captured.weights))
        groups: dict[Any, list[fx.Node]] = {}
        for node in unit.graph.nodes:
            if node.target is aten.linear.default and all(_is_own(w) for w in _parameters(node)):
                groups.setdefault((node.args[0], len(_parameters(node))), []).append(node)
        order = {n: i for i, n in enumerate(unit.graph.nodes)}
        for group in groups.values():
            if len(group) > 1:
                _merge(unit, group, order)


def _parameters(linear: fx.Node) -> list[fx.Node]:
    """Return the weight and, if there is one, the bias."""
    return [a for a in linear.args[1:] if isinstance(a, fx.Node)]


def _is_own(weight: fx.Node) -> bool:
    return weight.op == "get_attr" and len(weight.users) == 1


def _merge(unit: CompilationUnit, group: Sequence[fx.Node], order: dict[fx.Node, int]) -> None:
    graph, first = unit.graph, group[0]
    columns = zip(*(_parameters(n) for n in group), strict=True)
    parameters = [_joined(unit, first, parts) for parts in columns]
    fused = insert_before(first, aten.linear.default, first.args[0], *parameters)
    start, dim = 0, tensor_of(fused).ndim - 1
    for node in group:
        stop = start + tensor_of(node).shape[-1]
        # Slice where the part is first read, so that only the fused value crosses from segment to segment, once
        at = min(node.users, key=order.__getitem__, default=node)
        part = insert_before(at, aten.slice.Tensor, fused, dim, start, stop, like=node)
        node.replace_all_uses_with(part)
        parts = _parameters(node)
        name = node.name
        graph.erase_node(node)
        part._rename(f"{name}_part")
        for parameter in parts:
            if not parameter.users:
                graph.erase_node(parameter)
        start = stop


def _joined(unit: CompilationUnit, at: fx.Node, parts: Sequence[fx.Node]) -> fx.Node:
    """Insert a fused weight that concatenates ``parts`` along their first dim."""
    weights = unit.captured.weights
    names = [str(p.target) for p in parts]
    specs = [weights[n][0] for n in names]
    shape = (sum(s.shape[0] for s in specs), *specs[0].shape[1:])
    name = f"{names[0]}+{len(names) - 1}"
    while name in weights:  # another group may begin with a tied weight
        name += "'"
    # A refit with other weights reads this
    unit.report.joined[name] = tuple((n, s.shape[0]) for n, s in zip(names, specs, strict=True))
    read = functools.partial(_read_joined, [weights[n][1] for n in names])
    weights[name] = TensorSpec(shape, specs[0].dtype), read
    return insert_weight(at, name, parts[0], shape, f"{parts[0].name}_merged")


def _read_joined(readers: Sequence[Callable[[], Tensor]]) -> Tensor:
    return torch.cat([read() for read in readers])
