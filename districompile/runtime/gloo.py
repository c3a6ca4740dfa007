"""One process per rank over torch.distributed's gloo: asynchronous sends and receives, staged through host memory."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from districompile.errors import LaunchError
from districompile.ir.plan import Collective
from districompile.runtime.arena import aligned, allocate
from districompile.runtime.links import Region, Route, recorded
from districompile.runtime.liveness import Liveness
from districompile.runtime.loopback import Store, TCPStore, bind_store, stay_on_machine
from districompile.runtime.trace import Spans
from districompile.runtime.transport import Packing, PackingCache, Pending, TransportError

_T = TypeVar("_T")
_SMALL = 1024  # bytes
_TAGS = 1 << 20  # posts under way at once are a handful; their tags only have to differ


class GlooTransport:
    """The transport of this process in ``group`` (a gloo process group; None is the default group).

    Several posts may be under way at once: each has its own tag, numbered alike on all ranks. A rank that is gone or
    does not answer makes the others raise :class:`TransportError`: where ``liveness`` tells which one that is, or after
    the group's timeout (gloo does not tell a connection that was closed in good order from one that is silent).
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, pinned: bool = False, liveness: Liveness | None = None
    ) -> None:
        self._pinned = pinned
        self._liveness = liveness
        self._group = group if group is not None else dist.group.WORLD
        self.rank: int = dist.get_rank(self._group)
        self.ranks: int = dist.get_world_size(self._group)
        self._posts = 0
        self._packing = PackingCache(self.rank, self.ranks)
        self._buffers: dict[int, list[torch.Tensor]] = {}  # size in bytes -> messages to use again

    def post(self, collectives: Sequence[Collective], values: Mapping[str, torch.Tensor]) -> Pending:
        packing = self._packing(collectives)
        packing.check(values)
        tag = self._posts % _TAGS
        self._posts += 1
        receives: dict[int, tuple[torch.Tensor, Any]] = {}
        sends: dict[int, tuple[torch.Tensor, Any]] = {}
        # Receives first: a message that arrives before its receive was posted costs gloo a round trip.
        for peer, into in packing.incoming.items():
            message = self.buffer(into.nbytes)
            receives[peer] = (message, self._receive(message, peer, tag))
        for peer, out in packing.outgoing.items():
            message = self.buffer(out.nbytes)
            out.pack(values, message)
            sends[peer] = (message, self._send(message, peer, tag))
        return _GlooPending(self, packing, receives, sends, packing.begin(values))

    def exchange(
        self, sends: Mapping[int, torch.Tensor], sizes: Mapping[int, int]
    ) -> tuple[dict[int, tuple[torch.Tensor, Any]], list[tuple[int, torch.Tensor, Any]]]:
        """Start to send messages (uint8, of :meth:`buffer`) by rank, and to receive one of each of ``sizes`` bytes:
        the receives by rank, and the sends, as (message, work)."""
        tag = self._posts % _TAGS
        self._posts += 1
        receives: dict[int, tuple[torch.Tensor, Any]] = {}
        for peer, nbytes in sizes.items():
            message = self.buffer(nbytes)
            receives[peer] = (message, self._receive(message, peer, tag))
        return receives, [(peer, m, self._send(m, peer, tag)) for peer, m in sends.items()]

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        flat = _as_bytes(tensor)
        if flat.numel():
            self.guarded(lambda: dist.broadcast(flat, group=self._group, group_src=src), src)
        return flat.view(tensor.dtype).view(tensor.shape).to(tensor.device)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        flat = _as_bytes(tensor)
        if flat.numel() <= _SMALL:
            return [p.view(tensor.dtype).view(tensor.shape).to(tensor.device) for p in self._swap(flat)]
        parts = [torch.empty_like(flat) for _ in range(self.ranks)]
        self.guarded(lambda: dist.all_gather(parts, flat, group=self._group))
        return [p.view(tensor.dtype).view(tensor.shape).to(tensor.device) for p in parts]

    def _swap(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """All ranks' few bytes. Two ranks send to each other; of more, rank 0 collects and sends to all. Gloo's own
        ring takes twice as long for two ranks, and five times for four."""
        tag = self._posts % _TAGS
        self._posts += 1
        parts = [flat if p == self.rank else torch.empty_like(flat) for p in range(self.ranks)]
        others = [p for p in range(self.ranks) if p != self.rank]
        direct = self.ranks == 2
        receives = [(p, self._receive(parts[p], p, tag)) for p in others if direct or self.rank == 0]
        sends = [(p, self._send(flat, p, tag)) for p in others if direct or p == 0]
        for peer, work in (*receives, *sends):
            self.guarded(work.wait, peer)
        if self.ranks <= 2:
            return parts
        return list(self.broadcast(torch.stack(parts)).unbind(0))

    def barrier(self) -> None:
        self.guarded(lambda: dist.barrier(group=self._group))

    def close(self, patience: float = 5.0) -> None:
        """Meet the other ranks a last time, for at most ``patience`` seconds.

        A process that ends with unread messages resets its connections: what others have not read yet is lost.
        """
        self._buffers.clear()
        self._liveness = None  # whoever does not come is not missed
        # Not dist.barrier: it goes on in a thread, for which the process would wait at its end however long it takes.
        peers = [p for p in range(self.ranks) if p != self.rank]
        hello = torch.zeros(1, dtype=torch.uint8)
        answers = {p: torch.zeros(1, dtype=torch.uint8) for p in peers}
        deadline = time.monotonic() + patience
        with contextlib.suppress(TransportError):  # a rank that failed does not come: nothing is left to protect then
            works = [(p, self._receive(answers[p], p, _TAGS)) for p in peers]
            works += [(p, self._send(hello, p, _TAGS)) for p in peers]
            for peer, work in works:
                left = timedelta(seconds=max(0.001, deadline - time.monotonic()))
                self.guarded(functools.partial(work.wait, left), peer)

    def guarded(self, action: Callable[[], _T], peer: int | None = None) -> _T:
        """Run ``action``; a failure of gloo becomes one line that says which rank did not answer."""
        if self._liveness is not None:
            try:
                with self._liveness.waiting(self._global(peer), self._interrupt):
                    return action()
            except RuntimeError as e:
                raise self._liveness.lost(self._global(peer), _reason(e)) from e
        try:
            return action()
        except RuntimeError as e:
            who = "another rank" if peer is None else f"rank {peer}"
            raise TransportError(
                f"rank {self.rank} lost {who}: it ended, or did not answer in time ({_reason(e)}); see that rank's log"
            ) from e

    def _global(self, peer: int | None) -> int | None:
        """The rank as heartbeats count it: that of torch.distributed's default group."""
        if peer is None or self._group is None:
            return peer
        return int(dist.get_global_rank(self._group, peer))

    def _interrupt(self) -> None:
        """Make the waits of other threads fail: gloo ends all transfers of a group where one of them times out. One
        with a rank that is gone does not time out: so each is tried."""
        message = torch.zeros(1, dtype=torch.uint8)
        for peer in range(self.ranks):
            if peer != self.rank:
                with contextlib.suppress(RuntimeError):
                    work = dist.irecv(message, group=self._group, tag=_TAGS + 1, group_src=peer)
                    if work is not None:
                        work.wait(timedelta(milliseconds=1))

    def release(self, message: torch.Tensor) -> None:
        """Give a message's memory back for a later post."""
        self._buffers.setdefault(message.numel(), []).append(message)

    def buffer(self, nbytes: int) -> torch.Tensor:
        """Host memory for one message; :meth:`release` gives it back."""
        free = self._buffers.get(nbytes)
        return free.pop() if free else torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pinned)

    def _receive(self, message: torch.Tensor, peer: int, tag: int) -> Any:
        return self.guarded(lambda: dist.irecv(message, group=self._group, tag=tag, group_src=peer), peer)

    def _send(self, message: torch.Tensor, peer: int, tag: int) -> Any:
        return self.guarded(lambda: dist.isend(message, group=self._group, tag=tag, group_dst=peer), peer)


