"""Which operator is wrong? Every node of the cut graph, on all ranks, against the same node of the whole graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from districompile.cutter import Value
from districompile.ir.interpret import interpret, join
from districompile.ir.walk import source_line
from districompile.propagate import propagate
from districompile.unit import Unit


@dataclasses.dataclass(frozen=True)
class NodeError:
    """One node: its :func:`relative_error` against the whole graph's, and where the model computes it."""

    node: str
    op: str
    error: float
    source: str


def compare_nodes(unit: Unit, inputs: Mapping[str, Tensor]) -> list[NodeError]:
    """Cut the annotated whole graph of ``unit`` and run both, operator by operator, on ``inputs`` (placeholders by
    name).

    All nodes with floating-point results, in graph order: the first large error names the rule to look at. Memory:
    every activation of the model at once.
    """
    captured = unit.captured
    found = propagate(unit.graph, unit.rows, unit.fractions, captured.fake_mode, unit.annotation)
    cut: dict[str, Sequence[Any]] = {}
    whole: dict[str, Any] = {}

    def weight(name: str) -> Tensor:
        return captured.weights[name][1]()

    with torch.no_grad():
        interpret(unit.graph, inputs, weight, 1, lambda n, v: whole.__setitem__(n.name, v[0]))
        interpret(found.graph, inputs, weight, unit.options.ranks, lambda n, v: cut.__setitem__(n.name, v))
    errors = []
    for node in unit.graph.nodes:
        value, want = found.values.get(node.name), whole.get(node.name)
        if node.op != "call_function" or not isinstance(value, Value) or value.node.name not in cut:
            continue
        if isinstance(want, Tensor) and want.is_floating_point():
            errors.append(_compared(node, join(cut[value.node.name], value.layout), want))
    return errors


def _compared(node: fx.Node, got: Tensor, want: Tensor) -> NodeError:
    return NodeError(node.name, str(node.target), relative_error(got, want), source_line(node))


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| (2-norms), in float64 on the CPU; infinite for another shape."""
    if got.shape != want.shape:
        return float("inf")
    a, b = got.double().cpu(), want.double().cpu()
    return float((a - b).norm() / b.norm().clamp_min(1e-12))
