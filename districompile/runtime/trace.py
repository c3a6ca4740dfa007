"""What a call spent its time on: runs of engines, transfers, and waiting for them.

Times are those of the device: CUDA events around what is queued on a stream (inside a captured graph, too), or the
host's clock on the CPU. A transfer is *exposed* as far as the compute stream made it or waited for it, else *hidden*.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from districompile.outputs import write_file

Kind = Literal["run", "post", "wait", "join"]


@dataclasses.dataclass(frozen=True)
class Span:
    """``kind`` "run", "post" (the transfer itself), "wait" or "join" (the compute stream waits); milliseconds since the
    call began. ``nbytes``: what a post sent."""

    kind: str
    name: str
    lane: str
    start: float
    end: float
    nbytes: int = 0

    @property
    def ms(self) -> float:
        return self.end - self.start


class Spans:
    """Records the spans of one call. With ``cuda`` they are events on the current stream of whoever records; those
    that are captured into a graph are read after its replay."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._began = self._mark()
        self._open: list[tuple[str, str, str, int, Any, Any]] = []

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        # External: recorded anew at each replay of a graph, and readable from outside
        captured = torch.cuda.is_current_stream_capturing()
        event = torch.cuda.Event(enable_timing=True, external=captured)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def begin(self) -> None:
        """The call begins here."""
        self._began = self._mark()

    @contextlib.contextmanager
    def span(self, kind: str, name: str, lane: str, nbytes: int = 0) -> Iterator[None]:
        start = self._mark()
        yield
        self._open.append((kind, name, lane, nbytes, start, self._mark()))

    def read(self) -> list[Span]:
        """The spans so far, by start. Waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()

        def since(mark: Any) -> float:
            return float(self._began.elapsed_time(mark)) if self._cuda else (mark - self._began) * 1e3

        spans = [Span(k, n, lane, since(a), since(b), size) for k, n, lane, size, a, b in self._open]
        return sorted(spans, key=lambda s: s.start)


@dataclasses.dataclass
class Trace:
    """The spans of the calls that were traced on one rank."""

    rank: int
    calls: list[tuple[str, list[Span]]] = dataclasses.field(default_factory=list)  # phase, spans

    def summary(self) -> list[dict[str, Any]]:
        """For each call: its phase, milliseconds computing, transferring and waiting, and how much of the transfers was
        exposed and hidden; bytes sent."""
        rows = []
        for phase, spans in self.calls:
            transfer = _covered((s.start, s.end) for s in spans if s.kind == "post")
            exposed = sum(s.ms for s in spans if s.kind != "run" and s.lane == "compute")
            rows.append({
                "phase": phase,
                "total_ms": round(max((s.end for s in spans), default=0.0), 4),
                "run_ms": round(sum(s.ms for s in spans if s.kind == "run"), 4),
                "transfer_ms": round(transfer, 4),
                "exposed_ms": round(exposed, 4),
                "hidden_ms": round(max(0.0, transfer - exposed), 4),
                "sent_bytes": sum(s.nbytes for s in spans if s.kind == "post"),
            })  # fmt: skip
        return rows

    def events(self) -> list[dict[str, Any]]:
        """In Chrome's trace event format; the calls follow each other."""
        events: list[dict[str, Any]] = [
            {"ph": "M", "pid": self.rank, "name": "process_name", "args": {"name": f"rank {self.rank}"}}
        ]
        offset = 0.0
        for number, (phase, spans) in enumerate(self.calls):
            for s in spans:
                events.append({
                    "ph": "X", "pid": self.rank, "tid": s.lane, "cat": s.kind, "name": f"{s.kind} {s.name}",
                    "ts": (offset + s.start) * 1e3, "dur": s.ms * 1e3,
                    "args": {"call": number, "phase": phase, **({"bytes": s.nbytes} if s.nbytes else {})},
                })  # fmt: skip
            offset += max((s.end for s in spans), default=0.0)
        return events


def write_chrome_trace(path: str | os.PathLike[str], traces: Iterable[Trace]) -> None:
    """One file for the given ranks, for chrome://tracing or Perfetto. Ranks' clocks are not compared: each starts at
    its own first call."""
    data = {"traceEvents": [e for t in traces for e in t.events()], "displayTimeUnit": "ms"}
    write_file(Path(path), json.dumps(data))


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union."""
    total, end = 0.0, float("-inf")
    for a, b in sorted(intervals):
        total += max(0.0, b - max(a, end))
        end = max(end, b)
    return total
