# SPDX-License-Identifier: Apache-2.0
"""The unit of compilation: graph, stage, options and analysis results."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, fx

from districompile.errors import ConvertError
from districompile.ir.captured import CapturedModule
from districompile.ir.graph import copy_graph
from districompile.ir.layer_size import Faster
from districompile.ir.report_builder import QuantisedLayer, ReportBuilder
from districompile.ir.spec import Phase

Stage = Literal["global", "spmd", "lowered"]
STAGES: tuple[Stage, ...] = ("global", "spmd", "lowered")
GROUPNORM_MODES = ("forecast", "corrected_async", "sync", "stale", "local")
EXACT_OPTIMISATIONS = ("cse", "fuse-parallel-linears", "hoist-fetches", "in-place-gather", "cache-conditioning")
OPTIMISATIONS = (*EXACT_OPTIMISATIONS, "exchange-before-norm")
DRIFT_LIMIT = 1.0  # see districompile/runtime/calls/drift.py, and docs/quality.md for what it gives
QUANTISATIONS = re.compile(r"none|fp8(:[1-9]\d?)?")  # fp8:40 asks for 40 dB of signal to noise at the output
DISPLACEABLE = ("attention", "conv", "norm", "resize", "other")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a conversion, checked. Raise :class:`ConvertError` for a value that is out of range.

    ``ranks`` counts the ranks that share one image. With ``cfg="split"`` twice as many processes run. ``displace``
    names purposes of transfers, of :data:`DISPLACEABLE`, ``optimise`` passes of :data:`OPTIMISATIONS`. Above the
    rate of change ``drift_limit`` steps are exact (0: no limit). With ``reuse=N``, one in N later steps computes all,
    and the others ``reuse_level`` levels (None: the pass chooses). ``transfer_bits``: 8 sends displaced rows as
    differences of 8 bits. ``quantise`` matches :data:`QUANTISATIONS`. ``timestep`` is the input that differs between
    the steps of a sampler (None: one with a usual name).
    """

    ranks: int
    cfg: str = "none"
    groupnorm: str = GROUPNORM_MODES[0]
    displace: tuple[str, ...] = DISPLACEABLE
    warmup_steps: int = 4
    segments: int = 4
    strict: bool = False
    optimise: tuple[str, ...] = ()
    drift_limit: float = DRIFT_LIMIT
    reuse: int | None = None
    reuse_level: int | None = None
    transfer_bits: int | None = None
    quantise: str = "none"
    timestep: str | None = None

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ConvertError(f"ranks must be at least 1, not {self.ranks}")
        if self.groupnorm not in GROUPNORM_MODES:
            raise ConvertError(f"unknown groupnorm mode {self.groupnorm!r}; there are: {', '.join(GROUPNORM_MODES)}")
        if self.cfg not in ("none", "split"):
            raise ConvertError(f"unknown cfg mode {self.cfg!r}; there are: none, split")
        unknown = [k for k in self.displace if k not in DISPLACEABLE]
        if unknown:
            raise ConvertError(f"cannot displace {unknown[0]!r}; purposes are: {', '.join(DISPLACEABLE)}, or none")
        wrong = [k for k in self.optimise if k not in OPTIMISATIONS]
        if wrong:
            raise ConvertError(f"there is no optimisation {wrong[0]!r}; there are: {', '.join(OPTIMISATIONS)}, or all")
        if self.warmup_steps < 1:
            raise ConvertError("warmup_steps must be at least 1: displaced steps start from an exact one")
        if not 0 <= self.drift_limit < math.inf:
            raise ConvertError(f"drift_limit must be 0 (no limit) or above, not {self.drift_limit}")
        if QUANTISATIONS.fullmatch(self.quantise) is None:
            raise ConvertError(f"there is no quantisation {self.quantise!r}; there are: none, fp8, or fp8:DB as fp8:40")
        if self.segments < 1:
            raise ConvertError(f"segments must be at least 1, not {self.segments}")
        if self.transfer_bits not in (None, 8):
            raise ConvertError(f"transfer_bits must be 8, or left out to send values in full, not {self.transfer_bits}")
        if (self.reuse is not None and self.reuse < 2) or (self.reuse_level is not None and self.reuse_level < 1):
            text = reuse_text(self.reuse, self.reuse_level)
            raise ConvertError(f"reuse {text}: one step in at least 2 is full, and levels count from 1: try deep=2")


