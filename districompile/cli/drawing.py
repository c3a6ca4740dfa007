# SPDX-License-Identifier: Apache-2.0
"""What the process that ``run`` starts in tells its ranks, and what they answer. Nothing here imports PyTorch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from districompile.cli.pictures import Targets
from districompile.quality.cases import Case


@dataclasses.dataclass(frozen=True)
class Job:
    """The work of every rank.

    ``columns``: pictures in a row of the grid. ``vae``: what ``--vae`` says, with the whole path. ``size`` and
    ``shape`` choose a shape of the bundle; ``grows``: a size that it does not have is added. ``record``: facts for the
    files.
    """

    bundle: Path
    model: str
    cases: tuple[Case, ...]
    targets: Targets
    columns: int
    vae: str | None
    negative_prompt: str | None
    steps: int
    guidance: float | None
    scheduler: str | None
    loras: tuple[tuple[Path, float], ...]
    image: Path | None
    mask: Path | None
    strength: float | None
    controls: tuple[tuple[Path, float], ...]
    preview_every: int | None
    size: str | None
    shape: str | None
    grows: bool
    transport: str
    cuda_graph: bool
    device: str | None
    native_code: bool
    timeout: float
    extensions: tuple[str, ...]
    record: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Refused:
    """The ranks cannot do the job. They found out before the work, all alike."""

    message: str


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One call of the pipeline: its files, and the figures of its steps."""

    cases: tuple[Case, ...]
    files: tuple[Path, ...]
    seconds: float
    it_per_s: float
    calls: dict[str, int]
    drift: float | None
    not_finite: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Report:
    """What rank 0 answers: all calls of the pipeline, notes and warnings for the user."""

    drawn: tuple[Drawn, ...]
    transport: str
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