def _reason(error: Exception) -> str:
    """The telling part of a message of gloo, without source positions and advice."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^\]]*\]\s*", "", first).split(". This is typically")[0]


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A flat copy of ``tensor`` in host memory, as uint8: gloo does not know every dtype."""
    flat = torch.empty(tensor.nbytes, dtype=torch.uint8)
    if flat.numel():
        flat.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return flat


class _GlooPending:
    def __init__(
        self,
        transport: GlooTransport,
        packing: Packing,
        receives: dict[int, tuple[torch.Tensor, Any]],
        sends: dict[int, tuple[torch.Tensor, Any]],
        results: dict[str, torch.Tensor],
    ) -> None:
        self._transport, self._packing, self._results = transport, packing, results
        self._receives, self._sends = receives, sends

    def wait(self) -> dict[str, torch.Tensor]:
        if self._receives or self._sends:
            for peer, (_, work) in self._receives.items():
                self._transport.guarded(work.wait, peer)
            self._packing.finish(self._results, {p: m for p, (m, _) in self._receives.items()})
            for peer, (_, work) in self._sends.items():
                self._transport.guarded(work.wait, peer)
            for message, _ in (*self._receives.values(), *self._sends.values()):
                self._transport.release(message)
            self._receives, self._sends = {}, {}
        return self._results


_abandoned: list[Any] = []  # messages whose memory gloo may still write, kept for as long as the process lives


