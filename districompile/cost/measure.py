# SPDX-License-Identifier: Apache-2.0
"""Compile and time the engines of one rank on this machine."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch

from districompile.backends.base import Backend
from districompile.backends.registry import get_backend
from districompile.cost.one_rank import OneRank, random_values
from districompile.cost.timing import captured, median_ms
from districompile.ir.spec import Phase


@torch.no_grad()
def measure_rank(program: Any, phase: Phase, rank: int, backend: str | Backend = "inductor", count: int = 20) -> float:
    """Return the median ms of the engines of ``rank`` in one call of ``phase``, without transfers.

    They run on the GPU of this machine as one CUDA graph; without a GPU on its CPU. ``count``: calls. Raises
    :class:`BackendError` where the backend cannot build them here.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="districompile-") as folder:
        one = OneRank(program, phase, rank, get_backend(backend), device, Path(folder))
        generator = torch.Generator(device).manual_seed(1)
        inputs = {i.value: random_values(i.spec, device, generator) for i in program.plan.inputs}
        return median_ms(captured(functools.partial(one.step, inputs)), count)
