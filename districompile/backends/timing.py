"""Times of short GPU work, for choices that are made by measuring."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

_LONG = 5.0  # ms: enough for the clock
_MOST = 20
_GAIN = 0.98  # of the usual time: less is no difference

_Way = TypeVar("_Way")


def fastest(
    what: str, usual: Callable[[], object], others: Mapping[_Way, Callable[[], object]], gain: float = _GAIN
) -> _Way | None:
    """Which of ``others`` takes the least time on the current GPU, if that is less than ``gain`` of what ``usual``
    takes; else None. One that fails, as a library or a compiler that cannot do this size, is left out with a warning
    that names ``what``."""
    limit = gain * milliseconds(usual)
    times = {way: _time_of(what, call) for way, call in others.items()}
    best = min(times, key=times.__getitem__, default=None)
    return best if best is not None and times[best] < limit else None


def _time_of(what: str, call: Callable[[], object]) -> float:
    try:
        return milliseconds(call)
    except Exception as e:  # neither libraries nor Triton have errors of one kind
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        warnings.warn(f"{what} is not used here: {reason}", stacklevel=4)
        return math.inf


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
