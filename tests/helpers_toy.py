"""A hand-made plan of a small stencil network with all that a plan can hold, and engines that are Python functions.

    x = 2 * sample;  y[i] = x[i-1] + x[i] + x[i+1] + timestep;  z = y - mean(y)

The rows of ``sample`` (its dim 1) are sharded. In the displaced phase, the neighbours' rows and the others' part of the
mean are those of the last call. Engines overwrite their outputs at every call, as the contract allows. With ``parted``
the displaced phase has two segments, and has read the neighbours' rows before it sends its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from districompile.backends.base import Backend, Engine
from districompile.frontend.call_tree import describe_output
from districompile.ir.segment import SegmentGraph
from districompile.ir.spec import InputSpec, TensorSpec
from districompile.plan.options import PlanOptions
from districompile.plan.plan import (
    Exchange,
    ExecutionPlan,
    Reduction,
    RowSlice,
    Run,
    SaveState,
    Schedule,
    SegmentInterface,
    Start,
    Wait,
)

Function = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def bounds_of(rows: int, ranks: int) -> list[int]:
    """Return bounds, uneven on purpose: all rows but the first are divided evenly, and rank 0 has the first, too."""
    return [0, *(1 + (rows - 1) * r // ranks for r in range(1, ranks)), rows]


def make_plan(ranks: int = 2, rows: int = 7, batch: int = 2, warmup_steps: int = 2, cfg: str = "none",
              parted: bool = False) -> ExecutionPlan:  # fmt: skip
    b = bounds_of(rows, ranks)
    f32 = torch.float32

    def spec(n: int) -> TensorSpec:
        return TensorSpec((batch, n), f32)

    own = tuple(spec(b[r + 1] - b[r]) for r in range(ranks))
    halo = []
    for dst in range(ranks):
        want = range(b[dst] - 1, b[dst + 1] + 1)
        for row in want:
            src = next((r for r in range(ranks) if b[r] <= row < b[r + 1]), None)
            if src is not None:
                halo.append(RowSlice(src, dst, row - b[src], row - want.start, 1))
    gather = [RowSlice(s, d, 0, b[s], b[s + 1] - b[s]) for s in range(ranks) for d in range(ranks)]
    wide = tuple(spec(s.shape[1] + 2) for s in own)
    replicated = (spec(rows),) * ranks
    one = (TensorSpec((batch, 1), f32),) * ranks
    collectives = {
        "halo": Exchange("halo", "stencil", "conv", "x", 1, own, wide, tuple(halo), 0.0, "neighbour", True),
        "total": Reduction("total", "norm", "norm", "sum", "sum", one, True),
        "out": Exchange("out", "output", "output", "z", 1, own, replicated, tuple(gather), 0.0, "all_gather"),
    }

    def segment(name: str, inputs: str, outputs: str, weights: tuple[str, ...] = ()) -> SegmentInterface:
        engines = tuple(f"{name}-{r}" for r in range(ranks))
        return SegmentInterface(name, tuple(inputs.split()), tuple(outputs.split()), weights, engines)

    exact = Schedule(
        (
            Run("cut"), Start(("halo",)), Wait(("halo",)), Run("stencil"), Start(("total",)), Wait(("total",)),
            Run("norm"), SaveState("own_sum", "sum"), Start(("out",)), Wait(("out",)),
        ),
        {s.name: s for s in (
            segment("cut", "sample", "x", ("first.weight",)),
            segment("stencil", "halo timestep", "y sum"),
            segment("norm", "y total", "z"),
        )},
        ("out",),
        {"x": own, "y": own, "sum": one, "z": own},
    )  # fmt: skip
    displaced = Schedule(
        (
            Wait(("halo", "total")), Run("all"), SaveState("own_sum", "sum"),
            Start(("halo", "total")), Start(("out",)), Wait(("out",)),
        ),
        {"all": segment("all", "sample timestep halo total own_sum", "x sum z", ("first.weight",))},
        ("out",),
        {"x": own, "sum": one, "z": own},
    )  # fmt: skip
    if parted:
        displaced = Schedule(
            (
                Wait(("halo",)),
                Run("parts"),
                SaveState("own_sum", "sum"),
                Start(("halo",)),
                Wait(("total",)),
                Run("end"),
                Start(("total",)),
                Start(("out",)),
                Wait(("out",)),
            ),
            {
                s.name: s
                for s in (
                    segment("parts", "sample timestep halo", "x y sum", ("first.weight",)),
                    segment("end", "y sum total own_sum", "z"),
                )
            },
            ("out",),
            {"x": own, "y": own, "sum": one, "z": own},
        )
    options = PlanOptions(warmup_steps=warmup_steps, cfg=cfg)
    return ExecutionPlan(
        ranks=ranks,
        inputs=(
            InputSpec("sample", "sample", TensorSpec((batch, rows), f32), 1),
            InputSpec("timestep", "timestep", TensorSpec((batch,), f32)),
        ),
        constants={"return_dict": True, "scale": 2},
        signature=("sample", "timestep", "scale", "return_dict"),
        output=describe_output({"sample": torch.zeros(1)}),
        collectives=collectives,
        phases={"exact": exact, "displaced": displaced},
        weights={"first.weight": TensorSpec((1, 1), f32)},
        bounds={str(rows): tuple(b)},
        options=options,
    )


def function_of(plan: ExecutionPlan, engine: str) -> Function:
    """Return the function of the engine called ``segment-rank``."""
    name, _, number = engine.rpartition("-")
    (b,) = plan.bounds.values()
    rows, r = b[-1], int(number)

    def stencil(wide: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:] + t[:, None]

    def run(v: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if name == "cut":
            return {"x": v["sample"][:, b[r] : b[r + 1]] * 2}
        if name == "stencil":
            y = stencil(v["halo"], v["timestep"])
            return {"y": y, "sum": y.sum(1, keepdim=True)}
        if name == "norm":
            return {"z": v["y"] - v["total"] / rows}
        if name == "end":
            return {"z": v["y"] - (v["total"] + v["sum"] - v["own_sum"]) / rows}
        x = v["sample"][:, b[r] : b[r + 1]] * 2
        wide = torch.cat([v["halo"][:, :1], x, v["halo"][:, -1:]], 1)
        y = stencil(wide, v["timestep"])
        own = y.sum(1, keepdim=True)
        if name == "parts":
            return {"x": x, "y": y, "sum": own}
        return {"x": x, "sum": own, "z": y - (v["total"] + own - v["own_sum"]) / rows}

    return run


class ToyEngine(Engine):
    """An engine that runs a function, always into the same output memory."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.bound: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}

    def bind(self, name: str, tensor: torch.Tensor) -> None:
        self.bound[name] = tensor

    def enqueue(self) -> None:
        for name, value in self.function(self.bound).items():
            if name in self.outputs:
                self.outputs[name].copy_(value)
            else:
                self.outputs[name] = value.clone()
        self.bound.clear()

    def output(self, name: str) -> torch.Tensor:
        return self.outputs[name]


