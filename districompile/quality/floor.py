"""Look for the fastest setting whose worst picture is good enough."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from districompile.quality.cases import QualityError
from districompile.quality.measure import Result
from districompile.unit import DISPLACEABLE, DRIFT_LIMIT, GROUPNORM_MODES


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Options of a conversion that decide how good pictures are. ``displace``: the kinds of exchange that use the last
    step's values."""

    groupnorm: str
    warmup_steps: int
    drift_limit: float
    displace: tuple[str, ...]

    @property
    def options(self) -> dict[str, Any]:
        """As :func:`districompile.convert` takes them."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        kinds = "all" if self.displace == DISPLACEABLE else ",".join(self.displace) or "none"
        return (
            f"groupnorm {self.groupnorm}, warmup steps {self.warmup_steps}, drift limit {self.drift_limit:g}, "
            f"displace {kinds}"
        )


@dataclasses.dataclass(frozen=True)
class Trial:
    """A candidate and what its pictures were: PSNR in dB, the worst picture, exact steps of a picture, and the largest
    drift of a displaced step."""

    candidate: Candidate
    worst_db: float
    mean_db: float
    worst: str
    exact_steps: float | None
    drift: float | None
    good: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the plan's report."""
        return {**dataclasses.asdict(self), "candidate": str(self.candidate)}


def parse_floor(text: str) -> float:
    """``"40dB"`` or ``"40"`` as decibels. Raises :class:`QualityError` for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:db)?\s*", text, re.IGNORECASE)
    if found is None or not 0 < float(found[1]) < 100:
        raise QualityError(f"--quality-floor {text}: give decibels between 0 and 100, as 40dB")
    return float(found[1])


def ladder(first: Candidate) -> Iterator[Candidate]:
    """Settings from ``first`` on, cheapest first.

    A norm's mode costs least (``sync`` waits for a few bytes, several times a step); then steps are exact for longer;
    then exchanges are made exact, the small ones first. The last one is exact throughout.
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
    kinds = tuple(k for k in first.displace if k != "norm")
    for gone in (("resize", "other", "conv"), ("resize", "other", "conv", "attention")):
        kinds = tuple(k for k in kinds if k not in gone)
        steps.append(dataclasses.replace(last, displace=kinds))
    for candidate in steps:
        if candidate not in seen:
            seen.add(candidate)
            yield candidate


def search(
    floor: float, candidates: Iterator[Candidate] | Sequence[Candidate], measured: Callable[[Candidate], Result],
    report: Callable[[Trial], None] = lambda _: None,
) -> list[Trial]:  # fmt: skip
    """Measure ``candidates`` until one's worst picture reaches ``floor`` (dB): the last of the trials given back.

    Raises :class:`QualityError` where none does: the exact setting is among them, so the pictures of the cut model
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
