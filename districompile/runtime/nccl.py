"""Transfers over NCCL: grouped sends and receives of exactly what is wanted, on a communicator and stream of their own.

The portable transport between GPUs (PCIe, several nodes). One ``Post`` is one group: NCCL carries its pieces together.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from districompile.runtime.arena import allocate
from districompile.runtime.gloo import GlooTransport
from districompile.runtime.links import Region, Route, recorded
from districompile.runtime.liveness import Liveness
from districompile.runtime.trace import Spans


class NcclCollectives:
    """Broadcasts and gathers of device tensors in ``group`` (an NCCL group), on the current stream: the host does not
    wait."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        dist.all_reduce(torch.zeros(1, device=device), group=group)

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """``tensor`` (uint8) of rank ``src``, in place."""
        dist.broadcast(tensor, group=self._group, group_src=src)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all ranks, in rank order. All pass the same shape and dtype."""
        flat = _flat(tensor.contiguous())
        gathered = torch.empty((dist.get_world_size(self._group), flat.numel()), dtype=torch.uint8, device=self._device)
        dist.all_gather_into_tensor(gathered, flat, group=self._group)
        return [row.view(tensor.dtype).view(tensor.shape) for row in gathered]


class NcclLink:
    """The link of this process in ``group`` (an NCCL group that nobody else uses); ``host`` is the same ranks' gloo
    transport. All of a ``Post`` is received before the call ends."""

    capturable = True
    symmetric_bytes = 0
    writes_remote = False

    def __init__(self, group: dist.ProcessGroup, host: GlooTransport, device: torch.device, liveness: Liveness) -> None:
        self._group, self._host, self._device, self._liveness = group, host, device, liveness
        self.rank, self.ranks = host.rank, host.ranks
        self.spans: Spans | None = None
        self._side = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._done: dict[Route, torch.cuda.Event] = {}  # of this call
        self._posted = False
        self._regions = 0
        with torch.cuda.stream(self._side):  # connects all ranks: not to be done while a graph is captured
            dist.all_reduce(torch.zeros(1, device=device), group=group)
        self.settle()

    def region(self, nbytes: int, words: int) -> Region:
        self._regions += 1
        return Region(self._regions - 1, allocate(nbytes, self._device), {}, words)

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)
        self._host.barrier()

    def begin(self, overlapped: bool) -> None:
        """Nothing is prepared."""

    def post(self, route: Route) -> None:
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        self._posted = True
        with torch.cuda.stream(self._side), recorded(self.spans, "post", route.name, "transfer", route.sent_bytes):
            for source, target in route.own:
                target.copy_(source)
            operations = []
            received: list[tuple[torch.Tensor, torch.Tensor]] = []  # that do not lie where they belong
            for peer, parts in route.outgoing.items():
                for part in parts:
                    flat = _flat(part.source.contiguous())
                    operations.append(dist.P2POp(dist.isend, flat, group=self._group, group_peer=peer))
            for peer, places in route.incoming.items():
                for place in places:
                    memory = place if place.is_contiguous() else torch.empty(
                        place.shape, dtype=place.dtype, device=place.device
                    )  # fmt: skip
                    if memory is not place:
                        received.append((memory, place))
                    operations.append(dist.P2POp(dist.irecv, _flat(memory), group=self._group, group_peer=peer))
            if operations:
                for work in dist.batch_isend_irecv(operations):
                    work.wait()  # of the side stream, not of the host
            for memory, place in received:
                place.copy_(memory)
        self._done[route] = self._side.record_event()

    def ready(self, route: Route) -> bool:
        return True

    def wait(self, route: Route) -> None:
        self.sent(route)

    def sent(self, route: Route) -> None:
        if route in self._done:  # else it was posted in an earlier call, which has waited for it
            torch.cuda.current_stream(self._device).wait_event(self._done.pop(route))

    def join(self) -> None:
        if self._posted:
            torch.cuda.current_stream(self._device).wait_stream(self._side)
            self._posted = False
        self._done.clear()

    def finish(self) -> None:
        """Receives are this rank's own work: nobody else writes into its regions."""
        self._liveness.watch(torch.cuda.current_stream(self._device).record_event())

    def together(self) -> bool:
        return True

    def close(self) -> None:
        self._done.clear()


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
