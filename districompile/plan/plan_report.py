# SPDX-License-Identifier: Apache-2.0
"""The report that a plan carries: fallbacks, FLOPs, passes, merged weights, and the search for a quality.

:class:`PlanReport` is data. :class:`districompile.plan.report.Report` shows it to people and scripts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from districompile.errors import BundleError
from districompile.ir.report_builder import Fallback, Flops, QuantisedLayer, ReportBuilder, Reuse, Tokens
from districompile.ir.spec import TensorSpec
from districompile.plan.options import Count, Names, refusal

Number = Annotated[int, Field(ge=0, le=1 << 40)]


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """What one pass did: seconds, nodes before and after, and the operators whose number changed.

    ``text`` is the pass with its options. ``built_in``: it ships with the package. ``exact`` of any other pass says
    whether results may differ in the exact phase, too.
    """

    name: str
    phase: str | None
    exact: bool
    seconds: float
    before: Number
    after: Number
    changed: dict[str, int]
    text: str
    built_in: bool


@dataclasses.dataclass(frozen=True)
class QualityTrial:
    """A candidate of ``--quality-floor``, as text, with the quality of its pictures.

    ``worst_db`` and ``mean_db``: PSNR in dB. ``worst``: the worst picture. ``exact_steps``: the mean of the pictures.
    ``drift``: the largest rate of a displaced step. ``good``: whether the worst picture reached the floor.
    """

    candidate: str
    worst_db: float
    mean_db: float
    worst: str
    exact_steps: float | None
    drift: float | None
    good: bool


@dataclasses.dataclass(frozen=True)
class QualitySearch:
    """The search for options that reach a floor.

    ``floor_db``: the floor as given, such as ``40dB``. ``steps``: those of an image. ``trials``: the cheapest first.
    """

    floor_db: str
    steps: int
    trials: tuple[QualityTrial, ...]


@dataclasses.dataclass(frozen=True)
class PlanReport:
    """The report that a plan carries. Nothing of it changes what is computed.

    ``flops``: None where they were not counted. ``replicated`` names nodes that every rank computes as their rows are
    too few. ``rows`` has the bounds by height of a sharded map, None where some rank would have no row. ``joined`` has,
    by merged weight, the names and rows of its parts: new weights are put together by it. ``quality``: the search of
    ``--quality-floor``. ``tokens``: None where no tokens stand beside the image's. ``reuse``: what
    reused steps keep. ``differences`` maps exchanges of differences to those of the exact phase that send
    the same rows. ``quantised``: the layers that have a form in 8 bits, with the reason of those that stay.
    """

    flops: Flops | None = None
    passes: tuple[PassRecord, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()
    replicated: Names = ()
    rows: dict[str, tuple[Number, ...] | None] = dataclasses.field(default_factory=dict)
    joined: dict[str, tuple[tuple[str, Count], ...]] = dataclasses.field(default_factory=dict)
    quality: QualitySearch | None = None
    tokens: Tokens | None = None
    reuse: Reuse | None = None
    differences: dict[str, str] = dataclasses.field(default_factory=dict)
    quantised: tuple[QuantisedLayer, ...] = ()


def finish_report(found: ReportBuilder, passes: Iterable[PassRecord] = ()) -> PlanReport:
    """Return the report of a plan: what passes found, and the records of the passes that ran."""
    return PlanReport(
        found.flops, tuple(passes), tuple(found.fallbacks), tuple(found.replicated), dict(found.rows),
        dict(found.joined), tokens=found.tokens, reuse=found.reuse, differences=dict(found.differences),
        quantised=found.quantised,
    )  # fmt: skip


def check_report(report: PlanReport, weights: Mapping[str, TensorSpec]) -> None:
    """Raise :class:`BundleError` for a field of another type or range, or for parts of other rows than their weight."""
    try:
        TypeAdapter(PlanReport).validate_json(json.dumps(dataclasses.asdict(report)), strict=True)
    except ValidationError as e:
        raise refusal(e, "report") from None
    for name, parts in report.joined.items():
        spec = weights.get(name)
        if spec is not None and spec.shape[:1] != (sum(rows for _, rows in parts),):
            raise BundleError(f"the plan's report joins {name} of other rows than it has")
