"""Inductor's heuristics, where ours differ. Imports Inductor, which takes seconds: for processes that compile."""

from __future__ import annotations

from typing import Any

from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

_ROW = 2048


class Choices(InductorChoices):
    """Layer norms of up to 2048 channels keep a row while they reduce it; by default, rows of more than 1024 are read
    twice, in pieces."""

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
            return True
        inner = features.get_reduction_hint() == ReductionHint.INNER and not cooperative_reduction
        return inner and bool(V.graph.sizevars.statically_known_leq(features.reduction_numel, _ROW))