def parse_optimise(given: Sequence[str] | str) -> tuple[str, ...]:
    """Read names of optimisations, or one text of them with commas. ``all`` stands for those that change no result."""
    names = given.split(",") if isinstance(given, str) else given
    every = (EXACT_OPTIMISATIONS if name == "all" else (name,) for name in names if name)
    return tuple(dict.fromkeys(itertools.chain.from_iterable(every)))


def parse_reuse(text: str) -> tuple[int | None, int | None]:
    """Read ``deep=N`` or ``deep=N:L`` as (N, L), ``none`` as (None, None). Raise :class:`ConvertError` otherwise."""
    if text == "none":
        return None, None
    found = re.fullmatch(r"deep=(\d{1,6})(?::(\d{1,6}))?", text)
    if found is None:
        raise ConvertError(
            f"reuse {text!r}: give none, or deep=N with a number N of steps of which one is full, such as deep=2, or "
            "deep=2:1 with the number of levels or blocks that every step computes"
        )
    return int(found[1]), None if found[2] is None else int(found[2])


def reuse_text(steps: int | None, level: int | None) -> str:
    """Return what :func:`parse_reuse` reads as ``steps`` and ``level``."""
    if steps is None:
        return "none"
    return f"deep={steps}" + ("" if level is None else f":{level}")


@dataclasses.dataclass
class CompilationUnit:
    """A graph under compilation, with its stage and what analyses found.

    Stages: ``global`` (the captured graph on global tensors), ``spmd`` (one graph for all ranks, with ``fetch`` and
    ``reduce``), ``lowered`` (transfers are ``exchange`` and ``reduce`` nodes that carry their plan).

    ``rows`` maps a placeholder to its sharded dim. ``shardings`` maps a node of the global graph to the
    :class:`~districompile.sharding.value.ShardedValue` that propagation found, or a tuple of them. ``row_counts`` are
    the heights of all sharded maps, tallest first. ``tokens`` maps a replicated value, such as a text's, to the dim in
    which each rank takes its own part of it. ``partitioned`` is what an analysis has propagated for these already
    (:class:`~districompile.sharding.propagate.Propagated`): ``partition`` uses it. ``cut_points`` are fractions of the
    height, 0 to 1, at which rows are divided among the ranks. ``explicit_casts`` states that the operands of every
    ``cat`` agree in dtype, which the verifier checks. ``calibration`` are calls of the module, tensors by placeholder,
    and ``quantised`` the layers in 8 bits where they are known already (None: they are chosen by the calibration).
    ``faster`` tells which layers 8 bits make faster.
    """

    graph: fx.Graph
    stage: Stage
    captured: CapturedModule
    options: Options
    rows: dict[str, int]
    phase: Phase | None = None
    cut_points: tuple[float, ...] = (0.0, 1.0)
    shardings: dict[str, Any] = dataclasses.field(default_factory=dict)
    row_counts: tuple[int, ...] = ()
    tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    partitioned: Any = None
    explicit_casts: bool = False
    calibration: tuple[Mapping[str, Tensor], ...] = ()
    quantised: tuple[QuantisedLayer, ...] | None = None
    faster: Faster | None = None
    report: ReportBuilder = dataclasses.field(default_factory=ReportBuilder)

    def for_phase(self, phase: Phase) -> CompilationUnit:
        """Copy the unit for one phase, with a graph of its own; the report is shared."""
        return dataclasses.replace(self, graph=copy_graph(self.graph), phase=phase)
