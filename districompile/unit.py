"""What passes work on: a graph with its stage, the options of the conversion, and what is known about the image's
rows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from torch import fx

from districompile.capture import Captured
from districompile.errors import ConvertError
from districompile.ir.plan import Phase

Stage = Literal["whole", "local", "lowered"]
GROUPNORM_MODES = ("forecast", "corrected_async", "sync", "stale", "local")
OPTIMISATIONS = ("share-subexpressions", "merge-linears", "hoist-fetches", "leave-room", "hoist-conditioning")
DRIFT_LIMIT = 1.0  # see districompile/runtime/drift.py, and docs/quality.md for what it gives
DISPLACEABLE = ("attention", "conv", "norm", "resize", "other")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user chose. ``ranks`` counts the mesh's patch axis; with ``cfg="split"`` twice as many processes run."""

    ranks: int
    cfg: str = "none"
    groupnorm: str = GROUPNORM_MODES[0]
    displace: tuple[str, ...] = DISPLACEABLE
    warmup_steps: int = 4
    segments: int = 4
    strict: bool = False
    optimise: tuple[str, ...] = ()  # of OPTIMISATIONS
    drift_limit: float = DRIFT_LIMIT  # above this rate of change steps are exact; 0: no limit

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ConvertError(f"ranks must be at least 1, not {self.ranks}")
        if self.groupnorm not in GROUPNORM_MODES:
            raise ConvertError(f"unknown groupnorm mode {self.groupnorm!r}; there are: {', '.join(GROUPNORM_MODES)}")
        if self.cfg not in ("none", "split"):
            raise ConvertError(f"unknown cfg mode {self.cfg!r}; there are: none, split")
        unknown = [k for k in self.displace if k not in DISPLACEABLE]
        if unknown:
            raise ConvertError(f"cannot displace {unknown[0]!r}; kinds of site are: {', '.join(DISPLACEABLE)}, or none")
        wrong = [k for k in self.optimise if k not in OPTIMISATIONS]
        if wrong:
            raise ConvertError(f"there is no optimisation {wrong[0]!r}; there are: {', '.join(OPTIMISATIONS)}, or all")
        if self.warmup_steps < 1:
            raise ConvertError("warmup_steps must be at least 1: displaced steps start from an exact one")
        if not 0 <= self.drift_limit < math.inf:
            raise ConvertError(f"drift_limit must be 0 (no limit) or above, not {self.drift_limit}")
        if self.segments < 1:
            raise ConvertError(f"segments must be at least 1, not {self.segments}")


@dataclasses.dataclass
class Unit:
    """A graph under compilation. Stages: ``whole`` (the captured graph), ``local`` (one SPMD graph with ``fetch`` and
    ``reduce``), ``lowered`` (transfers are ``exchange`` and ``reduce`` nodes that carry their plan)."""

    graph: fx.Graph
    stage: Stage
    captured: Captured
    options: Options
    rows: dict[str, int]  # placeholder -> the dim that is cut
    phase: Phase | None = None
    fractions: tuple[float, ...] = (0.0, 1.0)
    annotation: dict[str, Any] = dataclasses.field(default_factory=dict)
    row_counts: tuple[int, ...] = ()
    report: dict[str, Any] = dataclasses.field(default_factory=dict)

    def for_phase(self, phase: Phase) -> Unit:
        """A copy with a graph of its own, nodes keeping their names and meta."""
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            if node.op == "output":
                graph.output(fx.map_arg(node.args[0], lambda n: env[n]))
            else:
                env[node] = graph.node_copy(node, lambda n: env[n])
                assert env[node].name == node.name
        return dataclasses.replace(self, graph=graph, phase=phase, report=self.report)
