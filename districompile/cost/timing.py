# SPDX-License-Identifier: Apache-2.0
"""Time steps as sampling runs them, one after the other: on a GPU as CUDA graphs, by its own events."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import torch


def median_ms(step: Callable[[], Any], count: int = 20, warm: int = 3) -> float:
    """Return the median time from the end of one ``step`` to the end of the next, by CUDA events on a GPU.

    Steps follow each other, as in sampling, so that the work of the host counts only where the GPU waits for it.
    """
    for _ in range(warm):
        step()
    if not torch.cuda.is_available():
        times = []
        for _ in range(count):
            start = time.perf_counter()
            step()
            times.append((time.perf_counter() - start) * 1e3)
        return float(statistics.median(times))
    torch.cuda.synchronize()
    marks = [cast(Any, torch.cuda.Event)(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return float(statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)))


def captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """Capture ``step`` in a CUDA graph and return its replay; on a CPU return ``step``."""
    if not torch.cuda.is_available():
        return step
    side: Any = cast(Any, torch.cuda.Stream)()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