class GlooLink:
    """Routes over a :class:`GlooTransport`, staged through host memory: works everywhere, between processes that share
    a GPU, too, and waits on the host."""

    capturable = False
    symmetric_bytes = 0
    writes_remote = False

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, liveness: Liveness | None = None) -> None:
        self._device = device
        self._transport = GlooTransport(group, device.type == "cuda", liveness)
        self.rank, self.ranks = self._transport.rank, self._transport.ranks
        self.spans: Spans | None = None
        self._regions = 0
        self._waiting: dict[Route, tuple[dict[int, tuple[torch.Tensor, Any]], list[tuple[int, torch.Tensor, Any]]]] = {}

    def region(self, nbytes: int, words: int) -> Region:
        self._regions += 1
        return Region(self._regions - 1, allocate(nbytes, self._device), {}, words)

    def settle(self) -> None:
        """Nobody writes into a region from outside."""

    def begin(self, overlapped: bool) -> None:
        """Nothing is prepared."""

    def post(self, route: Route) -> None:
        with recorded(self.spans, "post", route.name, "compute", route.sent_bytes):
            messages = {}
            for peer, parts in route.outgoing.items():
                sources = [p.source for p in parts]
                messages[peer] = self._transport.buffer(_packed_bytes(sources))
                for piece, source in zip(_pieces(messages[peer], sources), sources, strict=True):
                    piece.copy_(source)
            sizes = {peer: _packed_bytes(places) for peer, places in route.incoming.items()}
            self._waiting[route] = self._transport.exchange(messages, sizes)
            for source, target in route.own:
                target.copy_(source)

    def ready(self, route: Route) -> bool:
        return True

    def wait(self, route: Route) -> None:
        receives, sends = self._waiting.pop(route)
        for peer, (message, work) in receives.items():
            self._transport.guarded(work.wait, peer)
            places = route.incoming[peer]
            for piece, target in zip(_pieces(message, places), places, strict=True):
                target.copy_(piece)
            self._transport.release(message)
        for peer, message, work in sends:
            self._transport.guarded(work.wait, peer)
            self._transport.release(message)

    def sent(self, route: Route) -> None:
        """What was posted lies in messages."""

    def join(self) -> None:
        """What was posted lies in messages."""

    def finish(self) -> None:
        """Each rank fills its regions itself, when it waits."""

    def together(self) -> bool:
        return True

    def close(self, patience: float = 5.0) -> None:
        """Complete what the last call posted, for at most ``patience`` seconds: gloo writes into its messages until it
        has arrived, wherever they are."""
        deadline = time.monotonic() + patience
        for receives, sends in self._waiting.values():
            works = [work for _, work in receives.values()] + [work for _, _, work in sends]
            try:
                for work in works:
                    work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
            except RuntimeError:  # another rank is gone
                _abandoned.append((receives, sends))
        self._waiting.clear()


def _packed_bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(aligned(t.nbytes) for t in tensors)


def _pieces(message: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The places in ``message`` of dense copies of ``tensors``, one after the other."""
    pieces, end = [], 0
    for t in tensors:
        pieces.append(message[end : end + t.nbytes].view(t.dtype).view(t.shape))
        end += aligned(t.nbytes)
    return pieces


def start_gloo(rank: int | None = None, ranks: int | None = None, start_timeout: float = 60.0) -> None:
    """Initialise torch.distributed with gloo, unless it is initialised: from the environment (RANK, WORLD_SIZE,
    MASTER_ADDR, MASTER_PORT). ``start_timeout`` bounds the meeting of all ranks, in seconds.

    Rank 0 listens at MASTER_ADDR alone, unless the launcher's store is used.
    """
    stay_on_machine()
    if dist.is_initialized():
        return
    limit = timedelta(seconds=start_timeout)
    given = {"RANK": rank, "WORLD_SIZE": ranks}
    own, world = (int(os.environ.get(name, -1)) if value is None else value for name, value in given.items())
    try:
        dist.init_process_group(
            "gloo", store=_store(own, world, start_timeout), rank=own, world_size=world, timeout=limit
        )
    except (RuntimeError, ValueError) as e:
        raise TransportError(f"the ranks did not meet within {start_timeout:g} s ({_reason(e)}): are all up?") from e


def _store(rank: int, ranks: int, timeout: float) -> Store | None:
    """The store at MASTER_ADDR, which rank 0 opens; None where PyTorch itself finds the launcher's."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or not host or not port.isdigit() or rank < 0:
        return None
    if rank != 0:
        return TCPStore(host, int(port), ranks, False, timedelta(seconds=timeout))
    try:
        return bind_store(host, int(port), timeout=timeout)[0]
    except OSError as e:
        raise LaunchError(
            f"rank 0 cannot listen at {host}:{port} ({e.strerror or e}): set MASTER_ADDR to an address of its machine, "
            "and MASTER_PORT to a port that is free"
        ) from e


def new_group(ranks: Sequence[int], timeout: float, backend: str = "gloo") -> dist.ProcessGroup:
    """A group of the given global ranks. All processes must call this, in the same order."""
    stay_on_machine()
    group: dist.ProcessGroup = dist.new_group(list(ranks), backend=backend, timeout=timedelta(seconds=timeout))
    return group
