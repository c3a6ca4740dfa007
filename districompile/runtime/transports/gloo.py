# SPDX-License-Identifier: Apache-2.0
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

from districompile.errors import LaunchError, TransportError
from districompile.runtime.executor.arena import aligned, allocate
from districompile.runtime.processes.liveness import Liveness
from districompile.runtime.processes.loopback import stay_on_machine
from districompile.runtime.processes.store import Store, TCPStore, open_store
from districompile.runtime.trace import Spans
from districompile.runtime.transports.base import ReceiveBuffer, TransferPlan, recorded

_T = TypeVar("_T")
_SMALL = 1024  # bytes
_TAGS = 1 << 20  # few posts are under way at once, and only their tags have to differ


class GlooGroup:
    """A gloo process group with messages and small collectives through host memory. None is the default group.

    Several exchanges may be under way at once: each has its own tag, numbered alike on all ranks. If a rank is gone or
    does not answer, the others raise :class:`TransportError`. They raise it at once if ``liveness`` finds that rank,
    else after the group's timeout. Gloo itself cannot distinguish a closed connection from a silent one.
    """

    waits_on_host = True

    def __init__(
        self, group: dist.ProcessGroup | None = None, pinned: bool = False, liveness: Liveness | None = None
    ) -> None:
        self._pinned = pinned
        self._liveness = liveness
        self._group = group if group is not None else dist.group.WORLD
        self.rank: int = dist.get_rank(self._group)
        self.ranks: int = dist.get_world_size(self._group)
        self._posts = 0
        self._buffers: dict[int, list[torch.Tensor]] = {}  # size in bytes -> messages to reuse

    def exchange(
        self, sends: Mapping[int, torch.Tensor], sizes: Mapping[int, int]
    ) -> tuple[dict[int, tuple[torch.Tensor, Any]], list[tuple[int, torch.Tensor, Any]]]:
        """Start to send messages by rank, and to receive one from each rank of ``sizes``.

        Messages are uint8 tensors from :meth:`buffer`, and sizes are in bytes. Returns the receives by rank, as
        (message, work), and the sends, as (rank, message, work).
        """
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
        """Return a few bytes of each rank.

        Two ranks send to each other. With more, rank 0 collects and sends to all. Gloo's own ring takes twice as long
        for two ranks, and five times for four.
        """
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

        A process that ends with unread messages resets its connections. Messages that others have not read yet are then
        lost.
        """
        self._buffers.clear()
        self._liveness = None  # a rank that does not come is no failure here
        # Not dist.barrier: it goes on in a thread, which the process would wait for at its end without a time limit.
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
        """Run ``action``. Raise :class:`TransportError`, one line that names the rank, if gloo fails."""
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
        """Return the rank as heartbeats count it: that of torch.distributed's default group."""
        if peer is None or self._group is None:
            return peer
        return int(dist.get_global_rank(self._group, peer))

    def _interrupt(self) -> None:
        """Make the waits of other threads fail.

        Gloo ends all transfers of a group when one of them times out. A transfer with a rank that is gone does not time
        out, so each rank is tried.
        """
        message = torch.zeros(1, dtype=torch.uint8)
        for peer in range(self.ranks):
            if peer != self.rank:
                with contextlib.suppress(RuntimeError):
                    work = dist.irecv(message, group=self._group, tag=_TAGS + 1, group_src=peer)
                    if work is not None:
                        work.wait(timedelta(milliseconds=1))

    def release(self, message: torch.Tensor) -> None:
        """Return a message's memory for a later post."""
        self._buffers.setdefault(message.numel(), []).append(message)

    def buffer(self, nbytes: int) -> torch.Tensor:
        """Return host memory for one message. Give it back with :meth:`release`."""
        free = self._buffers.get(nbytes)
        return free.pop() if free else torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pinned)

    def _receive(self, message: torch.Tensor, peer: int, tag: int) -> Any:
        return self.guarded(lambda: dist.irecv(message, group=self._group, tag=tag, group_src=peer), peer)

    def _send(self, message: torch.Tensor, peer: int, tag: int) -> Any:
        return self.guarded(lambda: dist.isend(message, group=self._group, tag=tag, group_dst=peer), peer)


def _reason(error: Exception) -> str:
    """Return the informative part of a message of gloo, without source positions and advice."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^\]]*\]\s*", "", first).split(". This is typically")[0]


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a flat copy of ``tensor`` in host memory, as uint8, because gloo does not support every dtype."""
    flat = torch.empty(tensor.nbytes, dtype=torch.uint8)
    if flat.numel():
        flat.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return flat


