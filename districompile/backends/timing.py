"""Times of short GPU work, for choices that are made by measuring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LONG = 5.0  # ms: enough for the clock
_MOST = 20


def milliseconds(call: Callable[[], object]) -> float:
    """How long ``call`` takes on the current GPU: the least of some times, in a CUDA graph, as the host takes longer to
    launch short kernels than they run."""
    call()  # the first one chooses and loads kernels
    count = max(1, min(_MOST, int(_LONG / _elapsed(call))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    graph.replay()
    return min(_elapsed(graph.replay) for _ in range(4)) / count


def _elapsed(call: Callable[[], object]) -> float:
    events: Any = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    events[0].record()
    call()
    events[1].record()
    torch.cuda.synchronize()
    return float(events[0].elapsed_time(events[1]))
