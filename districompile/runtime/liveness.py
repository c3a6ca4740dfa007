"""Tell which rank is lost: one that ended, that is stopped, or that hangs.

Each rank writes a heartbeat to the store at which the ranks met, and reads those of the others. A rank that waits for
another one judges by them:

- A rank without heartbeats is stopped or gone, whatever it was doing.
- A rank with heartbeats may take its time between two calls: how long a caller thinks is not known. Rank 0 is waited
  for as long as it lives. The others have the timeout to come to a call that rank 0 has begun, within an image; ten
  times that to come to an image's first call, and to the first calls of all.
- Within a call every transfer is bounded by the timeout; ten times that in the first calls, which prepare things.
"""

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

from districompile.errors import InputError
from districompile.runtime.loopback import PrefixStore, Store, TCPStore
from districompile.runtime.transport import TransportError

TIMEOUT = 30.0  # seconds
FOREVER = 7 * 24 * 3600.0  # seconds; the timeout of groups whose waits are watched here
PATIENCE = 10  # times the timeout
_SILENCE = 0.7  # times the timeout: what is left is for telling it
_COLD_CALLS = 4  # of each phase: on a GPU these capture graphs
_loads = itertools.count()  # ranks load bundles in the same order


def check_timeout(timeout: float) -> None:
    """Raise :class:`InputError` for a timeout in which no rank could answer."""
    if not timeout >= 1 or timeout == float("inf"):
        raise InputError(f"the timeout is {timeout:g} seconds: give at least 1, and a number")


@dataclasses.dataclass(frozen=True)
class Beat:
    """What a rank says of itself. ``call`` counts calls, ``inside`` says whether it is in one, ``step`` counts what it
    waited for, ``waits`` is the rank that it waits for (-1: any). ``failed`` is its error, ``lost`` the rank that it
    blames."""

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
    """Which rank is lost (None: one of the others), and why. ``silent``: its process is there, but does nothing."""

    rank: int | None
    why: str
    silent: bool = False


@dataclasses.dataclass(frozen=True)
class _Waiting:
    """Since when this rank waits for ``peer`` (None: for any other). ``interrupt`` makes the wait fail; a wait of the
    device has none."""

    peer: int | None
    since: float
    interrupt: Callable[[], None] | None


