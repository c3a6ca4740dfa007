# SPDX-License-Identifier: Apache-2.0
"""Predict ways to divide a model's call among GPUs, and choose between guidance in one batch and split."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from districompile import api
from districompile.cost.gpus import Gpu, Network
from districompile.cost.planner import Division, divided, on_one_gpu
from districompile.errors import Error
from districompile.frontend.capture import capture
from districompile.ir.captured import CapturedModule
from districompile.ir.spec import Phase
from districompile.models.inputs import Example
from districompile.models.sources import LoadedModel
from districompile.progress import Progress

STEPS = 50  # of an image
Guidance = Literal["batch", "split"]


@dataclasses.dataclass
class Divisions:
    """The ways to divide one call of a model: each call is captured once.

    ``example`` makes the inputs of a call by kind of guidance. ``options`` are those of
    :func:`districompile.convert`. ``network`` connects machines.
    """

    loaded: LoadedModel
    example: Callable[[str], Example]
    gpu: Gpu
    steps: int
    progress: Progress
    options: dict[str, Any]
    network: Network | None = None
    _captured: dict[str, tuple[CapturedModule, Any]] = dataclasses.field(default_factory=dict)

    def captured(self, guidance: str) -> tuple[CapturedModule, Any]:
        """Capture the call of all images, or with guidance ``split`` that of one half. Return it and its rows."""
        if guidance not in self._captured:
            example = self.example("none" if guidance == "split" else guidance)
            with self.progress.task(f"capturing one call{' of a guidance half' if guidance == 'split' else ''}"):
                found = capture(self.loaded.module, example.args, example.kwargs)
            self._captured[guidance] = found, example.rows
        return self._captured[guidance]

    def one_gpu(self, guidance: str) -> Division:
        """Predict one GPU that computes the original."""
        module, rows = self.captured(guidance)
        tall = next((i.spec.shape[rows[i.path]] for i in module.inputs if rows and i.path in rows), 0)
        weights = sum(spec.nbytes for spec, _ in module.weights.values())
        return on_one_gpu(module.graph, weights, guidance, tall, self.steps, self.gpu)

    def of(self, gpus: int, guidance: str, measure: Callable[[Any, int], dict[Phase, float]] | None = None) -> Division:
        """Predict ``gpus`` GPUs. ``measure`` gives the times of a program's engines on so many ranks, by phase."""
        ranks = gpus // 2 if guidance == "split" else gpus
        module, rows = self.captured(guidance)
        with self.progress.task(f"{gpus} GPUs, guidance {guidance}"):
            program = api.convert(module, ranks=ranks, rows=rows, **self.options)
            times = None if measure is None else measure(program, ranks)
            return divided(program, gpus, guidance, self.steps, self.gpu, measured=times, network=self.network)


def choose_guidance(divisions: Divisions, gpus: int) -> tuple[Guidance, str] | None:
    """Return the faster kind of guidance on an even number of GPUs, and why. None where no prediction is possible.

    What does not fit into a GPU's memory is taken only if neither does.
    """
    kinds: tuple[Guidance, ...] = ("split", "batch")
    try:
        found = {kind: divisions.of(gpus, kind) for kind in kinds}
    except Error:
        return None
    one, other = sorted(found, key=lambda kind: (not found[kind].fits, found[kind].seconds))
    chosen, left = found[one], found[other]
    where = f"on {gpus} {divisions.gpu.name}"
    if chosen.fits != left.fits:
        return one, f"{other} needs {left.memory_gib:.1f} GiB of a GPU's memory {where}"
    return one, f"predicted {chosen.seconds:.2f} s for {divisions.steps} steps {where}, {other} {left.seconds:.2f}"
