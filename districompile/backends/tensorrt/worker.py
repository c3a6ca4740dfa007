# SPDX-License-Identifier: Apache-2.0
"""Build engines in processes of their own: a library allows one logger a process, and times kernels on one GPU."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from districompile.backends.tensorrt.builder import BuildOptions, build_engine
from districompile.backends.tensorrt.library import Library, find_library, present_gpu
from districompile.backends.worker_pool import WorkerPool, answer_jobs
from districompile.cuda.equal_gpus import equal_gpus, seen_alone

_MOST = 8


def default_workers(library: Library) -> int:
    """Choose the number of workers: one for each equal GPU, or where none is needed, one for two cores."""
    if library.ahead_of_time:
        return max(1, min((os.cpu_count() or 1) // 2, _MOST))
    return len(equal_gpus()) if torch.cuda.is_available() else 1


def worker_pool(library: Library, workers: int) -> WorkerPool:
    """Return a pool whose jobs are made by :func:`job`. They have no results."""
    gpus = equal_gpus() if torch.cuda.is_available() and not library.ahead_of_time else []
    return WorkerPool(__name__, workers, environment=lambda i: seen_alone(gpus[i % len(gpus)]) if gpus else {})


def job(
    library: Library, onnx: Path, weights: Path, path: Path, options: BuildOptions, sources: Mapping[str, str]
) -> dict[str, Any]:
    """Describe a build as JSON."""
    cache = options.timing_cache
    return {
        "flavour": library.flavour, "files": [str(onnx), str(weights), str(path)], "sources": dict(sources),
        "options": {**dataclasses.asdict(options), "timing_cache": None if cache is None else str(cache)},
    }  # fmt: skip


def _build(given: Mapping[str, Any]) -> None:
    fields = given["options"]
    cache = fields["timing_cache"]
    options = BuildOptions(
        **{**fields, "targets": tuple(fields["targets"]), "timing_cache": None if cache is None else Path(cache)}
    )
    library = find_library(given["flavour"], present_gpu())
    onnx, weights, path = map(Path, given["files"])
    build_engine(library, onnx, weights, path, options, sources=given["sources"])


if __name__ == "__main__":
    answer_jobs(_build)