class ToyBackend(Backend):
    """A backend whose engine files hold the names of their functions."""

    name = "toy"
    suffix = ".toy"
    version = "1"

    def __init__(self, plan: ExecutionPlan) -> None:
        self.plan = plan

    def unsupported_ops(self, segment: SegmentGraph) -> list[str]:
        return []

    def build(self, segment: SegmentGraph, weights: Any, path: Path) -> None:
        path.write_text(segment.name)

    def load(self, path: Path, segment: tuple[str, ...], weights: Any, device: torch.device) -> Engine:
        assert path.suffix == self.suffix
        return ToyEngine(function_of(self.plan, path.read_text()))


def make_engines(plan: ExecutionPlan, rank: int) -> dict[str, dict[str, Engine]]:
    return {
        phase: {name: ToyEngine(function_of(plan, s.engines[rank])) for name, s in p.segments.items()}
        for phase, p in plan.phases.items()
    }


class Reference:
    """The computation of all ranks together, on global tensors."""

    def __init__(self, plan: ExecutionPlan) -> None:
        (self.bounds,) = plan.bounds.values()
        self.last_x = torch.empty(0)
        self.last_sums: list[torch.Tensor] = []

    def __call__(self, sample: torch.Tensor, timestep: float, phase: str) -> torch.Tensor:
        rows = sample.shape[1]
        x = torch.nn.functional.pad(sample * 2, (1, 1))
        near = x if phase == "exact" else self.last_x
        parts = []
        for lo, hi in itertools.pairwise(self.bounds):
            wide = torch.cat([near[:, lo : lo + 1], x[:, lo + 1 : hi + 1], near[:, hi + 1 : hi + 2]], 1)
            parts.append(wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:] + timestep)
        sums = [y.sum(1, keepdim=True) for y in parts]
        stale = sums if phase == "exact" else self.last_sums
        outputs = []
        for r, y in enumerate(parts):
            total = sum(sums[q] if q == r else stale[q] for q in range(len(parts)))
            outputs.append(y - total / rows)
        self.last_x, self.last_sums = x, sums
        return torch.cat(outputs, 1)
