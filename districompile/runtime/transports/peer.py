# SPDX-License-Identifier: Apache-2.0
"""Transfers by the GPUs' copy engines: each rank writes into the others' memory, and signals when it is done.

Buffers are PyTorch's symmetric memory (``torch.distributed._symmetric_memory``), without multicast. Signals are words
in the same memory. The streams themselves write them and wait for them (``cuStreamBatchMemOp``), so that neither the
host nor a kernel takes part, and a CUDA graph may contain them. A stream's wait for a signal has no time limit; the
watch over the ranks (:mod:`districompile.runtime.processes.liveness`) adds one. If nothing is computed meanwhile, a
kernel copies instead: it starts sooner than a copy engine.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from districompile.cuda.driver import DriverError, MemoryOperation, call
from districompile.cuda.exchange import fits, kernels
from districompile.errors import LaunchError
from districompile.runtime.executor.arena import aligned
from districompile.runtime.processes.liveness import Liveness
from districompile.runtime.trace import Spans
from districompile.runtime.transports.base import ReceiveBuffer, TransferPlan, coalesce, recorded
from districompile.runtime.transports.gloo import GlooGroup

_WORD = 4  # bytes
_AT_LEAST, _EQUAL = 0, 1  # CU_STREAM_WAIT_VALUE_GEQ (modulo 2^32), CU_STREAM_WAIT_VALUE_EQ
_WAIT, _WRITE = 1, 2  # CU_STREAM_MEM_OP_WAIT_VALUE_32, CU_STREAM_MEM_OP_WRITE_VALUE_32


class PeerChannel:
    """The channel of this process in ``group`` (a gloo group of ranks with a GPU each, on one host).

    Raises :class:`LaunchError` if symmetric memory cannot be set up. If ``liveness`` finds that another rank is lost,
    the process ends: nothing else stops a stream.
    """

    capturable = True
    writes_remote = True

    def __init__(self, group: dist.ProcessGroup, device: torch.device, liveness: Liveness) -> None:
        self._group, self._device, self._liveness = group, device, liveness
        self._host = GlooGroup(group, liveness=liveness)
        self.rank, self.ranks = self._host.rank, self._host.ranks
        self._peers = [(self.rank + i) % self.ranks for i in range(1, self.ranks)]  # not all to one rank first
        self.spans: Spans | None = None
        # Above the compute stream's priority, because the compute stream waits for a late transfer.
        self._side = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._buffers: list[tuple[ReceiveBuffer, Any, int]] = []  # with its handle, and the offset of its signals
        self._kernels = kernels(device)
        self._copies: dict[TransferPlan, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._sent: dict[TransferPlan, torch.cuda.Event] = {}  # in this call
        self._forked = False  # whether the side stream follows the compute stream, since the last join
        self._calls = 0
        self._control = self.receive_buffer(0, 1)
        self.settle()

    def receive_buffer(self, nbytes: int, signals: int) -> ReceiveBuffer:
        start = aligned(nbytes)
        memory, handle = self._symmetric(start + aligned(max(1, signals * self.ranks * _WORD)))
        memory.zero_()
        remote = {p: handle.get_buffer(p, (memory.numel(),), torch.uint8) for p in self._peers}
        buffer = ReceiveBuffer(len(self._buffers), memory, remote, signals)
        self._buffers.append((buffer, handle, start))
        return buffer

    def _symmetric(self, nbytes: int) -> tuple[torch.Tensor, Any]:
        import torch.distributed._symmetric_memory as symmetric

        try:
            memory = symmetric.empty(nbytes, dtype=torch.uint8, device=self._device)
            return memory, symmetric.rendezvous(memory, self._group.group_name)
        except RuntimeError as e:
            reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
            raise LaunchError(
                f"the peer transport cannot share memory between GPUs ({reason}): use --transport nccl"
            ) from e

    @property
    def symmetric_bytes(self) -> int:
        return sum(buffer.local.nbytes for buffer, _, _ in self._buffers)

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)
        self._host.barrier()

    def begin(self, overlapped: bool) -> None:
        if overlapped:
            self._fork()

    def post(self, transfer: TransferPlan) -> None:
        if transfer not in self._copies:
            outgoing = [transfer.outgoing[p] for p in self._peers if p in transfer.outgoing]
            coalesced = [pair for parts in outgoing for pair in coalesce(parts)]
            self._copies[transfer] = [*transfer.own, *coalesced]
        if transfer.exposed:  # nothing would run beside it, so that a second stream gains nothing
            self._send_exposed(transfer) if self._by_kernel(transfer) else self._send(transfer, "compute")
            return
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        self._forked = True
        with torch.cuda.stream(self._side):
            self._send(transfer, "transfer")
        self._sent[transfer] = self._side.record_event()

    def _send(self, transfer: TransferPlan, lane: str) -> None:
        """Copy and signal on the current stream."""
        if transfer.needs_ack is not None:
            given = [self._address(transfer.buffer, transfer.needs_ack, self.rank, p) for p in transfer.incoming]
            self._signal([(_WRITE, address, 1, 0) for address in given])
            awaited = [self._address(transfer.buffer, transfer.needs_ack, p, self.rank) for p in transfer.outgoing]
            self._signal([op for a in awaited for op in ((_WAIT, a, 1, _EQUAL), (_WRITE, a, 0, 0))])
        with recorded(self.spans, "post", transfer.name, lane, transfer.sent_bytes):
            for source, target in self._copies[transfer]:
                target.copy_(source)
            self._signal([(_WRITE, address, 1, 0) for address in self._signals(transfer)])

    def _send_exposed(self, transfer: TransferPlan) -> None:
        """Copy with one kernel, which also waits for the other ranks' rows.

        It starts sooner than a copy engine, and a CUDA graph continues sooner after it than after a signal.
        """
        assert self._kernels is not None
        with recorded(self.spans, "post", transfer.name, "compute", transfer.sent_bytes):
            pairs = self._copies[transfer]
            for source, target in pairs:
                if not _dense((source, target)):
                    target.copy_(source)
            self._kernels.exchange(list(filter(_dense, pairs)), self._signals(transfer), self._awaited(transfer))

    def _by_kernel(self, transfer: TransferPlan) -> bool:
        if self._kernels is None or not transfer.exposed or transfer.needs_ack is not None:
            return False
        return fits(self._copies[transfer], self._signals(transfer), self._awaited(transfer))

    def _signals(self, transfer: TransferPlan) -> list[int]:
        """Return the addresses of the other ranks' signals that announce ``transfer``.

        There are none if the next call waits for it: it has arrived when the call that posts it is finished.
        """
        peers = transfer.outgoing if transfer.waited_in_call else ()
        return [self._address(transfer.buffer, transfer.signal_slot, self.rank, p) for p in peers]

    def _awaited(self, transfer: TransferPlan) -> list[int]:
        peers = transfer.incoming if transfer.waited_in_call else ()
        return [self._address(transfer.buffer, transfer.signal_slot, p, self.rank) for p in peers]

    def ready(self, transfer: TransferPlan) -> bool:
        return True

    def wait(self, transfer: TransferPlan) -> None:
        if not self._by_kernel(transfer):
            self._signal([op for a in self._awaited(transfer) for op in ((_WAIT, a, 1, _EQUAL), (_WRITE, a, 0, 0))])
        self.sent(transfer)

    def sent(self, transfer: TransferPlan) -> None:
        if transfer in self._sent:  # posted in this call
            torch.cuda.current_stream(self._device).wait_event(self._sent.pop(transfer))

    def join(self) -> None:
        if self._forked:
            torch.cuda.current_stream(self._device).wait_stream(self._side)
            self._forked = False
        self._sent.clear()

    def _fork(self) -> None:
        """Make the side stream begin with the call.

        When it began with the first transfer, traces showed that a CUDA graph made the compute stream wait for that
        transfer, and for no other.
        """
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            self._signal([(_WRITE, self._address(self._control, 0, self.rank, self.rank), 0, 0)])  # never read
        self._forked = True

    def finish(self) -> None:
        self._calls += 1
        own = [self._address(self._control, 0, self.rank, p) for p in self._peers]
        others = [self._address(self._control, 0, p, self.rank) for p in self._peers]
        self._signal([(_WRITE, address, self._calls, 0) for address in own])
        self._signal([(_WAIT, address, self._calls, _AT_LEAST) for address in others])
        self._liveness.watch(torch.cuda.current_stream(self._device).record_event())

    def share(self, buffer: ReceiveBuffer, number: int, message: torch.Tensor) -> torch.Tensor:
        """Return rank 0's ``message`` (uint8) on all ranks.

        It is the ``number``-th message in ``buffer``, which serves this purpose alone.
        """
        if self.rank != 0:
            self._signal([(_WAIT, self._address(buffer, 0, 0, self.rank), number, _AT_LEAST)])
            return buffer.local[: message.numel()]
        for p in self._peers:
            buffer.remote[p][: message.numel()].copy_(message)
        self._signal([(_WRITE, self._address(buffer, 0, 0, p), number, 0) for p in self._peers])
        return message

    def together(self) -> bool:
        return True

    def close(self, patience: float = 5.0) -> None:
        """Wait for the queued work, for at most ``patience`` seconds. No rank writes here once all have done so."""
        done = torch.cuda.current_stream(self._device).record_event()
        deadline = time.monotonic() + patience
        while not done.query() and time.monotonic() < deadline:
            time.sleep(0.001)
        self._copies.clear()

    def _address(self, buffer: ReceiveBuffer, word: int, src: int, at: int) -> int:
        """Return the address at which rank ``src`` signals ``word`` in the memory of rank ``at``."""
        memory = buffer.local if at == self.rank else buffer.remote[at]
        return memory.data_ptr() + self._buffers[buffer.number][2] + (word * self.ranks + src) * _WORD

    def _signal(self, operations: Sequence[tuple[int, int, int, int]]) -> None:
        """Write words and wait for words (operation, address, value, flags) on the current stream, in order.

        Earlier work of the stream is visible to all devices once a word is (no CU_STREAM_WRITE_VALUE_NO_BARRIER).
        """
        if not operations:
            return
        batch = (MemoryOperation * len(operations))()
        for parameters, (operation, address, value, flags) in zip(batch, operations, strict=True):
            parameters.operation, parameters.address = operation, address
            parameters.value, parameters.flags = value & 0xFFFFFFFF, flags
        try:
            call("cuStreamBatchMemOp_v2", ctypes.c_void_p(self._stream()), len(operations), batch, 0)
        except DriverError as e:
            raise LaunchError(f"the peer transport cannot signal ({e}): use --transport nccl") from e

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self._device).cuda_stream)


class PeerShares:
    """Broadcast up to ``nbytes`` from rank 0 to the GPUs of all ranks of ``channel``.

    A message may be overwritten once every rank has finished the call that it belongs to (:meth:`PeerChannel.finish`).
    All ranks construct it alike, and call :meth:`PeerChannel.settle` before its first use.
    """

    def __init__(self, channel: PeerChannel, nbytes: int) -> None:
        self._channel, self._buffer = channel, channel.receive_buffer(nbytes, 1)
        self._number = 0

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return ``tensor`` (uint8) of rank 0, on the current stream.

        On other ranks only the size of ``tensor`` counts.
        """
        self._number += 1
        return self._channel.share(self._buffer, self._number, tensor)


def _dense(pair: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(t.is_contiguous() for t in pair)
