# SPDX-License-Identifier: Apache-2.0
"""The time of a whole picture by its parts: text encoders, steps, sampler, decoding, and the host in between."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from districompile.models.sources import network_name
from districompile.runtime.trace import Span

STEP, SAMPLER, DECODE, HOST = "step", "sampler", "decode", "host"
_PICTURE = 2  # the thread of a rank in a trace, after those of engines and transfers


@dataclasses.dataclass(frozen=True)
class Part:
    """An interval of a picture, in ms since it began. ``kind``: a word of this module, or the name of a network."""

    kind: str
    start: float
    end: float

    @property
    def ms(self) -> float:
        """The duration in ms."""
        return self.end - self.start


class PictureClock:
    """Record when the parts of a pipeline work: ``with clock.record() as parts: pipe(...)``.

    The device is waited for before and after each part, so that a part has its own time. A picture takes a little
    longer for that.
    """

    def __init__(self, pipe: Any, device: torch.device) -> None:
        self._pipe, self._device = pipe, device
        self._began = 0.0
        self._parts: list[Part] = []
        self._inside = 0

    @contextlib.contextmanager
    def record(self) -> Iterator[list[Part]]:
        """Record inside. The list is complete after the block, in the order in which parts began."""
        self._parts, self._inside = [], 0
        network = network_name(self._pipe)
        with contextlib.ExitStack() as stack:
            for name, component in self._pipe.components.items():
                if name == "scheduler" and hasattr(component, "step"):
                    stack.enter_context(self._wrapped(component, "step", SAMPLER))
                elif name in ("vae", "vqvae", "movq") and hasattr(component, "decode"):
                    stack.enter_context(self._wrapped(component, "decode", DECODE))
                elif isinstance(component, nn.Module):
                    stack.enter_context(self._hooked(component, STEP if name == network else name))
            self._began = self._now()
            yield self._parts
            end = self._now()
        self._parts.sort(key=lambda p: p.start)
        self._parts += _gaps(self._parts, end)
        self._parts.sort(key=lambda p: p.start)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() * 1e3 - self._began

    @contextlib.contextmanager
    def part(self, kind: str) -> Iterator[None]:
        """Record what is inside, unless it is inside of another part."""
        self._inside += 1
        outermost = self._inside == 1
        start = self._now() if outermost else 0.0
        try:
            yield
        finally:
            self._inside -= 1
            if outermost:
                self._parts.append(Part(kind, start, self._now()))

    @contextlib.contextmanager
    def _wrapped(self, owner: Any, name: str, kind: str) -> Iterator[None]:
        method: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(method)  # pipelines read its parameters
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(kind):
                return method(*args, **kwargs)

        setattr(owner, name, timed)
        try:
            yield
        finally:
            delattr(owner, name)

    @contextlib.contextmanager
    def _hooked(self, module: nn.Module, kind: str) -> Iterator[None]:
        stack = contextlib.ExitStack()

        def before(*_: Any) -> None:
            stack.enter_context(self.part(kind))

        def after(*_: Any) -> None:
            stack.close()

        hooks = [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
        try:
            yield
        finally:
            stack.close()
            for hook in hooks:
                hook.remove()


def _gaps(parts: Sequence[Part], end: float) -> list[Part]:
    """Return what no part covers, as parts of the host."""
    found, at = [], 0.0
    for part in parts:
        if part.start > at:
            found.append(Part(HOST, at, part.start))
        at = max(at, part.end)
    return [*found, Part(HOST, at, end)] if end > at else found


def totals(parts: Sequence[Part]) -> dict[str, float]:
    """Return the ms of each kind of part, in the order in which the kinds first appear."""
    found: dict[str, float] = {}
    for part in parts:
        found[part.kind] = found.get(part.kind, 0.0) + part.ms
    return found


def chrome_events(
    rank: int, parts: Sequence[Part], calls: Sequence[tuple[str, Sequence[Span]]]
) -> list[dict[str, Any]]:  # fmt: skip
    """Return one rank's picture in Chrome's trace event format: its parts, and what each step did inside.

    ``calls`` are those of :class:`districompile.runtime.trace.Trace`, one for each step.
    """
    threads = {0: "engines", 1: "transfers", _PICTURE: "picture"}
    events: list[dict[str, Any]] = [{"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}}]
    events += [
        {"ph": "M", "pid": rank, "tid": tid, "name": "thread_name", "args": {"name": name}}
        for tid, name in threads.items()
    ]

    def slice_of(tid: int, name: str, start: float, ms: float, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {"ph": "X", "pid": rank, "tid": tid, "name": name, "ts": start * 1e3, "dur": ms * 1e3, "cat": name,
                "args": dict(arguments)}  # fmt: skip

    events += [slice_of(_PICTURE, p.kind, p.start, p.ms, {}) for p in parts]
    steps = [p for p in parts if p.kind == STEP]
    for step, (phase, spans) in zip(steps, calls, strict=False):
        for span in spans:
            tid = 0 if span.lane == "compute" else 1
            events.append(slice_of(tid, f"{span.kind} {span.name}", step.start + span.start, span.ms, {"phase": phase}))
    return events
