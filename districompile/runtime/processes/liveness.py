# SPDX-License-Identifier: Apache-2.0
"""Find the rank that is lost: one that ended, is stopped, or hangs.

Each rank writes a heartbeat to the store at which the ranks met, and reads those of the others. A rank that waits for
another one judges it by its heartbeats:

- A rank without heartbeats is stopped or gone, whatever it was doing.
- A rank with heartbeats may take any time between two calls, because the caller's own work has no known limit. Rank 0
  is waited for as long as it lives. The others have the timeout to enter a call that rank 0 has begun within an image.
  They have ten times that to enter an image's first call, and the first calls of all.
- Within a call, every transfer has the timeout; ten times that in the first calls, which include preparation."""

from __future__ import annotations

import atexit
import collections
import contextlib
import dataclasses
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from districompile.errors import InputError, TransportError
from districompile.runtime.processes.store import PrefixStore, Store, TCPStore

TIMEOUT = 30.0  # seconds
FOREVER = 7 * 24 * 3600.0  # seconds; the timeout of groups whose waits are watched here
PATIENCE = 10  # times the timeout
_SILENCE = 0.7  # times the timeout: the rest is for reporting it
_COLD_CALLS = 4  # of each phase: on a GPU these capture graphs
_loads = itertools.count()  # ranks load bundles in the same order


def check_timeout(timeout: float) -> None:
    """Check a timeout. Raises :class:`InputError` for one in which no rank could answer."""
    if not timeout >= 1 or timeout == float("inf"):
        raise InputError(f"the timeout is {timeout:g} seconds: give at least 1, and a number")


