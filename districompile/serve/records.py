# SPDX-License-Identifier: Apache-2.0
"""What the server keeps of its requests: Prometheus metrics, a log of JSON lines, and pictures to fetch by URL."""

from __future__ import annotations

import collections
import datetime
import json
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import generate_latest

from districompile.errors import Error

_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
_OVERHEAD = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        prefix = "districompile"
        self.requests = Counter(f"{prefix}_requests", "HTTP requests", ["route", "status"], registry=self._registry)
        self.images = Counter(f"{prefix}_images", "Pictures drawn", registry=self._registry)
        self.steps = Counter(f"{prefix}_steps", "Sampling steps, by phase", ["phase"], registry=self._registry)
        self.drawing = Histogram(f"{prefix}_drawing_seconds", "Seconds that the pipeline took for a request",
                                 buckets=_SECONDS, registry=self._registry)  # fmt: skip
        self.waiting = Histogram(f"{prefix}_waiting_seconds", "Seconds that a request waited to be drawn",
                                 buckets=(0.001, 0.01, *_SECONDS), registry=self._registry)  # fmt: skip
        self.overhead = Histogram(f"{prefix}_overhead_seconds", "Seconds of a request besides waiting and drawing",
                                  buckets=_OVERHEAD, registry=self._registry)  # fmt: skip
        self._memory = Gauge(f"{prefix}_rank_resident_bytes", "Resident memory of a rank", ["rank", "pid"],
                             registry=self._registry)  # fmt: skip

    def watch(self, name: str, about: str, value: Callable[[], float]) -> None:
        """Add a value that is read when the metrics are."""
        Gauge(f"districompile_{name}", about, registry=self._registry).set_function(value)

    def text(self, memory: dict[int, int], pids: dict[int, int]) -> bytes:
        """Return the metrics in Prometheus' text format. ``memory``: bytes of each rank; ``pids``: its process."""
        self._memory.clear()
        for rank, count in memory.items():
            self._memory.labels(str(rank), str(pids.get(rank, ""))).set(count)
        return generate_latest(self._registry)


class RequestLog:
    """JSON lines, one for each request. Prompts are not written, only their length."""

    def __init__(self, path: Path | None) -> None:
        self._broken = False
        try:
            self._file: TextIO = sys.stdout if path is None else path.open("a", encoding="utf-8", buffering=1)
        except OSError as e:
            raise Error(f"--log {path}: {e.strerror}") from e

    def write(self, entry: dict[str, Any]) -> None:
        """Write one line. A log that cannot be written does not end a request."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        try:
            self._file.write(json.dumps({"time": now, **entry}) + "\n")
            self._file.flush()
            self._broken = False
        except Exception as e:  # of the file, or of whoever reads standard output
            if not self._broken:
                print(f"warning: the log of requests cannot be written: {e}", file=sys.stderr, flush=True)
            self._broken = True


class Pictures:
    """Pictures that can be fetched for a while, under names that cannot be guessed.

    At most ``most_bytes`` are kept, and each for at most ``seconds``. The oldest goes first.
    """

    def __init__(self, most_bytes: int = 256 << 20, seconds: float = 3600.0) -> None:
        self._most, self._seconds = most_bytes, seconds
        self._kept: collections.OrderedDict[str, tuple[float, bytes]] = collections.OrderedDict()
        self._bytes = 0

    def keep(self, data: bytes, suffix: str) -> str:
        """Keep a file and return its name."""
        name = f"{secrets.token_urlsafe(24)}.{suffix}"
        self._kept[name] = (time.monotonic(), data)
        self._bytes += len(data)
        self._clear()
        return name

    def get(self, name: str) -> bytes | None:
        """Return a file; None if it is not here, or not any more."""
        self._clear()
        found = self._kept.get(name)
        return None if found is None else found[1]

    def _clear(self) -> None:
        while self._kept:
            name, (since, data) = next(iter(self._kept.items()))
            if self._bytes <= self._most and time.monotonic() - since <= self._seconds:
                return
            del self._kept[name]
            self._bytes -= len(data)
