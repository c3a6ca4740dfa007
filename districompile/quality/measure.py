# SPDX-License-Identifier: Apache-2.0
"""Compute one set of pictures in several ways, and compare each with one device."""

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
from districompile.errors import ConvertError
from districompile.ir.unit import GROUPNORM_MODES, QUANTISATIONS, parse_reuse
from districompile.plan.plan import ExecutionPlan
from districompile.progress import Progress
from districompile.quality import metrics
from districompile.quality.cases import Case, QualityError
from districompile.quality.draw import Drawn, Setting, draw
from districompile.quality.reference import ReferenceBackend
from districompile.runtime.load import load
from districompile.runtime.module import DistributedModule

REFERENCE = "reference"
EXACT = "exact"
MODES = (*GROUPNORM_MODES, REFERENCE, EXACT)


@dataclasses.dataclass(frozen=True)
class Score:
    """One picture against the same of one device.

    ``psnr``: in dB. ``drift``: the relative error of the latents by step. ``exact``: the number of exact steps.
    ``rate``: the largest rate of a displaced step. ``finite``: whether all pixels are finite.
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
    """The scores of all pictures of one way of computing."""

    way: str
    ranks: int
    scores: tuple[Score, ...]
    seconds: float

    @property
    def mean(self) -> float:
        """The mean PSNR in dB."""
        return statistics.fmean(s.psnr for s in self.scores)

    @property
    def worst(self) -> Score:
        """The picture with the lowest PSNR. A picture that is not finite counts as worse than all others."""
        return min(self.scores, key=lambda s: (s.finite, s.psnr))

    @property
    def drift(self) -> float | None:
        """The largest rate of a displaced step (:mod:`districompile.runtime.calls.drift`)."""
        return max((s.rate for s in self.scores if s.rate is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
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
    """One way of computing.

    Either ``module`` opens the module that draws, as a context manager, or ``pictures`` draws: for ranks that run in
    processes of their own.
    """

    name: str
    ranks: int
    module: Callable[[], contextlib.AbstractContextManager[Any]] | None = None
    pictures: Callable[[Sequence[Case], Setting], Drawn] | None = None


@dataclasses.dataclass(frozen=True)
class Measured:
    """The pictures of one device (``expected``), and each way's result and pictures, in the order of the cases."""

    cases: tuple[Case, ...]
    expected: Drawn
    results: tuple[Result, ...]
    drawn: tuple[Drawn, ...]


def measure(
    pipe: Any, original: Any | Drawn, ways: Sequence[Way], cases: Sequence[Case], setting: Setting,
    borders: Sequence[float], progress: Progress,
) -> Measured:  # fmt: skip
    """Draw all ``cases`` with ``original`` and in all ``ways``, and compare.

    ``original`` may also be the pictures that it has drawn already. ``borders``: where patches meet, as shares of the
    height between 0 and 1.
    """
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
    """Compare every picture with the same picture of one device."""
    finite = [bool(p.isfinite().all()) for p in drawn.pixels]
    pixels = drawn.pixels.nan_to_num(0.0, 1.0, 0.0)  # NaN is black, as in an image file
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


def borders_of(plan: ExecutionPlan) -> list[float]:
    """Return where patches meet, as shares of the image's height."""
    heights = [int(n) for n in plan.bounds]
    if not heights:
        return []
    tallest = max(heights)
    return sorted({b / tallest for b in plan.bounds[str(tallest)][1:-1]})


@contextlib.contextmanager
def converted(
    module: torch.nn.Module, example: Any, ranks: int, device: torch.device, **options: Any
) -> Iterator[DistributedModule]:
    """Convert ``module`` for ``ranks`` ranks that run in this process, operator by operator. A context manager.

    ``options`` are those of :func:`districompile.convert`. ``groupnorm`` may also be ``"reference"``, the formulas of
    the paper's code.
    """
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


BITS = "8bit"


def options_of(mode: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return ``options`` of :func:`districompile.convert` with those that a mode names.

    A mode is one of :data:`MODES` (``exact`` displaces nothing), ``deep=N`` or ``deep=N:L`` (reuse), ``8bit``
    (differences), ``fp8``, ``fp8:DB`` or ``float`` (the bits of layers), or several of these joined by ``+``, such as
    ``sync+deep=2``. Without bits, those of ``options`` hold. Raises :class:`QualityError` for anything else.
    """
    chosen = {**(options or {}), "groupnorm": GROUPNORM_MODES[0], "reuse": "none", "transfer_bits": None}
    for part in mode.split("+"):
        if part == EXACT:
            chosen["displace"] = "none"
        elif part in MODES:
            chosen["groupnorm"] = part
        elif part == BITS:
            chosen["transfer_bits"] = 8
        elif part.startswith("deep="):
            chosen["reuse"] = part
        elif part == "float" or (part != "none" and QUANTISATIONS.fullmatch(part)):
            chosen["quantise"] = "none" if part == "float" else part
        else:
            known = f"{', '.join(MODES)}, deep=N, {BITS}, fp8, float"
            raise QualityError(f"--modes: there is no mode {part!r}; there are: {known}")
    try:
        parse_reuse(chosen["reuse"])
    except ConvertError as e:
        raise QualityError(f"--modes: {e}") from None
    return chosen


def check_modes(modes: Sequence[str]) -> None:
    """Raise :class:`QualityError` for a mode that does not exist."""
    for mode in modes:
        options_of(mode)


def way_of(
    mode: str, module: torch.nn.Module, example: Any, ranks: int, device: torch.device, options: Mapping[str, Any]
) -> Way:
    """Make a way of computing from a mode (:func:`options_of`) and other ``options``. All ranks run in this process."""
    chosen = options_of(mode, options)
    return Way(mode, ranks, lambda: converted(module, example, ranks, device, **chosen))
