# SPDX-License-Identifier: Apache-2.0
"""Compare the SPMD graph, on all ranks, with the global graph node by node: this finds a wrong rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from districompile.ir.graph import source_line
from districompile.ir.interpret import interpret, join
from districompile.ir.unit import CompilationUnit
from districompile.sharding.builder import ShardedValue
from districompile.sharding.propagate import propagate


@dataclasses.dataclass(frozen=True)
class NodeError:
    """The :func:`relative_error` of one node, and the line of the model that computes it."""

    node: str
    op: str
    error: float
    source: str


def compare_nodes(unit: CompilationUnit, inputs: Mapping[str, Tensor]) -> list[NodeError]:
    """Partition the graph of ``unit``, whose shardings are known, and run both on ``inputs`` (placeholders by name).

    Return the errors of all nodes with floating-point results, in graph order. The first large error shows which rule
    is wrong. All activations of the model are held in memory at once.
    """
    captured = unit.captured
    found = propagate(unit.graph, unit.rows, unit.cut_points, captured.fake_mode, unit.shardings, unit.tokens)
    local: dict[str, Sequence[Any]] = {}
    expected: dict[str, Any] = {}

    def weight(name: str) -> Tensor:
        return captured.weight_on(name, captured.device)

    with torch.no_grad():
        interpret(unit.graph, inputs, weight, 1, lambda n, v: expected.__setitem__(n.name, v[0]))
        interpret(found.graph, inputs, weight, unit.options.ranks, lambda n, v: local.__setitem__(n.name, v))
    errors = []
    for node in unit.graph.nodes:
        value, want = found.values.get(node.name), expected.get(node.name)
        if node.op != "call_function" or not isinstance(value, ShardedValue) or value.node.name not in local:
            continue
        if isinstance(want, Tensor) and want.is_floating_point():
            errors.append(_compared(node, join(local[value.node.name], value.layout), want))
    return errors


def _compared(node: fx.Node, got: Tensor, want: Tensor) -> NodeError:
    return NodeError(node.name, str(node.target), relative_error(got, want), source_line(node))


def relative_error(got: Tensor, want: Tensor) -> float:
    """Compute |got - want| / |want| (2-norms), in float64 on the CPU; infinite for another shape."""
    if got.shape != want.shape:
        return float("inf")
    a, b = got.double().cpu(), want.double().cpu()
    return float((a - b).norm() / b.norm().clamp_min(1e-12))
