"""Cut a module's graph at given places and compare every rank's result with the module's own: no lowering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import districompile as dc
from districompile.capture import Captured
from districompile.cutter import Value
from districompile.ir.interpret import interpret
from districompile.passes import pipelines
from districompile.passmanager import PassManager
from districompile.propagate import Propagated, propagate
from districompile.unit import Options, Unit


class Cutting:
    """One capture, cut in several ways. ``rows`` names the cut dim of each cut input, by the name of its parameter."""

    def __init__(self, module: nn.Module, inputs: Mapping[str, Tensor], rows: Mapping[str, int]) -> None:
        self.inputs = dict(inputs)
        with torch.no_grad():
            self.want: Tensor = module(**inputs)
        self.captured: Captured = dc.capture(module, kwargs=inputs)
        self.rows = {i.value: rows[i.path] for i in self.captured.inputs if i.path in rows}
        self.by_value = {i.value: self.inputs[i.path] for i in self.captured.inputs}

    def at(self, fractions: Sequence[float]) -> tuple[float, Propagated]:
        """The largest relative error over all ranks, and what was cut."""
        ranks = len(fractions) - 1
        unit = Unit(self.captured.copy_graph(), "whole", self.captured, Options(ranks), self.rows)
        PassManager().run(unit, [p for p in pipelines.cut(unit.options) if p.gives == "whole"])
        found = propagate(unit.graph, unit.rows, fractions, self.captured.fake_mode, unit.annotation)

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
    """A function of tensors as a module; parameters ``x`` and, where given, ``y``."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function(x)
        return result


def layouts_of(found: Propagated) -> list[Any]:
    """The layouts of all values of the whole graph."""
    return [v.layout for v in found.values.values() if isinstance(v, Value)]
