"""All ranks of a plan by the reference executor, in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from districompile.plan.plan import ExecutionPlan
from districompile.runtime.executor.engines import Engines
from tests.reference.executor import DynamicExecutor, StreamState
from tests.reference.transports import DynamicGroup


class ReferenceRunner:
    """Runs calls of one stream. ``engines`` are those of each rank; the plan has one guidance half."""

    def __init__(self, plan: ExecutionPlan, engines: Sequence[Engines], dense: bool = False) -> None:
        self.group = DynamicGroup(plan.ranks)
        self.executors = [
            DynamicExecutor(plan, r, engines[r], t, torch.device("cpu"), dense)
            for r, t in enumerate(self.group.transports)
        ]
        self.states = [StreamState() for _ in self.executors]

    def __call__(self, phase: str, inputs: Mapping[str, torch.Tensor]) -> list[list[torch.Tensor]]:
        """Run one call with ``inputs`` by value name. Return the output leaves of each rank."""
        runs = [e.iterate(phase, inputs, s) for e, s in zip(self.executors, self.states, strict=True)]
        outputs: dict[int, list[torch.Tensor]] = {}
        while len(outputs) < len(runs):
            for rank, run in enumerate(runs):
                try:
                    next(run)
                except StopIteration as end:
                    outputs.setdefault(rank, end.value)
        return [outputs[rank] for rank in range(len(runs))]
