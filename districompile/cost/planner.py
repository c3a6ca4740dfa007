# SPDX-License-Identifier: Apache-2.0
"""Compare ways to divide an image among GPUs: seconds, memory and bytes of each, without building engines."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from torch import fx

from districompile.cost.gpus import Gpu, Network
from districompile.cost.predict import StepEstimate, compute_ms, estimate_step
from districompile.cost.work import KernelWork, kernels_of
from districompile.ir.spec import Phase
from districompile.plan.plan import ExecutionPlan
from districompile.plan.report import Report
from districompile.runtime.executor.memory import plan_memory

GIB = 2**30
_CONTEXT_GIB = 0.5  # what CUDA itself and its libraries take of a GPU


class Graphs(Protocol):
    """What is needed of a program: its plan, and the SPMD graph of each phase."""

    plan: ExecutionPlan

    def graph(self, phase: Phase) -> fx.Graph:
        """Return the SPMD graph of a phase."""


@dataclasses.dataclass(frozen=True)
class Division:
    """One way to use ``gpus`` GPUs, and what is predicted for it.

    ``guidance``: ``none`` (one call an image), ``batch`` (both halves in one call of all GPUs) or ``split`` (each half
    on half of the GPUs). ``rows``: the fewest and the most rows of the tallest map that a GPU has. ``memory_gib`` of
    the fullest GPU; ``fits``: whether it has that much. ``sent_mb``: what a GPU sends a displaced step. ``seconds`` of
    an image with the least number of exact steps, ``exact_seconds`` with all steps exact. ``crossing_mb``: what a
    machine sends to other machines a displaced step.
    """

    gpus: int
    guidance: str
    rows: tuple[int, int]
    exact: StepEstimate
    displaced: StepEstimate
    memory_gib: float
    fits: bool
    sent_mb: float
    seconds: float
    exact_seconds: float
    crossing_mb: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the division as JSON values."""
        found = dataclasses.asdict(self)
        for name in ("exact", "displaced"):
            step: StepEstimate = getattr(self, name)
            found[name] = {"ms": round(step.ms, 3), **{k: round(v, 3) for k, v in dataclasses.asdict(step).items()}}
        return {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}


def on_one_gpu(
    graph: fx.Graph, weights: int, guidance: str, rows: int, steps: int, gpu: Gpu, extra_seconds: float = 0.0
) -> Division:
    """Predict one GPU that computes the original graph, compiled and without partition. ``weights`` are bytes."""
    kernels = kernels_of(graph.nodes)
    step = StepEstimate(compute_ms(kernels, gpu))
    memory = _gib(weights, 0, kernels)
    seconds = steps * step.ms / 1e3 + extra_seconds
    return Division(1, guidance, (rows, rows), step, step, memory, memory <= gpu.memory_gib, 0.0, seconds, seconds)


def divided(
    program: Graphs, gpus: int, guidance: str, steps: int, gpu: Gpu, *, measured: Mapping[Phase, float] | None = None,
    extra_seconds: float = 0.0, network: Network | None = None,
) -> Division:  # fmt: skip
    """Predict ``program`` on ``gpus`` GPUs. With guidance split, it is the program of one half.

    ``measured``: the ms of a rank's engines without transfers, by phase, in place of their prediction. ``network``
    connects machines, on which ranks are placed in order.
    """
    plan, report = program.plan, Report(program.plan)
    found: dict[Phase, StepEstimate] = {}
    largest: list[KernelWork] = []
    phases: tuple[Phase, ...] = ("exact", "displaced")
    crossing = dict.fromkeys(phases, 0)
    for phase in phases:
        graph = program.graph(phase)
        kernels = [kernels_of(graph.nodes, r, epilogues=True) for r in range(plan.ranks)]
        largest += (max(k, key=lambda w: w.nbytes) for k in kernels if k)
        times = [compute_ms(k, gpu) for k in kernels]
        if measured is not None:
            times = [measured[phase]]
            times *= plan.ranks
        crossing[phase] = 0 if network is None else _crossing(report, phase, gpus, network)
        found[phase] = estimate_step(
            times, report.sent(phase), report.waits(phase), phase, gpu, network=network, crossing=crossing[phase]
        )
    exact, displaced = found["exact"], found["displaced"]
    first = min(plan.options.warmup_steps, steps)
    received = max(_buffers(plan))
    memory = _gib(sum(s.nbytes for s in plan.weights.values()), received, largest)
    rows = next(iter(report.rows().values()), [0])
    return Division(
        gpus, guidance, (min(rows), max(rows)), exact, displaced, memory, memory <= gpu.memory_gib,
        max(report.sent("displaced")) / 1e6,
        (first * exact.ms + (steps - first) * displaced.ms) / 1e3 + extra_seconds,
        steps * exact.ms / 1e3 + extra_seconds, crossing["displaced"] / 1e6,
    )  # fmt: skip


def _crossing(report: Report, phase: Phase, gpus: int, network: Network) -> int:
    """Return the bytes that the busiest machine sends to others, over both guidance halves."""
    ranks = report.plan.ranks
    total: Counter[int] = Counter()
    for first in range(0, gpus, ranks):
        total.update(report.crossing(phase, [(first + r) // network.gpus for r in range(ranks)]))
    return max(total.values())


def best(found: Iterable[Division], worth: float = 1.1) -> Division | None:
    """Return the division to take: among those that fit, more GPUs only where they are ``worth`` times as fast.

    None where nothing fits.
    """
    chosen: Division | None = None
    for division in sorted((d for d in found if d.fits), key=lambda d: (d.gpus, d.seconds)):
        if chosen is None or division.seconds * worth <= chosen.seconds:
            chosen = division
    return chosen


def _buffers(plan: ExecutionPlan) -> Iterator[int]:
    """The bytes of each rank's receive buffers, values between engines, and kept values."""
    for rank in range(plan.ranks):
        memory = plan_memory(plan, rank)
        yield memory.received_bytes(rank) + memory.arena_bytes + 2 * memory.kept_stride


def _gib(weights: int, buffers: int, kernels: Iterable[KernelWork]) -> float:
    """Weights, buffers, two of the largest kernels' values (inside of engines), and CUDA's own."""
    inside = 2 * max((w.nbytes for w in kernels), default=0.0)
    return (weights + buffers + inside) / GIB + _CONTEXT_GIB
