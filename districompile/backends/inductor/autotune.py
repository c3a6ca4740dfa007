# SPDX-License-Identifier: Apache-2.0
"""Time alternative computations on the GPU and select the fastest."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from districompile.errors import BackendError

if TYPE_CHECKING:
    from typing_extensions import Self

_LONG = 1.0  # ms of one measurement: enough for the clock, and short enough to fit between the work of other processes
_MOST = 100  # calls in one measurement, at most
_ROUNDS = 12
_ROUNDING = 0.04  # relative error of a row: bfloat16 has 8 bits, and some results are sums of rounded numbers
_GAIN = 0.97  # of the time of the baseline: a smaller gain may be noise

_Config = TypeVar("_Config", bound=Hashable)
Timings = dict[Hashable, float]
"""Milliseconds by configuration. None is the baseline."""

_RECORDING: ContextVar[Timings | None] = ContextVar("recording", default=None)


class _Event(Protocol):
    def record(self) -> None: ...

    def elapsed_time(self, end: Self, /) -> float: ...


def best_config(
    what: str, baseline: Callable[[], object], configs: Mapping[_Config, Callable[[], object]], gain: float = _GAIN,
    reference: Callable[[], object] | None = None, prepare: Callable[[], object] = lambda: None,
) -> _Config | None:  # fmt: skip
    """Return the fastest of ``configs`` on the current GPU, or None if none takes less than ``gain`` x the baseline.

    A configuration is excluded with a warning, which names ``what``, if its call fails, for example where a library or
    a compiler does not support this size. It is also excluded if its tensors differ from those of ``reference`` (by
    default ``baseline``) by more than rounding to 16 bits. Results that are None are not compared. ``prepare`` is
    called before each call whose result is compared.
    """
    want = (reference or baseline)()
    replays: dict[_Config | None, Callable[[], float]] = {None: _replay(baseline)}
    for candidate, call in configs.items():
        try:
            prepare()
            if not _alike(call(), want):
                raise BackendError("its result is wrong")
            replays[candidate] = _replay(call)
        except Exception as e:  # libraries and Triton raise errors of many classes
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            warnings.warn(f"{what} {candidate} is not used here: {reason}", stacklevel=3)
    del want
    times: dict[_Config | None, float] = {}
    for _ in range(_ROUNDS):  # in turns, so that the clock and other work of the GPU affect all alike
        for config, replay in replays.items():
            times[config] = min(times.get(config, math.inf), replay())
    recording = _RECORDING.get()
    if recording is not None:
        for key, ms in times.items():
            recording[key] = ms
    limit = gain * times.pop(None)
    best = min(times, key=times.__getitem__, default=None)
    return best if best is not None and times[best] < limit else None


def _alike(got: object, want: object) -> bool:
    if isinstance(got, tuple) and isinstance(want, tuple):
        return all(_alike(a, b) for a, b in zip(got, want, strict=True))
    if not isinstance(got, torch.Tensor) or not isinstance(want, torch.Tensor):
        return True
    wide = want.float()
    error, size = (got.float() - wide).norm(dim=-1), wide.norm(dim=-1)
    typical = size.square().mean().sqrt()  # a row that is nearly 0 has no relative error
    return bool((error <= _ROUNDING * size.maximum(typical)).all())  # False where an error is NaN


@contextlib.contextmanager
def recorded_timings() -> Iterator[Timings]:
    """Record the timings (ms) that :func:`best_config` compares inside this context; key None is the baseline."""
    times: Timings = {}
    token = _RECORDING.set(times)
    try:
        yield times
    finally:
        _RECORDING.reset(token)


def _replay(call: Callable[[], object]) -> Callable[[], float]:
    """Capture ``call`` some times in a row; return a function that measures the milliseconds of one."""
    call()  # the first call selects and loads kernels
    once = _captured(call, 1)
    once.replay()
    count = max(
        1, min(_MOST, int(_LONG / _elapsed(once.replay)))
    )  # of the replay: the call itself may wait for the host
    graph = _captured(call, count)
    graph.replay()
    return lambda: _elapsed(graph.replay) / count


def _captured(call: Callable[[], object], count: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    return graph


def _elapsed(call: Callable[[], object]) -> float:
    make: Callable[..., _Event] = torch.cuda.Event  # PyTorch declares no types for its methods
    begin, end = make(enable_timing=True), make(enable_timing=True)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)
