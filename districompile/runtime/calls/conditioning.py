# SPDX-License-Identifier: Apache-2.0
"""Check that inputs which the displaced phase takes for constant have not changed since the last exact call."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence

import torch

from districompile.runtime.calls.call_tracker import Decision
from districompile.runtime.calls.evidence import Seen

_OFTEN = 3  # consecutive changes before a warning


class Conditioning:
    """Track the inputs ``paths`` through the calls of a module. Each stream of calls has its own last exact call."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = tuple(paths)
        self._seen: dict[int, dict[str, Seen]] = {}
        self._changes = 0

    def reset(self) -> None:
        """Forget earlier calls."""
        self._seen.clear()

    def check(self, decision: Decision, given: Mapping[str, torch.Tensor]) -> Decision:
        """Return ``decision``, with the exact phase instead of a later one if an input has changed."""
        if not self._paths:
            return decision
        if decision.reset:
            self.reset()
        seen = self._seen.get(decision.stream, {})
        changed = [p for p in self._paths if p in seen and not seen[p].is_still(given[p])]
        if decision.phase != "exact" and seen:
            self._changes = self._changes + 1 if changed else 0
            if changed:
                decision = dataclasses.replace(decision, phase="exact")
            if self._changes == _OFTEN:
                warnings.warn(
                    f"{changed[0]} changes from step to step, so that each is computed exactly: convert without the "
                    "optimisation cache-conditioning",
                    stacklevel=2,
                )
        if decision.phase == "exact" and (changed or not seen):
            self._seen[decision.stream] = {p: Seen.of(given[p]) for p in self._paths}
        return decision