_abandoned: list[Any] = []  # messages whose memory gloo may still write, kept for the life of the process


class GlooChannel:
    """Transfers over a :class:`GlooGroup`, staged through host memory, with waits on the host.

    It works everywhere, also between processes that share a GPU.
    """

    capturable = False
    symmetric_bytes = 0
    writes_remote = False

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, liveness: Liveness | None = None) -> None:
        self._device = device
        self._transport = GlooGroup(group, device.type == "cuda", liveness)
        self.rank, self.ranks = self._transport.rank, self._transport.ranks
        self.spans: Spans | None = None
        self._count = 0
        self._waiting: dict[
            TransferPlan, tuple[dict[int, tuple[torch.Tensor, Any]], list[tuple[int, torch.Tensor, Any]]]
        ] = {}

    def receive_buffer(self, nbytes: int, signals: int) -> ReceiveBuffer:
        self._count += 1
        return ReceiveBuffer(self._count - 1, allocate(nbytes, self._device), {}, signals)

    def settle(self) -> None:
        """Do nothing: no other rank writes into a buffer."""

    def begin(self, overlapped: bool) -> None:
        """Do nothing: there is nothing to prepare."""

    def post(self, transfer: TransferPlan) -> None:
        with recorded(self.spans, "post", transfer.name, "compute", transfer.sent_bytes):
            messages = {}
            for peer, parts in transfer.outgoing.items():
                sources = [p.source for p in parts]
                messages[peer] = self._transport.buffer(_packed_bytes(sources))
                for piece, source in zip(_pieces(messages[peer], sources), sources, strict=True):
                    piece.copy_(source)
            sizes = {peer: _packed_bytes(places) for peer, places in transfer.incoming.items()}
            self._waiting[transfer] = self._transport.exchange(messages, sizes)
            for source, target in transfer.own:
                target.copy_(source)

    def ready(self, transfer: TransferPlan) -> bool:
        return True

    def wait(self, transfer: TransferPlan) -> None:
        receives, sends = self._waiting.pop(transfer)
        for peer, (message, work) in receives.items():
            self._transport.guarded(work.wait, peer)
            places = transfer.incoming[peer]
            for piece, target in zip(_pieces(message, places), places, strict=True):
                target.copy_(piece)
            self._transport.release(message)
        for peer, message, work in sends:
            self._transport.guarded(work.wait, peer)
            self._transport.release(message)

    def sent(self, transfer: TransferPlan) -> None:
        """Do nothing: posted values are copied into messages."""

    def join(self) -> None:
        """Do nothing: posted values are copied into messages."""

    def finish(self) -> None:
        """Do nothing: each rank fills its own buffers, when it waits."""

    def together(self) -> bool:
        return True

    def close(self, patience: float = 5.0) -> None:
        """Complete the transfers that the last call posted, for at most ``patience`` seconds.

        Gloo writes into a message until it has arrived, even if its memory was freed.
        """
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
    """Return the views in ``message`` of dense copies of ``tensors``, one after the other."""
    pieces, end = [], 0
    for t in tensors:
        pieces.append(message[end : end + t.nbytes].view(t.dtype).view(t.shape))
        end += aligned(t.nbytes)
    return pieces


def start_gloo(rank: int | None = None, ranks: int | None = None, start_timeout: float = 60.0) -> None:
    """Initialise torch.distributed with gloo from the environment, unless it is initialised already.

    Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; ``rank`` and ``ranks``, if given, replace the first two.
    ``start_timeout`` limits, in seconds, how long the ranks may take to connect. Rank 0 listens at MASTER_ADDR alone,
    unless the launcher's store is used. Raises :class:`TransportError` if the ranks do not meet, and
    :class:`LaunchError` if rank 0 cannot listen.
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
    """Return the store at MASTER_ADDR, which rank 0 opens; None where PyTorch itself finds the launcher's."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or not host or not port.isdigit() or rank < 0:
        return None
    if rank != 0:
        return TCPStore(host, int(port), ranks, False, timedelta(seconds=timeout))
    try:
        return open_store(host, int(port), timeout=timeout)
    except OSError as e:
        raise LaunchError(
            f"rank 0 cannot listen at {host}:{port} ({e.strerror or e}): set MASTER_ADDR to an address of its machine, "
            "and MASTER_PORT to a port that is free"
        ) from e


def new_group(ranks: Sequence[int], timeout: float, backend: str = "gloo") -> dist.ProcessGroup:
    """Make a group of the given global ranks. All processes must call this, in the same order."""
    stay_on_machine()
    group: dist.ProcessGroup = dist.new_group(list(ranks), backend=backend, timeout=timedelta(seconds=timeout))
    return group
