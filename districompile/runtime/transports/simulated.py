# SPDX-License-Identifier: Apache-2.0
"""Channels between simulated ranks, which take turns in one process: for ``simulate``, ``verify`` and tests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from districompile.runtime.executor.arena import allocate
from districompile.runtime.trace import Spans
from districompile.runtime.transports.base import ReceiveBuffer, TransferPlan, coalesce, recorded


class SimulatedChannels:
    """Channels of ``ranks`` executors in one process, on one device.

    Each channel writes straight into the others' buffers, as copy engines do between GPUs. Signals are counted, so that
    a schedule that could overtake itself is detected.
    """

    def __init__(self, ranks: int, device: torch.device) -> None:
        self.ranks, self.device = ranks, device
        self.memory: list[list[torch.Tensor]] = []  # buffer -> by rank
        # buffer, signal slot, src, dst -> whether the call that posted it waits for it, and the number of calls that
        # src had finished before
        self.signals: dict[tuple[int, int, int, int], tuple[bool, int]] = {}
        self.acks: set[tuple[int, int | None, int, int]] = set()  # same key: src has read what dst overwrites
        self.held: dict[tuple[int, int, int, int], Callable[[], None]] = {}  # sends that wait for an ack
        self.finished = [0] * ranks  # calls, by rank
        self.channels = tuple(SimulatedChannel(self, rank) for rank in range(ranks))

    def clear(self) -> None:
        """Drop all transfers that are under way, after a call that failed half way."""
        self.signals.clear()
        self.acks.clear()
        self.held.clear()
        self.finished = [0] * self.ranks


class SimulatedChannel:
    """The channel of one rank of :class:`SimulatedChannels`."""

    symmetric_bytes = 0
    writes_remote = True

    def __init__(self, group: SimulatedChannels, rank: int) -> None:
        self.group, self.rank, self.ranks = group, rank, group.ranks
        self.capturable = group.ranks == 1  # else ranks take turns
        self.spans: Spans | None = None
        self._count = 0
        self._copies: dict[tuple[TransferPlan, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def receive_buffer(self, nbytes: int, signals: int) -> ReceiveBuffer:
        number, memory = self._count, self.group.memory
        self._count += 1
        if number == len(memory):
            memory.append([allocate(nbytes, self.group.device) for _ in range(self.ranks)])
        parts = memory[number]
        return ReceiveBuffer(number, parts[self.rank], {r: m for r, m in enumerate(parts) if r != self.rank}, signals)

    def settle(self) -> None:
        """Do nothing: simulated ranks prepare before any of them runs."""

    def begin(self, overlapped: bool) -> None:
        """Do nothing: there is nothing to prepare."""

    def post(self, transfer: TransferPlan) -> None:
        calls = self.group.finished[self.rank]
        with recorded(self.spans, "post", transfer.name, "transfer", transfer.sent_bytes):
            for source, target in transfer.own:
                target.copy_(source)
            for peer, parts in transfer.outgoing.items():
                if (transfer, peer) not in self._copies:
                    self._copies[transfer, peer] = coalesce(parts)
                copies = self._copies[transfer, peer]
                if transfer.needs_ack is not None and not self._is_acked(transfer, peer):
                    copies = [(source.clone(), target) for source, target in copies]
                    send = functools.partial(self._send, transfer, peer, copies, calls)
                    self.group.held[self._signal(transfer, peer)] = send
                else:
                    self._send(transfer, peer, copies, calls)
        if transfer.needs_ack is not None:
            for peer in transfer.incoming:
                self.group.acks.add((transfer.buffer.number, transfer.needs_ack, self.rank, peer))
                held = self.group.held.pop((transfer.buffer.number, transfer.signal_slot, peer, self.rank), None)
                if held is not None:
                    held()

    def _send(
        self, transfer: TransferPlan, peer: int, copies: Sequence[tuple[torch.Tensor, torch.Tensor]], calls: int
    ) -> None:  # fmt: skip
        """Copy and signal. ``calls`` is the number of calls that this rank had finished when it posted."""
        if transfer.needs_ack is not None:
            self.group.acks.remove((transfer.buffer.number, transfer.needs_ack, peer, self.rank))
        for source, target in copies:
            target.copy_(source)
        if self._signal(transfer, peer) in self.group.signals:
            raise RuntimeError(f"rank {self.rank} posts {transfer.name} again before rank {peer} has read it")
        self.group.signals[self._signal(transfer, peer)] = transfer.waited_in_call, calls

    def _signal(self, transfer: TransferPlan, peer: int) -> tuple[int, int, int, int]:
        return transfer.buffer.number, transfer.signal_slot, self.rank, peer

    def _is_acked(self, transfer: TransferPlan, peer: int) -> bool:
        """Return whether ``peer`` has read the memory that ``transfer`` overwrites there."""
        return (transfer.buffer.number, transfer.needs_ack, peer, self.rank) in self.group.acks

    def arrived(self, transfer: TransferPlan) -> bool:
        """Return whether every rank has posted ``transfer`` and, if it has no signal, ended the call that posted it."""
        found = [
            self.group.signals.get((transfer.buffer.number, transfer.signal_slot, p, self.rank))
            for p in transfer.incoming
        ]
        return all(
            s is not None and (s[0] or self.group.finished[p] > s[1])
            for p, s in zip(transfer.incoming, found, strict=True)
        )

    def ready(self, transfer: TransferPlan) -> bool:
        return True  # if not, that is a defect: see wait

    def wait(self, transfer: TransferPlan) -> None:
        if not self.arrived(transfer):
            raise RuntimeError(f"rank {self.rank} waits for {transfer.name}, which has not come so far from every rank")
        for peer in transfer.incoming:
            del self.group.signals[transfer.buffer.number, transfer.signal_slot, peer, self.rank]

    def sent(self, transfer: TransferPlan) -> None:
        """Do nothing: posted values have been copied already."""

    def join(self) -> None:
        """Do nothing: posted values have been copied already."""

    def finish(self) -> None:
        self.group.finished[self.rank] += 1

    def together(self) -> bool:
        return min(self.group.finished) >= self.group.finished[self.rank]

    def close(self) -> None:
        self._copies.clear()
