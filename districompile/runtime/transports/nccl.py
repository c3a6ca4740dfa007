# SPDX-License-Identifier: Apache-2.0
"""Transfers over NCCL: grouped sends and receives of exactly the rows needed, on a separate communicator and stream.

This is the portable transport between GPUs (PCIe, several nodes). One ``Start`` is one group: NCCL carries its slices
together.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from districompile.runtime.executor.arena import allocate
from districompile.runtime.processes.liveness import Liveness
from districompile.runtime.trace import Spans
from districompile.runtime.transports.base import ReceiveBuffer, TransferPlan, recorded
from districompile.runtime.transports.gloo import GlooGroup


class NcclCollectives:
    """Broadcast and gather device tensors in ``group`` (an NCCL group), on the current stream.

    The host does not wait.
    """

    waits_on_host = False

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        dist.all_reduce(torch.zeros(1, device=device), group=group)

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Broadcast ``tensor`` (uint8) of rank ``src``, in place."""
        dist.broadcast(tensor, group=self._group, group_src=src)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors of all ranks, in rank order. All pass the same shape and dtype."""
        flat = _flat(tensor.contiguous())
        gathered = torch.empty((dist.get_world_size(self._group), flat.numel()), dtype=torch.uint8, device=self._device)
        dist.all_gather_into_tensor(gathered, flat, group=self._group)
        return [row.view(tensor.dtype).view(tensor.shape) for row in gathered]


class NcclChannel:
    """The channel of this process in ``group``, an NCCL group for this channel alone.

    ``host`` is the gloo group of the same ranks. Every ``Start`` is received completely before the call ends.
    """

    capturable = True
    symmetric_bytes = 0
    writes_remote = False

    def __init__(self, group: dist.ProcessGroup, host: GlooGroup, device: torch.device, liveness: Liveness) -> None:
        self._group, self._host, self._device, self._liveness = group, host, device, liveness
        self.rank, self.ranks = host.rank, host.ranks
        self.spans: Spans | None = None
        self._side = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._done: dict[TransferPlan, torch.cuda.Event] = {}  # of this call
        self._posted = False
        self._count = 0
        with torch.cuda.stream(self._side):  # connects all ranks, which must not happen while a graph is captured
            dist.all_reduce(torch.zeros(1, device=device), group=group)
        self.settle()

    def receive_buffer(self, nbytes: int, signals: int) -> ReceiveBuffer:
        self._count += 1
        return ReceiveBuffer(self._count - 1, allocate(nbytes, self._device), {}, signals)

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)
        self._host.barrier()

    def begin(self, overlapped: bool) -> None:
        """Do nothing: there is nothing to prepare."""

    def post(self, transfer: TransferPlan) -> None:
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        self._posted = True
        span = recorded(self.spans, "post", transfer.name, "transfer", transfer.sent_bytes)
        with torch.cuda.stream(self._side), span:
            for source, target in transfer.own:
                target.copy_(source)
            operations = []
            received: list[tuple[torch.Tensor, torch.Tensor]] = []  # (temporary, destination)
            for peer, parts in transfer.outgoing.items():
                for part in parts:
                    flat = _flat(part.source.contiguous())
                    operations.append(dist.P2POp(dist.isend, flat, group=self._group, group_peer=peer))
            for peer, places in transfer.incoming.items():
                for place in places:
                    memory = place if place.is_contiguous() else torch.empty(
                        place.shape, dtype=place.dtype, device=place.device
                    )  # fmt: skip
                    if memory is not place:
                        received.append((memory, place))
                    operations.append(dist.P2POp(dist.irecv, _flat(memory), group=self._group, group_peer=peer))
            if operations:
                for work in dist.batch_isend_irecv(operations):
                    work.wait()  # the side stream waits, not the host
            for memory, place in received:
                place.copy_(memory)
        self._done[transfer] = self._side.record_event()

    def ready(self, transfer: TransferPlan) -> bool:
        return True

    def wait(self, transfer: TransferPlan) -> None:
        self.sent(transfer)

    def sent(self, transfer: TransferPlan) -> None:
        if transfer in self._done:  # else an earlier call posted it, and has waited for it
            torch.cuda.current_stream(self._device).wait_event(self._done.pop(transfer))

    def join(self) -> None:
        if self._posted:
            torch.cuda.current_stream(self._device).wait_stream(self._side)
            self._posted = False
        self._done.clear()

    def finish(self) -> None:
        """Watch the queued work. Receives are this rank's own work: no other rank writes into its buffers."""
        self._liveness.watch(torch.cuda.current_stream(self._device).record_event())

    def together(self) -> bool:
        return True

    def close(self) -> None:
        self._done.clear()


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
