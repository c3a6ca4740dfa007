"""Transfers by the GPUs' copy engines: each rank writes into the others' memory, and signals when it has.

Regions are PyTorch's symmetric memory (``torch.distributed._symmetric_memory``), without multicast. Signals are words
in the same memory, written and waited for by the streams themselves (``cuStreamBatchMemOp``), so that neither the host
nor a kernel takes part, and a CUDA graph may hold them. A stream that waits for a signal waits for ever; the watch
over the ranks (:mod:`districompile.runtime.liveness`) bounds that. Where nothing is computed meanwhile, a kernel copies
instead: it starts sooner than a copy engine.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from districompile.driver import DriverError, MemoryOperation, call
from districompile.errors import LaunchError
from districompile.runtime.arena import aligned
from districompile.runtime.gloo import GlooTransport
from districompile.runtime.kernels import fits, kernels
from districompile.runtime.links import Region, Route, coalesce, recorded
from districompile.runtime.liveness import Liveness
from districompile.runtime.trace import Spans

_WORD = 4  # bytes
_AT_LEAST, _EQUAL = 0, 1  # CU_STREAM_WAIT_VALUE_GEQ (modulo 2^32), CU_STREAM_WAIT_VALUE_EQ
_WAIT, _WRITE = 1, 2  # CU_STREAM_MEM_OP_WAIT_VALUE_32, CU_STREAM_MEM_OP_WRITE_VALUE_32


class PeerLink:
    """The link of this process in ``group`` (a gloo group of ranks with a GPU each, on one host).

    Raises :class:`LaunchError` where symmetric memory cannot be set up. Where ``liveness`` finds that another rank is
    lost, the process ends: nothing else stops a stream.
    """

    capturable = True
    writes_remote = True

    def __init__(self, group: dist.ProcessGroup, device: torch.device, liveness: Liveness) -> None:
        self._group, self._device, self._liveness = group, device, liveness
        self._host = GlooTransport(group, liveness=liveness)
        self.rank, self.ranks = self._host.rank, self._host.ranks
        self._peers = [(self.rank + i) % self.ranks for i in range(1, self.ranks)]  # not all to one rank at first
        self.spans: Spans | None = None
        # Above the compute stream's priority: a transfer that is late is waited for
        self._side = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._regions: list[tuple[Region, Any, int]] = []  # with its handle, and where its signals start
        self._kernels = kernels(device)
        self._copies: dict[Route, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._sent: dict[Route, torch.cuda.Event] = {}  # of this call
        self._forked = False  # the side stream follows the compute stream, since the last join
        self._calls = 0
        self._control = self.region(0, 1)
        self.settle()

    def region(self, nbytes: int, words: int) -> Region:
        start = aligned(nbytes)
        memory, handle = self._symmetric(start + aligned(max(1, words * self.ranks * _WORD)))
        memory.zero_()
        remote = {p: handle.get_buffer(p, (memory.numel(),), torch.uint8) for p in self._peers}
        region = Region(len(self._regions), memory, remote, words)
        self._regions.append((region, handle, start))
        return region

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
        return sum(region.local.nbytes for region, _, _ in self._regions)

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)
        self._host.barrier()

    def begin(self, overlapped: bool) -> None:
        if overlapped:
            self._fork()

    def post(self, route: Route) -> None:
        if route not in self._copies:
            coalesced = [pair for p in self._peers if p in route.outgoing for pair in coalesce(route.outgoing[p])]
            self._copies[route] = [*route.own, *coalesced]
        if route.at_once:  # nothing would run beside it: no other stream to wait for
            self._send_at_once(route) if self._by_kernel(route) else self._send(route, "compute")
            return
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        self._forked = True
        with torch.cuda.stream(self._side):
            self._send(route, "transfer")
        self._sent[route] = self._side.record_event()

    def _send(self, route: Route, lane: str) -> None:
        """On the current stream."""
        if route.meets is not None:
            told = [self._address(route.region, route.meets, self.rank, p) for p in route.incoming]
            self._signal([(_WRITE, address, 1, 0) for address in told])
            heard = [self._address(route.region, route.meets, p, self.rank) for p in route.outgoing]
            self._signal([op for a in heard for op in ((_WAIT, a, 1, _EQUAL), (_WRITE, a, 0, 0))])
        with recorded(self.spans, "post", route.name, lane, route.sent_bytes):
            for source, target in self._copies[route]:
                target.copy_(source)
            self._signal([(_WRITE, address, 1, 0) for address in self._signals(route)])

    def _send_at_once(self, route: Route) -> None:
        """By one kernel, which waits for what the others send on the route, too: it starts sooner than a copy engine,
        and a CUDA graph passes on from it sooner than from a signal."""
        assert self._kernels is not None
        with recorded(self.spans, "post", route.name, "compute", route.sent_bytes):
            pairs = self._copies[route]
            for source, target in pairs:
                if not _dense((source, target)):
                    target.copy_(source)
            self._kernels.exchange(list(filter(_dense, pairs)), self._signals(route), self._awaited(route))

    def _by_kernel(self, route: Route) -> bool:
        if self._kernels is None or not route.at_once or route.meets is not None:
            return False
        return fits(self._copies[route], self._signals(route), self._awaited(route))

    def _signals(self, route: Route) -> list[int]:
        """Words of the others that tell them of ``route``; none where it has arrived once this rank's call is finished,
        which is soon enough."""
        peers = route.outgoing if route.answered else ()
        return [self._address(route.region, route.word, self.rank, p) for p in peers]

    def _awaited(self, route: Route) -> list[int]:
        peers = route.incoming if route.answered else ()
        return [self._address(route.region, route.word, p, self.rank) for p in peers]

    def ready(self, route: Route) -> bool:
        return True

    def wait(self, route: Route) -> None:
        if not self._by_kernel(route):
            self._signal([op for a in self._awaited(route) for op in ((_WAIT, a, 1, _EQUAL), (_WRITE, a, 0, 0))])
        self.sent(route)

    def sent(self, route: Route) -> None:
        if route in self._sent:  # posted in this call
            torch.cuda.current_stream(self._device).wait_event(self._sent.pop(route))

    def join(self) -> None:
        if self._forked:
            torch.cuda.current_stream(self._device).wait_stream(self._side)
            self._forked = False
        self._sent.clear()

    def _fork(self) -> None:
        """Let the side stream begin with the call. Where it began with the first transfer, a CUDA graph let the compute
        stream wait for that transfer, and for no other: seen in traces."""
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            self._signal([(_WRITE, self._address(self._control, 0, self.rank, self.rank), 0, 0)])  # nobody reads it
        self._forked = True

    def finish(self) -> None:
        self._calls += 1
        own = [self._address(self._control, 0, self.rank, p) for p in self._peers]
        others = [self._address(self._control, 0, p, self.rank) for p in self._peers]
        self._signal([(_WRITE, address, self._calls, 0) for address in own])
        self._signal([(_WAIT, address, self._calls, _AT_LEAST) for address in others])
        self._liveness.watch(torch.cuda.current_stream(self._device).record_event())

    def share(self, region: Region, number: int, message: torch.Tensor) -> torch.Tensor:
        """Rank 0's ``message`` (uint8), on all ranks, the ``number``-th in ``region``, which is for nothing else."""
        if self.rank != 0:
            self._signal([(_WAIT, self._address(region, 0, 0, self.rank), number, _AT_LEAST)])
            return region.local[: message.numel()]
        for p in self._peers:
            region.remote[p][: message.numel()].copy_(message)
        self._signal([(_WRITE, self._address(region, 0, 0, p), number, 0) for p in self._peers])
        return message

    def together(self) -> bool:
        return True

    def close(self, patience: float = 5.0) -> None:
        """Wait for what is queued, for at most ``patience`` seconds; nobody writes here once all ranks have."""
        done = torch.cuda.current_stream(self._device).record_event()
        deadline = time.monotonic() + patience
        while not done.query() and time.monotonic() < deadline:
            time.sleep(0.001)
        self._copies.clear()

    def _address(self, region: Region, word: int, src: int, at: int) -> int:
        """Where rank ``src`` signals ``word`` in the memory of rank ``at``."""
        memory = region.local if at == self.rank else region.remote[at]
        return memory.data_ptr() + self._regions[region.number][2] + (word * self.ranks + src) * _WORD

    def _signal(self, operations: Sequence[tuple[int, int, int, int]]) -> None:
        """Write words and wait for words (operation, address, value, flags) on the current stream, in order. What the
        stream did before is visible to all devices once a word is (no CU_STREAM_WRITE_VALUE_NO_BARRIER)."""
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
    """Rank 0's bytes, up to ``nbytes`` of them, on the GPUs of all ranks of ``link``. A message may be overwritten once
    every rank has finished the call that it belongs to (:meth:`PeerLink.finish`). All ranks construct it alike, and
    :meth:`PeerLink.settle` before its first use."""

    def __init__(self, link: PeerLink, nbytes: int) -> None:
        self._link, self._region = link, link.region(nbytes, 1)
        self._number = 0

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` (uint8) of rank 0 on every rank; of others, its size alone counts. Works on the current stream."""
        self._number += 1
        return self._link.share(self._region, self._number, tensor)


def _dense(pair: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(t.is_contiguous() for t in pair)
