"""Several ways of computing one set of pictures, each against one device, in one run."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from districompile import api
from districompile.backends.base import Backend
from districompile.backends.eager import EagerBackend
from districompile.ir.plan import Plan
from districompile.progress import Progress
from districompile.quality import metrics
from districompile.quality.cases import Case, QualityError
from districompile.quality.draw import Drawn, Setting, draw
from districompile.quality.reference import ReferenceBackend
from districompile.runtime.module import DistributedModule, load
from districompile.unit import GROUPNORM_MODES

REFERENCE = "reference"
MODES = (*GROUPNORM_MODES, REFERENCE)


@dataclasses.dataclass(frozen=True)
class Score:
    """One picture against the same of one device.

    ``psnr`` in dB; ``drift``: relative error of the latents by step; ``exact``: how many of its steps were exact;
    ``rate``: the largest drift of the others; ``finite``: whether it holds numbers alone, not NaN.
    """

    case: Case
    psnr: float
    ssim: float | None
    lpips: float | None
    seam: float
    drift: tuple[float, ...]
    exact: int | None
    rate: float | None
    finite: bool


@dataclasses.dataclass(frozen=True)
class Result:
    """All pictures of one way of computing."""

    way: str
    ranks: int
    scores: tuple[Score, ...]
    seconds: float

    @property
    def mean(self) -> float:
        """PSNR in dB."""
        return statistics.fmean(s.psnr for s in self.scores)

    @property
    def worst(self) -> Score:
        """The picture with the lowest PSNR; one that is not finite before all others."""
        return min(self.scores, key=lambda s: (s.finite, s.psnr))

    @property
    def drift(self) -> float | None:
        """The largest rate of change during a displaced step (:mod:`districompile.runtime.drift`)."""
        return max((s.rate for s in self.scores if s.rate is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        exact = [s.exact for s in self.scores if s.exact is not None]
        means = {
            name: statistics.fmean(values) if values else None
            for name in ("ssim", "lpips", "seam")
            for values in [[getattr(s, name) for s in self.scores if getattr(s, name) is not None]]
        }
        worst = self.worst
        return {
            "way": self.way,
            "ranks": self.ranks,
            "pictures": len(self.scores),
            "psnr_db": {"mean": self.mean, "worst": worst.psnr},
            "worst": {"prompt": worst.case.prompt, "seed": worst.case.seed},
            **means,
            "not_finite": sum(not s.finite for s in self.scores),
            "exact_steps": statistics.fmean(exact) if exact else None,
            "drift_by_step": [statistics.fmean(v) for v in zip(*(s.drift for s in self.scores), strict=True)],
            "seconds": round(self.seconds, 2),
            "scores": [dataclasses.asdict(s) for s in self.scores],
        }


@dataclasses.dataclass(frozen=True)
class Way:
    """One way of computing: its name, its number of ranks, and how to get its module (closed on leaving) or, for ranks
    in processes of their own, its pictures."""

    name: str
    ranks: int
    module: Callable[[], contextlib.AbstractContextManager[Any]] | None = None
    pictures: Callable[[Sequence[Case], Setting], Drawn] | None = None


@dataclasses.dataclass(frozen=True)
class Measured:
    """``expected`` of one device, and for each way its result and its pictures, in the order of the cases."""

    cases: tuple[Case, ...]
    expected: Drawn
    results: tuple[Result, ...]
    drawn: tuple[Drawn, ...]


def measure(
    pipe: Any, original: Any | Drawn, ways: Sequence[Way], cases: Sequence[Case], setting: Setting,
    borders: Sequence[float], progress: Progress,
) -> Measured:  # fmt: skip
    """Draw all ``cases`` with ``original`` (or take what it has drawn already) and in all ``ways``, and compare.
    ``borders`` of patches are shares of the height, between 0 and 1."""
    total = len(cases) * setting.steps / setting.images
    if isinstance(original, Drawn):
        expected = original
    else:
        with progress.task("one device", total) as task:
            expected = draw(pipe, original, cases, setting, task)
    results, pictures = [], []
    for way in ways:
        started = time.perf_counter()
        with progress.task(f"{way.name}, {way.ranks} ranks", total) as task:
            if way.pictures is not None:
                drawn = way.pictures(cases, setting)
            else:
                assert way.module is not None
                with way.module() as module:
                    drawn = draw(pipe, module, cases, setting, task)
        seconds = time.perf_counter() - started
        results.append(Result(way.name, way.ranks, compare(cases, drawn, expected, borders), seconds))
        pictures.append(drawn)
    return Measured(tuple(cases), expected, tuple(results), tuple(pictures))


def compare(cases: Sequence[Case], drawn: Drawn, expected: Drawn, borders: Sequence[float]) -> tuple[Score, ...]:
    """Every picture against the same of one device."""
    finite = [bool(p.isfinite().all()) for p in drawn.pixels]
    pixels = drawn.pixels.nan_to_num(0.0, 1.0, 0.0)  # black, as such a picture is written
    rows = [round(b * pixels.shape[-2]) for b in borders]
    none: list[None] = [None] * len(cases)
    steps: list[list[float]] = [[] for _ in cases]
    if drawn.latents is not None and expected.latents is not None:
        steps = metrics.drift(drawn.latents, expected.latents)
    columns = (
        metrics.psnr(pixels, expected.pixels),
        metrics.ssim(pixels, expected.pixels) or none,
        metrics.lpips(pixels, expected.pixels) or none,
        metrics.seams(pixels, expected.pixels, rows),
        [tuple(s) for s in steps],
        drawn.exact or none,
        drawn.rates or none,
        finite,
    )
    return tuple(Score(case, *values) for case, *values in zip(cases, *columns, strict=True))


def borders_of(plan: Plan) -> list[float]:
    """Where patches meet, as shares of the image's height."""
    heights = [int(n) for n in plan.bounds]
    if not heights:
        return []
    tallest = max(heights)
    return sorted({b / tallest for b in plan.bounds[str(tallest)][1:-1]})


@contextlib.contextmanager
def converted(
    module: torch.nn.Module, example: Any, ranks: int, device: torch.device, **options: Any
) -> Iterator[DistributedModule]:
    """``module`` converted for ``ranks`` ranks that run in this process, operator by operator. ``options`` are those of
    :func:`districompile.convert`; ``groupnorm`` may be ``"reference"``, the formulas of the paper's code."""
    backend: Backend = EagerBackend()
    if options.get("groupnorm") == REFERENCE:
        options, backend = {**options, "groupnorm": "corrected_async"}, ReferenceBackend()
    program = api.convert(module, example.args, example.kwargs, ranks=ranks, rows=example.rows, **options)
    with tempfile.TemporaryDirectory(prefix="districompile-quality-") as scratch:
        program.save(f"{scratch}/bundle", backend)
        loaded = load(f"{scratch}/bundle", lockstep=True, device=device, verify="quick", backend=backend)
        try:
            yield loaded
        finally:
            loaded.close()


def check_modes(modes: Sequence[str]) -> None:
    """Raise :class:`QualityError` for a mode that there is not."""
    unknown = [m for m in modes if m not in MODES]
    if unknown:
        raise QualityError(f"--modes: there is no mode {unknown[0]!r}; there are: {', '.join(MODES)}")


def way_of(
    mode: str, module: torch.nn.Module, example: Any, ranks: int, device: torch.device, options: Mapping[str, Any]
) -> Way:
    """A group norm mode, converted with the other ``options``, on all ranks in this process."""
    chosen = {**options, "groupnorm": mode}
    return Way(mode, ranks, lambda: converted(module, example, ranks, device, **chosen))
