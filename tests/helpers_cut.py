"""Partition a module's graph at given cut points, and compare every rank's result with the module's: no lowering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import districompile as dc
from districompile.ir.captured import CapturedModule
from districompile.ir.interpret import interpret
from districompile.ir.unit import CompilationUnit, Options
from districompile.passes import pipelines
from districompile.passes.manager import PassManager
from districompile.sharding.builder import ShardedValue
from districompile.sharding.propagate import Propagated, propagate


class Cutting:
    """One capture, partitioned in several ways. ``rows`` names the sharded dim of each sharded input, by parameter."""

    def __init__(self, module: nn.Module, inputs: Mapping[str, Tensor], rows: Mapping[str, int]) -> None:
        self.inputs = dict(inputs)
        with torch.no_grad():
            self.want: Tensor = module(**inputs)
        self.captured: CapturedModule = dc.capture(module, kwargs=inputs)
        self.rows = {i.value: rows[i.path] for i in self.captured.inputs if i.path in rows}
        self.by_value = {i.value: self.inputs[i.path] for i in self.captured.inputs}

    def at(self, cut_points: Sequence[float]) -> tuple[float, Propagated]:
        """Partition at ``cut_points``. Return the largest relative error over all ranks, and the SPMD graph."""
        ranks = len(cut_points) - 1
        unit = CompilationUnit(self.captured.copy_graph(), "global", self.captured, Options(ranks), self.rows)
        PassManager().run(unit, [p for p in pipelines.cut(unit.options) if p.gives == "global"])
        found = propagate(unit.graph, unit.rows, cut_points, self.captured.fake_mode, unit.shardings, unit.tokens)

        def weight(name: str) -> Tensor:
            return self.captured.weights[name][1]()

        with torch.no_grad():
            outs = interpret(found.graph, self.by_value, weight, ranks)
        scale = float(self.want.double().norm()) or 1.0
        worst = 0.0
        for out in outs:
            assert out[0].shape == self.want.shape
            error = float((out[0].double() - self.want.double()).norm()) / scale
            worst = max(worst, error if error == error else float("inf"))
        return worst, found


class Function(nn.Module):
    """A module that calls a function of one tensor."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function(x)
        return result


def layouts_of(found: Propagated) -> list[Any]:
    """Return the layouts of all values of the global graph."""
    return [v.layout for v in found.values.values() if isinstance(v, ShardedValue)]