@dataclasses.dataclass(frozen=True)
class Beat:
    """The state that a rank publishes.

    ``call`` counts calls, and ``inside`` is whether the rank is in one. ``step`` counts its waits so far, and ``waits``
    is the rank that it waits for (-1: any). ``failed`` is its error, and ``lost`` the rank that it blames."""

    number: int = 0
    call: int = 0
    inside: bool = False
    step: int = 0
    waits: int | None = None
    failed: str | None = None
    lost: int | None = None
    left: bool = False


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The rank that is lost (None: one of the others), and why. ``silent``: its process exists but does nothing."""

    rank: int | None
    why: str
    silent: bool = False


@dataclasses.dataclass(frozen=True)
class _Waiting:
    """A wait of this rank for ``peer`` (None: for any other) since a time.

    ``interrupt`` makes the wait fail. A wait of the device has none."""

    peer: int | None
    since: float
    interrupt: Callable[[], None] | None


class Liveness:
    """The heartbeats of this process, which is one of ``ranks``.

    All ranks construct it together, within ``meeting`` seconds, and in the same order if they construct several.
    ``timeout`` is in seconds. Calls are made by one thread at a time."""

    def __init__(self, store: Store, rank: int, ranks: int, timeout: float, meeting: float = 60.0) -> None:
        self.rank, self.ranks, self.timeout = rank, ranks, timeout
        self._peers = [p for p in range(ranks) if p != rank]
        self._interval = min(1.0, timeout / 10)
        own = store.clone() if hasattr(store, "clone") else store  # so that no request waits for another thread's
        self._store = PrefixStore(f"districompile/{next(_loads)}", own)
        self._in_rank_0 = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and _is_tcp(store)
        # Of this rank: the activity of the main thread, and the findings so far.
        self._call, self._step, self._inside = 0, 0, False
        self._patient = True
        self._failed: str | None = None
        self._blames: int | None = None
        self._left = False
        # Of the others.
        self._beats: dict[int, Beat] = {}
        self._last_beat: dict[int, float] = {}  # when the last new beat was read
        self._moved: dict[int, float] = {}  # when a rank last made progress
        self._last_contact = time.monotonic()  # when the store last answered
        self._numbers = itertools.count()
        self._published = threading.Event()
        self._waiting: _Waiting | None = None
        self._entered: float | None = None
        self._seen: collections.Counter[Hashable] = collections.Counter()
        self._key: Hashable = None
        self._events: collections.deque[tuple[float, torch.cuda.Event]] = collections.deque()
        self._on_device = False
        self._verdict: Verdict | None = None
        self._lock = threading.Lock()
        self._stop, self._wake = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._publish()
        self._gather("beat", meeting)
        self._read(self._store.multi_get([f"beat/{p}" for p in self._peers]))
        self._threads = [
            threading.Thread(target=target, name=f"districompile-{name}", daemon=True)
            for name, target in (("heartbeat", self._talk), ("watch", self._watch))
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)  # a thread inside the store would abort the process at its end

    @staticmethod
    def of_default_group(timeout: float, meeting: float = 60.0) -> Liveness:
        """Construct the heartbeats between the ranks of torch.distributed's default group, at its store."""
        store = dist.distributed_c10d._get_default_store()
        return Liveness(store, dist.get_rank(), dist.get_world_size(), timeout, meeting)

    # Called by the main thread

    def exchange(self, name: str, facts: Mapping[str, Any], limit: float | None = None) -> list[dict[str, Any]]:
        """Return the facts of all ranks, in rank order.

        Waits as long as the others live, and at most ``limit`` seconds."""
        self._store.set(f"{name}/{self.rank}", json.dumps(facts))
        self._gather(name, limit)
        texts = self._store.multi_get([f"{name}/{r}" for r in range(self.ranks)])
        return [json.loads(text) for text in texts]

    def enter(self, within_image: bool = False) -> None:
        """Begin a call. Raises :class:`TransportError` if a rank is known to be lost.

        ``within_image``: this is rank 0, and the call continues an image, so that the others follow soon."""
        verdict = self._verdict or self._ended(time.monotonic(), _SILENCE * self.timeout)
        if verdict is not None:
            raise self.error(verdict)
        self._patient = not within_image or sum(self._seen.values()) < 2 * _COLD_CALLS
        self._entered, self._key = time.monotonic(), None
        self._call, self._inside = self._call + 1, True

    def of_kind(self, key: Hashable) -> None:
        """Set the kind of the call: the first calls of a kind take longer."""
        self._key = key

    def leave(self) -> None:
        """End a call. The device may still work on it."""
        self._seen[self._key] += 1
        self._entered, self._inside = None, False

    def watch(self, event: torch.cuda.Event) -> None:
        """Watch that the device reaches ``event``. If it does not, this process ends: nothing else stops a stream."""
        self._on_device = True
        with self._lock:
            self._events.append((time.monotonic(), event))

    @contextlib.contextmanager
    def waiting(self, peer: int | None = None, interrupt: Callable[[], None] | None = None) -> Iterator[None]:
        """Wait for ``peer`` inside (None: for any other). If a rank is lost, ``interrupt`` makes the code inside raise.

        Without ``interrupt`` the process ends in that case."""
        peer = None if peer == self.rank else peer
        earlier, self._waiting = self._waiting, _Waiting(peer, time.monotonic(), interrupt)
        try:
            yield
        finally:
            self._waiting = earlier
            self._step += 1

    def fail(self, error: BaseException) -> None:
        """Publish that this rank has failed, unless its failure follows that of another rank."""
        if self._failed is None and not isinstance(error, TransportError):
            self._failed = " ".join(str(error).split()) or type(error).__name__
            self._publish_now()

    def lost(self, peer: int | None, reason: str) -> TransportError:
        """Return the error for a failed transfer with ``peer``. It names the rank that is really lost.

        It takes a moment if heartbeats have to show which rank that is."""
        deadline = time.monotonic() + 4 * self._interval + 0.5
        while self._verdict is None and time.monotonic() < deadline:
            self._verdict = self._ended(time.monotonic(), 3 * self._interval + 0.3)
            self._stop.wait(0.05)
        unknown = Verdict(None if peer == self.rank else peer, f"it ended, or did not answer in time ({reason})")
        return self.error(self._verdict or unknown)

    def error(self, verdict: Verdict) -> TransportError:
        """Return a verdict as an error of one line, and publish it to the other ranks."""
        self._verdict = verdict
        if self._failed is None:
            self._failed, self._blames = verdict.why, verdict.rank
            self._publish_now()
        who = "another rank" if verdict.rank is None else f"rank {verdict.rank}"
        return TransportError(f"rank {self.rank} lost {who}: {verdict.why}; see that rank's log", verdict.silent)

    def close(self) -> None:
        """Publish that this rank leaves, and stop."""
        atexit.unregister(self.close)
        if not self._stop.is_set():
            self._left = True
            self._publish_now()
            self._stop.set()
            self._wake.set()
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join(1.0)

    # Heartbeats

    def _publish_now(self) -> None:
        """Publish this rank's state, and wait until it is published."""
        published = self._published = threading.Event()
        self._wake.set()
        published.wait(1.0)

    def _publish(self) -> None:
        published, waiting = self._published, self._waiting
        waits = None if waiting is None else (-1 if waiting.peer is None else waiting.peer)
        beat = Beat(
            next(self._numbers), self._call, self._inside, self._step, waits, self._failed, self._blames, self._left
        )
        self._store.set(f"beat/{self.rank}", json.dumps(dataclasses.asdict(beat)))
        published.set()

    def _talk(self) -> None:
        keys = [f"beat/{p}" for p in self._peers]
        while not self._stop.is_set():
            self._wake.clear()
            try:
                self._publish()
                self._read(self._store.multi_get(keys))
            except RuntimeError:  # the store is gone, and with it the process that held it
                return
            self._wake.wait(self._interval)

    def _read(self, texts: list[bytes]) -> None:
        now = time.monotonic()
        with self._lock:
            self._last_contact = now
            for peer, text in zip(self._peers, texts, strict=True):
                beat, earlier = Beat(**json.loads(text)), self._beats.get(peer)
                if earlier is None or beat.number != earlier.number:
                    self._last_beat[peer] = now
                if earlier is None or (beat.call, beat.step) != (earlier.call, earlier.step):
                    self._moved[peer] = now
                self._beats[peer] = beat

    def _gather(self, name: str, limit: float | None) -> None:
        """Wait until every rank has set its key."""
        began = time.monotonic()
        missing = list(self._peers)
        while missing := [p for p in missing if not self._store.check([f"{name}/{p}"])]:
            waited = time.monotonic() - began
            if limit is not None and waited > limit:
                raise TransportError(f"the ranks did not meet within {limit:g} s: rank {missing[0]} did not come")
            verdict = self._verdict or self._ended(time.monotonic(), _SILENCE * self.timeout)
            if verdict is not None:
                raise self.error(verdict)
            time.sleep(min(0.2, 0.01 + waited / 20))

    # Watch

    def _watch(self) -> None:
        tick = time.monotonic()
        while not self._stop.wait(self._interval):
            now = time.monotonic()
            late, tick = now - tick - self._interval, now
            if late > 2 * self._interval:  # this process did not run: the others were not silent
                with self._lock:
                    self._last_contact = min(now, self._last_contact + late)
                    for times in (self._last_beat, self._moved):
                        times.update({p: min(now, t + late) for p, t in times.items()})
            waiting = self._waiting or self._device_waits(now)
            verdict = None if waiting is None else self._judge(now, waiting)
            if waiting is None or verdict is None:
                continue
            error = self.error(verdict)
            if waiting.interrupt is None:
                _end_process(error)
            elif self._waiting is waiting:
                waiting.interrupt()

    def _device_waits(self, now: float) -> _Waiting | None:
        """Return the wait for the first event that the device has not reached; else that of the call being queued.

        Such a call may wait for the device."""
        with contextlib.suppress(RuntimeError), self._lock:  # the device may be going away
            while self._events and self._events[0][1].query():  # type: ignore[no-untyped-call]
                self._events.popleft()
                if self._events:  # the next call could not start before
                    self._events[0] = (max(self._events[0][0], now), self._events[0][1])
            if self._events:
                return _Waiting(None, self._events[0][0], None)
        entered = self._entered
        return _Waiting(None, entered, None) if self._on_device and entered is not None else None

    # Judgement

    def _judge(self, now: float, waiting: _Waiting) -> Verdict | None:
        ended = self._ended(now, _SILENCE * self.timeout)
        if ended is not None:
            return ended
        with self._lock:
            beats, moved = dict(self._beats), dict(self._moved)
        limit = self.timeout if self._seen[self._key] >= _COLD_CALLS else PATIENCE * self.timeout
        call = self._call
        candidates = self._peers if waiting.peer is None else [self._blamed(waiting.peer, beats)]
        for peer in candidates:
            if peer == self.rank:
                continue
            beat = beats[peer]
            since = max(waiting.since, moved[peer])
            if beat.call < call:
                coming = self.timeout * (PATIENCE if self._patient else 1)
                if peer != 0 and now - since > coming:
                    return Verdict(peer, f"it does not come to the call within {coming:g} s (see the timeout)", True)
            elif beat.call == call and beat.inside and beat.waits is None and now - since > limit:
                return Verdict(peer, f"it does not go on within a call for {limit:g} s (see the timeout)", True)
        joined = all(beats[p].call >= call for p in self._peers)
        if call and joined and now - waiting.since > (limit if waiting.interrupt is None else PATIENCE * self.timeout):
            return Verdict(waiting.peer, f"nothing arrives from it for {now - waiting.since:.0f} s", True)
        return None

    def _blamed(self, peer: int, beats: Mapping[int, Beat]) -> int:
        """Return the rank at the end of a chain of ranks that wait for each other."""
        met = {self.rank}
        while True:
            met.add(peer)
            onward = beats[peer].waits
            if onward is None or onward not in beats or onward in met or beats[peer].call < self._call:
                return peer
            peer = onward

    def _ended(self, now: float, silence: float) -> Verdict | None:
        """Return a rank that failed or left, or that sent no heartbeat for ``silence`` seconds."""
        with self._lock:
            beats, last_beat, last_contact = dict(self._beats), dict(self._last_beat), self._last_contact
        for peer, beat in beats.items():
            if beat.failed is not None and beat.lost in beats:
                return Verdict(beat.lost, beat.failed)
            if beat.failed is not None and beat.lost == self.rank:
                return Verdict(peer, f"it gave up on this rank: {beat.failed}")
        for peer, beat in beats.items():
            if beat.failed is not None:
                return Verdict(peer, f"it failed: {beat.failed}")
            if beat.left and beat.call < self._call:
                return Verdict(peer, "it was closed, or its program has ended")
        holder = self._in_rank_0 and self.rank != 0
        if holder and self._threads and not self._threads[0].is_alive() and not self._stop.is_set():
            return Verdict(0, "it ended, and with it the store at which the ranks met")
        if now - last_contact > 2 * self._interval + 1:  # without the store, the state of the others is unknown
            return self._silent(0, now - last_contact, silence) if holder else None
        if not last_beat:
            return None
        quietest = min(last_beat, key=last_beat.__getitem__)
        return self._silent(quietest, now - last_beat[quietest], silence)

    def _silent(self, peer: int, quiet: float, silence: float) -> Verdict | None:
        if quiet <= silence:
            return None
        if quiet <= _SILENCE * self.timeout:  # it lacks heartbeats only briefly, but a transfer has failed
            return Verdict(peer, "it ended, or cannot be reached")
        return Verdict(peer, f"no sign of life for {quiet:.0f} s: it is stopped, or its machine is gone", True)


def _end_process(error: TransportError) -> None:
    from districompile.runtime.processes.launcher import fail_process, is_reported

    if not is_reported():
        print(f"error: {error}", file=sys.stderr, flush=True)
    fail_process(error)


def _is_tcp(store: Store) -> bool:
    return isinstance(getattr(store, "_underlying_non_prefix_store", store), TCPStore)
