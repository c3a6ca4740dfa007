# SPDX-License-Identifier: Apache-2.0
"""The engines of one rank, and the memory of their outputs, as far as engines decide it."""

from __future__ import annotations

from collections.abc import Mapping

from districompile.backends.base import Engine
from districompile.plan.plan import ExecutionPlan, Run
from districompile.runtime.executor.memory import MemoryPlan

Engines = Mapping[str, Mapping[str, Engine]]
"""Engines of one rank by phase and segment."""


def aliased_values(plan: ExecutionPlan, engines: Engines) -> dict[str, set[str]]:
    """Return the values that engines leave in their own inputs, by phase. They need no memory in the arena."""
    return {
        phase: {n for s in p.segments.values() for n in s.outputs if n in engines[phase][s.name].aliased_outputs}
        for phase, p in plan.phases.items()
    }


def scratch_bytes(engines: Engines) -> int:
    """Return the size of the scratch memory that the engines of a rank share."""
    return max((e.scratch_bytes for by_segment in engines.values() for e in by_segment.values()), default=0)


def private_strides(
    plan: ExecutionPlan, phase: str, engines: Engines, memory: MemoryPlan
) -> dict[str, tuple[int, ...]]:
    """Return the strides of values that only engines read: dense, in the order of dims that their engine expects."""
    schedule, places = plan.phases[phase], memory.phases[phase]
    seen = {c.source for c in plan.collectives.values()} | {*schedule.outputs, *places.states}
    seen |= {v for s in schedule.steps if not isinstance(s, Run) for v in s.reads(schedule, plan.collectives)}
    found: dict[str, tuple[int, ...]] = {}
    for segment in schedule.segments.values():
        strides = engines[phase][segment.name].strides
        found |= {v: strides[v] for v in segment.outputs if v in strides and v not in seen}
    return {v: s for v, s in found.items() if v in places.offsets}