class Liveness:
    """The heartbeats of this process, which is one of ``ranks``. All ranks construct it together, within ``meeting``
    seconds, and in the same order where they construct several.

    ``timeout`` is in seconds. Calls are made by one thread at a time.
    """

    def __init__(self, store: Store, rank: int, ranks: int, timeout: float, meeting: float = 60.0) -> None:
        self.rank, self.ranks, self.timeout = rank, ranks, timeout
        self._peers = [p for p in range(ranks) if p != rank]
        self._interval = min(1.0, timeout / 10)
        own = store.clone() if hasattr(store, "clone") else store  # so that nobody waits for another thread's request
        self._store = PrefixStore(f"districompile/{next(_loads)}", own)
        self._in_rank_0 = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and _is_tcp(store)
        # Of this rank: what the main thread does, and what has been found out
        self._call, self._step, self._inside = 0, 0, False
        self._patient = True
        self._failed: str | None = None
        self._blames: int | None = None
        self._left = False
        # Of the others
        self._beats: dict[int, Beat] = {}
        self._last_beat: dict[int, float] = {}  # when a beat was new
        self._moved: dict[int, float] = {}  # when a rank had gone on
        self._last_contact = time.monotonic()  # when the store answered
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
        atexit.register(self.close)  # a thread inside of the store would abort the process at its end

    @staticmethod
    def of_default_group(timeout: float, meeting: float = 60.0) -> Liveness:
        """Between the ranks of torch.distributed's default group, at its store."""
        store = dist.distributed_c10d._get_default_store()
        return Liveness(store, dist.get_rank(), dist.get_world_size(), timeout, meeting)

    # What the main thread says

    def exchange(self, name: str, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The facts of all ranks, in rank order. Waits as long as the others live."""
        self._store.set(f"{name}/{self.rank}", json.dumps(facts))
        self._gather(name, None)
        texts = self._store.multi_get([f"{name}/{r}" for r in range(self.ranks)])
        return [json.loads(text) for text in texts]

    def enter(self, within_image: bool = False) -> None:
        """A call begins; ``within_image``: this is rank 0, and the call goes on with an image, so that the others come
        soon. Raises :class:`TransportError` where a rank is known to be lost."""
        verdict = self._verdict or self._ended(time.monotonic(), _SILENCE * self.timeout)
        if verdict is not None:
            raise self.error(verdict)
        self._patient = not within_image or sum(self._seen.values()) < 2 * _COLD_CALLS
        self._entered, self._key = time.monotonic(), None
        self._call, self._inside = self._call + 1, True

    def of_kind(self, key: Hashable) -> None:
        """The call is of this kind: the first ones of a kind take longer."""
        self._key = key

    def leave(self) -> None:
        """A call has returned; the device may still work on it."""
        self._seen[self._key] += 1
        self._entered, self._inside = None, False

    def watch(self, event: torch.cuda.Event) -> None:
        """The device is to come to ``event``. Where it does not, this process ends: nothing else stops a stream."""
        self._on_device = True
        with self._lock:
            self._events.append((time.monotonic(), event))

    @contextlib.contextmanager
    def waiting(self, peer: int | None = None, interrupt: Callable[[], None] | None = None) -> Iterator[None]:
        """This rank waits for ``peer`` (None: for any other); ``interrupt`` makes what is inside raise. Without it the
        process ends where a rank is lost."""
        peer = None if peer == self.rank else peer
        earlier, self._waiting = self._waiting, _Waiting(peer, time.monotonic(), interrupt)
        try:
            yield
        finally:
            self._waiting = earlier
            self._step += 1

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank has failed. Where it follows another one, that was told before."""
        if self._failed is None and not isinstance(error, TransportError):
            self._failed = " ".join(str(error).split()) or type(error).__name__
            self._tell()

    def lost(self, peer: int | None, reason: str) -> TransportError:
        """The error for a transfer with ``peer`` that failed: it names the rank that is really lost. Takes a moment
        where heartbeats have to show which one that is."""
        deadline = time.monotonic() + 4 * self._interval + 0.5
        while self._verdict is None and time.monotonic() < deadline:
            self._verdict = self._ended(time.monotonic(), 3 * self._interval + 0.3)
            self._stop.wait(0.05)
        unknown = Verdict(None if peer == self.rank else peer, f"it ended, or did not answer in time ({reason})")
        return self.error(self._verdict or unknown)

    def error(self, verdict: Verdict) -> TransportError:
        """One line for a verdict, which the other ranks learn of."""
        self._verdict = verdict
        if self._failed is None:
            self._failed, self._blames = verdict.why, verdict.rank
            self._tell()
        who = "another rank" if verdict.rank is None else f"rank {verdict.rank}"
        return TransportError(f"rank {self.rank} lost {who}: {verdict.why}; see that rank's log", verdict.silent)

    def close(self) -> None:
        """Say good-bye, and stop."""
        atexit.unregister(self.close)
        if not self._stop.is_set():
            self._left = True
            self._tell()
            self._stop.set()
            self._wake.set()
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join(1.0)

    # Heartbeats

    def _tell(self) -> None:
        """Have the others know at once."""
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
            if late > 2 * self._interval:  # this process did not run itself: that is no silence of the others
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
        """What the device has not come to yet; else the call that is being queued, which may wait for the device."""
        with contextlib.suppress(RuntimeError), self._lock:  # the device is going away
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
        """The rank at the end of the chain of those that wait for each other."""
        met = {self.rank}
        while True:
            met.add(peer)
            onward = beats[peer].waits
            if onward is None or onward not in beats or onward in met or beats[peer].call < self._call:
                return peer
            peer = onward

    def _ended(self, now: float, silence: float) -> Verdict | None:
        """A rank that failed or left, or that gave no sign of life for ``silence`` seconds."""
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
        if now - last_contact > 2 * self._interval + 1:  # without the store nothing is known of the others
            return self._silent(0, now - last_contact, silence) if holder else None
        if not last_beat:
            return None
        quietest = min(last_beat, key=last_beat.__getitem__)
        return self._silent(quietest, now - last_beat[quietest], silence)

    def _silent(self, peer: int, quiet: float, silence: float) -> Verdict | None:
        if quiet <= silence:
            return None
        if quiet <= _SILENCE * self.timeout:  # and a transfer has failed
            return Verdict(peer, "it ended, or cannot be reached")
        return Verdict(peer, f"no sign of life for {quiet:.0f} s: it is stopped, or its machine is gone", True)


def _end_process(error: TransportError) -> None:
    from districompile.runtime.launcher import fail_process

    if "TORCHELASTIC_ERROR_FILE" not in os.environ:  # no launcher will tell
        print(f"error: {error}", file=sys.stderr, flush=True)
    fail_process(error)


def _is_tcp(store: Store) -> bool:
    return isinstance(getattr(store, "_underlying_non_prefix_store", store), TCPStore)
