"""Times of short GPU work, for choices that are made by measuring."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from districompile.errors import BackendError

_LONG = 1.0  # ms: enough for the clock, and short enough to fall between the work of other processes
_MOST = 100  # calls in one measurement
_ROUNDS = 12
_ROUNDING = 0.04  # relative, of each row: bfloat16 has 8 bits, and some results are sums of what was rounded
_GAIN = 0.98  # of the usual time: less is no difference

_Way = TypeVar("_Way")
_HEARD: list[dict[Any, float]] = []


def fastest(
    what: str, usual: Callable[[], object], others: Mapping[_Way, Callable[[], object]], gain: float = _GAIN,
    reference: Callable[[], object] | None = None, prepare: Callable[[], object] = lambda: None,
) -> _Way | None:  # fmt: skip
    """Which of ``others`` takes the least time on the current GPU, if that is less than ``gain`` of what ``usual``
    takes; else None. One that fails, as a library or a compiler that cannot do this size, is left out with a warning
    that names ``what``; and so is one whose tensors are not those of ``reference`` (by default ``usual``), within
    rounding of 16 bits. What returns None is not compared; ``prepare`` is called before what is."""
    want = (reference or usual)()
    replays: dict[_Way | None, Callable[[], float]] = {None: _replay(usual)}
    for other, call in others.items():
        try:
            prepare()
            if not _alike(call(), want):
                raise BackendError("it computes something else")
            replays[other] = _replay(call)
        except Exception as e:  # neither libraries nor Triton have errors of one kind
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            warnings.warn(f"{what} {other} is not used here: {reason}", stacklevel=3)
    del want
    times: dict[_Way | None, float] = {}
    for _ in range(_ROUNDS):  # in turns, so that what else the GPU does, and its clock, are the same to all
        for way, replay in replays.items():
            times[way] = min(times.get(way, math.inf), replay())
    for heard in _HEARD:
        heard.update(times)
    limit = gain * times.pop(None)
    best = min(times, key=times.__getitem__, default=None)
    return best if best is not None and times[best] < limit else None


def _alike(got: object, want: object) -> bool:
    if isinstance(got, tuple) and isinstance(want, tuple):
        return all(_alike(a, b) for a, b in zip(got, want, strict=True))
    if not isinstance(got, torch.Tensor) or not isinstance(want, torch.Tensor):
        return True
    wide = want.float()
    rows = (got.float() - wide).norm(dim=-1), wide.norm(dim=-1)
    usual = rows[1].square().mean().sqrt()  # of a row: one that is nearly 0 has no relative error
    return bool((rows[0] <= _ROUNDING * rows[1].maximum(usual)).all())  # not where it is no number


@contextlib.contextmanager
def told() -> Iterator[dict[Any, float]]:
    """Collects the times (ms) that :func:`fastest` chooses by inside; of the usual way by None."""
    times: dict[Any, float] = {}
    _HEARD.append(times)
    try:
        yield times
    finally:
        _HEARD.remove(times)


def _replay(call: Callable[[], object]) -> Callable[[], float]:
    """Runs ``call`` some times in a row, and says how long one took."""
    call()  # the first one chooses and loads kernels
    once = _captured(call, 1)
    once.replay()
    count = max(1, min(_MOST, int(_LONG / _elapsed(once.replay))))  # not of the call, which may be the host's time
    graph = _captured(call, count)
    graph.replay()
    return lambda: _elapsed(graph.replay) / count


def _captured(call: Callable[[], object], count: int) -> Any:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    return graph


def _elapsed(call: Callable[[], object]) -> float:
    events: Any = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    events[0].record()
    call()
    events[1].record()
    torch.cuda.synchronize()
    return float(events[0].elapsed_time(events[1]))
