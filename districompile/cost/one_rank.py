# SPDX-License-Identifier: Apache-2.0
"""One rank of a program alone on this machine: its engines, with random data in place of what others send."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from districompile.backends.build import build_segments
from districompile.backends.eager import EagerEngine
from districompile.ir.serialize import graph_from_json, graph_to_json
from districompile.plan.plan import Run, SaveState, SliceInput, Wait
from districompile.sharding.compare import relative_error


class LiveWeights:
    """The weights of a program, with the interface of a bundle's weight file. Each is on the device once."""

    def __init__(self, program: Any) -> None:
        self._program = program
        self._held: dict[Any, torch.Tensor] = {}

    def spec(self, name: str) -> Any:
        return self._program.plan.weights[name]

    def tensor(self, name: str, device: torch.device, memory_format: Any = torch.contiguous_format) -> torch.Tensor:
        key = name, device, memory_format
        if key not in self._held:
            self._held[key] = self._program.weight(name).to(device).contiguous(memory_format=memory_format)
        return self._held[key]


class OneRank:
    """The engines of one rank and phase, with random data in place of received rows: a step without transfers.

    ``weights`` is a weight file, for backends that read weights from a file.
    """

    def __init__(
        self, program: Any, phase: str, rank: int, backend: Any, device: torch.device, folder: Path, weights: Any = None
    ) -> None:
        self.plan, self.rank, self.device = program.plan, rank, device
        self.phase = program.plan.phases[phase]
        wanted = {(phase, name, int(s.engines[rank])) for name, s in self.phase.segments.items()}
        self.segments = {key[1]: s for key, s in program.segments(phase) if key in wanted}
        weights = cast(Any, LiveWeights(program)) if weights is None else weights
        files = build_segments(backend, self.segments.items(), weights, folder)
        self.weights = weights
        self.engines = {
            name: backend.load(folder / files[name], s.outputs, weights, device)
            for name, s in self.phase.segments.items()
        }
        generator = torch.Generator(device).manual_seed(2)
        self.received = {}
        for name, collective in program.plan.collectives.items():
            spec = collective.results[rank]
            self.received[name] = random_values(spec, device, generator, collective.purpose == "norm")
        self.state: dict[str, torch.Tensor] = {}
        norms = {c.source for c in program.plan.collectives.values() if c.purpose == "norm"}
        kept = {s.state for s in self.phase.steps if isinstance(s, SaveState) and s.value in norms}
        for segment in self.segments.values():
            for name, spec in segment.inputs:
                if name.endswith(".last_step"):
                    self.state[name] = random_values(spec, device, generator, name in kept)

    def step(self, inputs: Mapping[str, torch.Tensor], run: Callable[..., Any] | None = None) -> dict[str, Any]:
        """Run all steps of the phase but the transfers. ``run(segment, inputs)`` replaces the engines if given."""
        values = {**self.state, **inputs}
        for step in self.phase.steps:
            if isinstance(step, SliceInput):
                sides = [0, 0] * (values[step.source].ndim - 1 - step.dim) + [step.above, step.below]
                padded = torch.nn.functional.pad(values[step.source], sides, value=step.fill)
                start = step.starts[self.rank]
                values[step.value] = padded.narrow(step.dim, start, step.stops[self.rank] - start).contiguous()
            elif isinstance(step, Wait):
                values.update((name, self.received[name]) for name in step.collectives)
            elif isinstance(step, Run):
                plan = self.phase.segments[step.segment]
                given = {name: values[name] for name in plan.inputs}
                if run is not None:
                    values.update(run(step.segment, given))
                else:
                    values.update(self.engines[step.segment].run(given, plan.outputs))
        return values

    def errors(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Compare each segment with eager PyTorch on equal inputs: largest |a - b| / |b| (2-norms) of all outputs."""
        found: dict[str, float] = {}

        def run(name: str, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            segment, plan = self.segments[name], self.phase.segments[name]
            weights = [self.weights.tensor(n, self.device) for n, _ in segment.weights]
            graph = graph_from_json(graph_to_json(segment.graph), self.device)
            want = EagerEngine(graph, dict(segment.inputs), weights, plan.outputs).run(given, plan.outputs)
            got = self.engines[name].run(given, plan.outputs)
            for output in plan.outputs:
                error = relative_error(got[output], want[output])
                found[name] = max(found.get(name, 0.0), error if error == error else float("inf"))
            return want

        self.step(inputs, run)
        return found


def random_values(
    spec: Any, device: torch.device, generator: torch.Generator, statistics: bool = False
) -> torch.Tensor:
    """Draw values between 0 and 1.

    Statistics of norms are nearly equal, as the correction by their difference needs. With others, a variance may
    become 0, and a relative error arbitrarily large.
    """
    if not spec.dtype.is_floating_point:
        return torch.zeros(spec.shape, dtype=spec.dtype, device=device)
    drawn = torch.rand(spec.shape, device=device, generator=generator, dtype=torch.float32)
    return (1 + drawn / 10 if statistics else drawn).to(spec.dtype)
