# SPDX-License-Identifier: Apache-2.0
"""Traces of calls: runs of engines, transfers and waits, with their times.

Times are those of the device. On a GPU they come from CUDA events around work that is queued on a stream, also inside a
captured graph. On the CPU they come from the host's clock. A transfer is *exposed* for as long as the compute stream
carried it out or waited for it, else *hidden*. :func:`write_chrome_trace` writes the traces of all ranks for
chrome://tracing or ui.perfetto.dev.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from districompile.common.outputs import write_file
from districompile.plan.plan import Collective, Exchange, ExecutionPlan, Start


@dataclasses.dataclass(frozen=True)
class Span:
    """An interval of one call, in milliseconds since the call began.

    ``kind`` is "run" (an engine), "post" (a transfer), "wait" or "join" (the compute stream waits). ``lane`` is
    "compute" or "transfer". ``nbytes`` is the number of bytes that a post sent.
    """

    kind: str
    name: str
    lane: str
    start: float
    end: float
    nbytes: int = 0

    @property
    def ms(self) -> float:
        """The duration in milliseconds."""
        return self.end - self.start


class Spans:
    """Record the spans of one call.

    With ``cuda``, spans are pairs of events on the current stream. Events that are captured into a graph are read after
    its replay.
    """

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._began = self._mark()
        self._open: list[tuple[str, str, str, int, Any, Any]] = []

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        # External: recorded anew at each replay of a graph, and readable from outside.
        captured = torch.cuda.is_current_stream_capturing()
        event = torch.cuda.Event(enable_timing=True, external=captured)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def begin(self) -> None:
        """Set the zero of all times."""
        self._began = self._mark()

    @contextlib.contextmanager
    def span(self, kind: str, name: str, lane: str, nbytes: int = 0) -> Iterator[None]:
        """Record the time of the work that is queued inside."""
        start = self._mark()
        yield
        self._open.append((kind, name, lane, nbytes, start, self._mark()))

    def read(self) -> list[Span]:
        """Return the spans so far, sorted by start. Wait for the device."""
        if self._cuda:
            torch.cuda.synchronize()

        def since(mark: Any) -> float:
            return float(self._began.elapsed_time(mark)) if self._cuda else (mark - self._began) * 1e3

        spans = [Span(k, n, lane, since(a), since(b), size) for k, n, lane, size, a, b in self._open]
        return sorted(spans, key=lambda s: s.start)


@dataclasses.dataclass
class Trace:
    """The traced calls of one rank: for each, its phase and its spans sorted by start."""

    rank: int
    calls: list[tuple[str, list[Span]]] = dataclasses.field(default_factory=list)

    def summary(self) -> list[dict[str, Any]]:
        """Return a row for each call: its phase, its times in milliseconds, and the bytes sent.

        ``run_ms`` is the time of engines, and ``transfer_ms`` that of transfers, of which ``exposed_ms`` is exposed and
        ``hidden_ms`` hidden. ``total_ms`` is the end of the last span.
        """
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


def senders_of(plan: ExecutionPlan) -> dict[str, frozenset[tuple[int, int]]]:
    """Return the (sending rank, receiving rank) pairs of each transfer, by the name of its spans.

    With guidance halves, ranks are those of one half.
    """
    found: dict[str, frozenset[tuple[int, int]]] = {}
    for phase in plan.phases.values():
        for step in phase.steps:
            if isinstance(step, Start):
                more = f" and {len(step.collectives) - 1} more" if len(step.collectives) > 1 else ""
                name = f"{step.collectives[0]}{more}"
                pairs = frozenset(p for c in step.collectives for p in _pairs(plan.collectives[c]))
                found[name] = found.get(name, frozenset()) | pairs
    return found


def _pairs(collective: Collective) -> set[tuple[int, int]]:
    if isinstance(collective, Exchange):
        return {(p.src, p.dst) for p in collective.pieces if p.src != p.dst and p.rows}
    ranks = range(len(collective.specs))
    return {(a, b) for a in ranks for b in ranks if a != b}


def write_chrome_trace(
    path: str | os.PathLike[str],
    traces: Iterable[Trace],
    senders: Mapping[str, frozenset[tuple[int, int]]] | None = None,
) -> None:
    """Write one file for the given ranks, in Chrome's trace event format.

    A rank is a process with two threads, *compute* and *transfers*. Each run, transfer and wait is a slice. An arrow
    (flow) leads from each transfer to the wait for it on the same rank. With ``senders`` (from :func:`senders_of`),
    another leads to the wait of each rank that receives it. The clocks of the ranks are not compared: each call starts
    at the same time on all ranks.
    """
    events = trace_events(list(traces), senders)
    write_file(Path(path), json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


_THREADS = {"compute": (0, "compute"), "transfer": (1, "transfers")}  # lane -> thread id and name
_TITLES = {"run": "run", "post": "transfer", "wait": "wait for", "join": "wait for all of"}


def trace_events(
    traces: Sequence[Trace], senders: Mapping[str, frozenset[tuple[int, int]]] | None = None
) -> list[dict[str, Any]]:
    """Return the events of :func:`write_chrome_trace`: metadata, slices, then the two ends of each flow."""
    events: list[dict[str, Any]] = []
    for t in traces:
        events.append(_metadata(t.rank, "process_name", {"name": f"rank {t.rank}"}))
        events.append(_metadata(t.rank, "process_sort_index", {"sort_index": t.rank}))
        for number, name in _THREADS.values():
            events.append({**_metadata(t.rank, "thread_name", {"name": name}), "tid": number})
            events.append({**_metadata(t.rank, "thread_sort_index", {"sort_index": number}), "tid": number})
    begins = _begins(traces)
    for t in traces:
        for number, (phase, spans) in enumerate(t.calls):
            events += [_slice(t.rank, number, phase, begins[number], s) for s in spans]
    return events + list(_flows(traces, begins, senders or {}))


def _metadata(rank: int, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "pid": rank, "name": name, "args": arguments}


def _slice(rank: int, call: int, phase: str, begin: float, span: Span) -> dict[str, Any]:
    arguments = {"call": call, "phase": phase, **({"bytes": span.nbytes} if span.nbytes else {})}
    return {
        "ph": "X", "pid": rank, "tid": _THREADS[span.lane][0], "cat": span.kind,
        "name": f"{_TITLES.get(span.kind, span.kind)} {span.name}", "ts": (begin + span.start) * 1e3,
        "dur": span.ms * 1e3, "args": arguments,
    }  # fmt: skip


def _begins(traces: Sequence[Trace]) -> list[float]:
    """Return when each call begins (ms): once the call before it has ended on all ranks."""
    begins, at = [], 0.0
    for number in range(max((len(t.calls) for t in traces), default=0)):
        begins.append(at)
        at += max((s.end for t in traces if number < len(t.calls) for s in t.calls[number][1]), default=0.0)
    return begins


def _flows(
    traces: Sequence[Trace], begins: Sequence[float], senders: Mapping[str, frozenset[tuple[int, int]]]
) -> Iterator[dict[str, Any]]:
    """Generate the flows from transfers to waits. Every flow has a start ("s") and an end ("f")."""
    posts = [dict(_numbered(t)) for t in traces]
    size = 1 + max((r for pairs in senders.values() for pair in pairs for r in pair), default=0)
    identifier = 0
    for t, own in zip(traces, posts, strict=True):
        for key, wait in _waits(t):
            name = key[0]
            sources = [(t.rank, own)] if key in own else []
            sources += [
                (other.rank, theirs)
                for other, theirs in zip(traces, posts, strict=True)
                if other.rank != t.rank and key in theirs and other.rank // size == t.rank // size
                and (other.rank % size, t.rank % size) in senders.get(name, ())
            ]  # fmt: skip
            for rank, found in sources:
                call, post = found[key]
                identifier += 1
                kind = "start to wait" if rank == t.rank else "rank to rank"
                flow = {"id": identifier, "cat": kind, "name": name}
                yield {
                    "ph": "s", "pid": rank, "tid": _THREADS[post.lane][0], "ts": (begins[call] + post.start) * 1e3,
                    **flow,
                }  # fmt: skip
                yield {
                    "ph": "f", "bp": "e", "pid": t.rank, "tid": _THREADS[wait[1].lane][0],
                    "ts": (begins[wait[0]] + wait[1].end) * 1e3, **flow,
                }  # fmt: skip


_Key = tuple[str, int]  # the name of a transfer, and the number of earlier ones with this name


def _numbered(trace: Trace) -> Iterator[tuple[_Key, tuple[int, Span]]]:
    """Generate the transfers of a rank, with their numbers and calls.

    The numbers agree between the ranks, because all ranks make the same calls.
    """
    counts: collections.Counter[str] = collections.Counter()
    for number, (_, spans) in enumerate(trace.calls):
        for s in spans:
            if s.kind == "post":
                yield (s.name, counts[s.name]), (number, s)
                counts[s.name] += 1


def _waits(trace: Trace) -> Iterator[tuple[_Key, tuple[int, Span]]]:
    """Generate the waits of a rank, each with the key of the last transfer of its name that began before it.

    Waits for transfers that began before the trace are left out.
    """
    counts: collections.Counter[str] = collections.Counter()
    for number, (_, spans) in enumerate(trace.calls):
        for s in sorted(spans, key=lambda s: (s.start, s.kind != "post")):
            if s.kind == "post":
                counts[s.name] += 1
            elif s.kind == "wait" and counts[s.name]:
                yield (s.name, counts[s.name] - 1), (number, s)


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for a, b in sorted(intervals):
        total += max(0.0, b - max(a, end))
        end = max(end, b)
    return total
