# SPDX-License-Identifier: Apache-2.0
"""Search for the cheapest conversion options whose worst picture reaches a floor."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from districompile.ir.unit import DISPLACEABLE, DRIFT_LIMIT, GROUPNORM_MODES
from districompile.plan.plan_report import QualityTrial
from districompile.quality.cases import QualityError
from districompile.quality.measure import Result

REUSE = ("deep=3", "deep=2")  # what --reuse auto tries, the cheapest first


@dataclasses.dataclass(frozen=True)
class Candidate:
    """The options of a conversion that decide how good pictures are.

    ``displace``: the purposes of the exchanges that use the values of the last step. ``reuse`` as ``--reuse`` takes it.
    ``quantise``: the bits of layers.
    """

    groupnorm: str
    warmup_steps: int
    drift_limit: float
    displace: tuple[str, ...]
    reuse: str = "none"
    quantise: str = "none"

    @property
    def options(self) -> dict[str, Any]:
        """The options as keyword arguments of :func:`districompile.convert`."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        purposes = "all" if self.displace == DISPLACEABLE else ",".join(self.displace) or "none"
        return (
            f"groupnorm {self.groupnorm}, warmup steps {self.warmup_steps}, drift limit {self.drift_limit:g}, "
            f"displace {purposes}"
            + ("" if self.reuse == "none" else f", reuse {self.reuse}")
            + ("" if self.quantise == "none" else f", {self.quantise}")
        )


@dataclasses.dataclass(frozen=True)
class Trial:
    """A candidate with the quality of its pictures.

    ``worst_db`` and ``mean_db``: PSNR in dB. ``worst``: the worst picture. ``exact_steps``: the mean of the pictures.
    ``drift``: the largest rate of a displaced step. ``good``: whether the worst picture reached the floor.
    """

    candidate: Candidate
    worst_db: float
    mean_db: float
    worst: str
    exact_steps: float | None
    drift: float | None
    good: bool

    def record(self) -> QualityTrial:
        """Return the trial for the plan's report, with the candidate as text."""
        return QualityTrial(
            str(self.candidate), self.worst_db, self.mean_db, self.worst, self.exact_steps, self.drift, self.good
        )


def parse_floor(text: str) -> float:
    """Read ``"40dB"`` or ``"40"`` as decibels. Raises :class:`QualityError` for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:db)?\s*", text, re.IGNORECASE)
    if found is None or not 0 < float(found[1]) < 100:
        raise QualityError(f"--quality-floor {text}: give decibels between 0 and 100, as 40dB")
    return float(found[1])


def reusing(first: Candidate, reuse: Sequence[str] = REUSE, bits: Sequence[str] = ()) -> Iterator[Candidate]:
    """List the candidates of :func:`ladder`, those that reuse before them: each of ``reuse``, the cheapest first.

    Each is tried with each of ``bits``, as it is and with half of the drift limit: more steps are full then.
    """
    for text in reuse:
        for limit in (first.drift_limit, (first.drift_limit or DRIFT_LIMIT) / 2):
            for quantise in bits or (first.quantise,):
                yield dataclasses.replace(first, reuse=text, drift_limit=limit, quantise=quantise)
    yield from ladder(dataclasses.replace(first, reuse="none"), bits)


def ladder(first: Candidate, bits: Sequence[str] = ()) -> Iterator[Candidate]:
    """List candidates from ``first`` on, the cheapest first. All of them reuse as ``first`` does.

    Other group norm modes cost least: ``sync`` waits for a few bytes, several times a step. Lower drift limits follow:
    more steps are exact. Then exchanges are made exact by purpose, those with few bytes first. The last candidate is
    exact throughout. Each setting is listed with each of ``bits``, if there are any.
    """
    modes = [m for m in (GROUPNORM_MODES[0], "sync") if m != first.groupnorm]
    limits = [DRIFT_LIMIT / 2, DRIFT_LIMIT / 4] if not first.drift_limit else [first.drift_limit / k for k in (2, 4)]
    seen: set[Candidate] = set()
    steps: list[Candidate] = [first]
    steps += [dataclasses.replace(first, groupnorm=m) for m in modes]
    if not first.drift_limit:
        steps += [dataclasses.replace(first, groupnorm=GROUPNORM_MODES[0], drift_limit=DRIFT_LIMIT)]
    strict = dataclasses.replace(first, groupnorm="sync")
    steps += [dataclasses.replace(strict, drift_limit=limit) for limit in limits]
    last = dataclasses.replace(strict, drift_limit=limits[-1])
    purposes = tuple(k for k in first.displace if k != "norm")
    for gone in (("resize", "other", "conv"), ("resize", "other", "conv", "attention")):
        purposes = tuple(k for k in purposes if k not in gone)
        steps.append(dataclasses.replace(last, displace=purposes))
    for candidate in [dataclasses.replace(s, quantise=b) for s in steps for b in bits or (first.quantise,)]:
        if candidate not in seen:
            seen.add(candidate)
            yield candidate


def search(
    floor: float, candidates: Iterator[Candidate] | Sequence[Candidate], measured: Callable[[Candidate], Result],
    report: Callable[[Trial], None] = lambda _: None,
) -> list[Trial]:  # fmt: skip
    """Measure ``candidates`` until the worst picture of one reaches ``floor`` (dB). That one is the last of the result.

    Raises :class:`QualityError` where no candidate reaches it. The last candidate is exact, so that the pictures then
    differ for another reason.
    """
    trials: list[Trial] = []
    for candidate in candidates:
        result = measured(candidate)
        data, worst = result.to_dict(), result.worst
        good = worst.finite and worst.psnr >= floor
        trials.append(
            Trial(candidate, worst.psnr, result.mean, str(worst.case), data["exact_steps"], result.drift, good)
        )
        report(trials[-1])
        if good:
            return trials
    best = max(trials, key=lambda t: t.worst_db)
    raise QualityError(
        f"no setting reaches {floor:g} dB: the best was {best.candidate}, {best.worst_db:.1f} dB for {best.worst}; "
        "choose a lower --quality-floor, or compare calls with districompile verify"
    )
