"""Transports that pack what a ``Start`` sends: a mailbox for ranks in one process, and messages over gloo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from districompile.plan.plan import Collective
from districompile.runtime.transports.gloo import GlooGroup
from tests.reference.packing import Packing, PackingCache, Pending


class DynamicGroup:
    """``ranks`` transports that share a mailbox. Step all ranks in turn: who waits must find what it waits for."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.mail: dict[tuple[int, int, int], torch.Tensor] = {}  # (post, src, dst) -> message
        self.transports = tuple(DynamicTransport(self, rank) for rank in range(ranks))

    def clear(self) -> None:
        """Forget what is under way, after a call that failed half way."""
        self.mail.clear()
        for transport in self.transports:
            transport.posts = 0

    def take(self, post: int, src: int, dst: int) -> torch.Tensor:
        message = self.mail.pop((post, src, dst), None)
        if message is None:
            raise RuntimeError(f"rank {dst} waits for post {post} of rank {src}, which has not come so far")
        return message


class DynamicTransport:
    """The transport of one rank of a :class:`DynamicGroup`."""

    def __init__(self, group: DynamicGroup, rank: int) -> None:
        self.group, self.rank, self.ranks = group, rank, group.ranks
        self.posts = 0
        self._packing = PackingCache(rank, group.ranks)

    def post(self, collectives: Sequence[Collective], values: Mapping[str, torch.Tensor]) -> Pending:
        packing = self._packing(collectives)
        packing.check(values)
        for peer, out in packing.outgoing.items():
            message = torch.empty(out.nbytes, dtype=torch.uint8, device=values[out.slots[0].source].device)
            out.pack(values, message)
            self.group.mail[self.posts, self.rank, peer] = message
        self.posts += 1
        return _DynamicPending(self.group, packing, self.posts - 1, packing.begin(values))

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Every rank is called with the same tensor here."""
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        raise NotImplementedError("ranks in lockstep see each other's tensors: nothing to gather")

    def barrier(self) -> None:
        """Ranks in lockstep are always together."""

    def close(self) -> None:
        """Nothing is held."""


class _DynamicPending:
    def __init__(self, group: DynamicGroup, packing: Packing, post: int, results: dict[str, torch.Tensor]) -> None:
        self._group, self._packing, self._post, self._results = group, packing, post, results
        self._done = False

    def wait(self) -> dict[str, torch.Tensor]:
        if not self._done:
            messages = {p: self._group.take(self._post, p, self._packing.rank) for p in self._packing.incoming}
            self._packing.finish(self._results, messages)
            self._done = True
        return self._results


class PackedGloo(GlooGroup):
    """A gloo group that packs what a ``Start`` sends to one rank into one message."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(group)
        self._packing = PackingCache(self.rank, self.ranks)

    def post(self, collectives: Sequence[Collective], values: Mapping[str, torch.Tensor]) -> Pending:
        packing = self._packing(collectives)
        packing.check(values)
        messages = {}
        for peer, out in packing.outgoing.items():
            messages[peer] = self.buffer(out.nbytes)
            out.pack(values, messages[peer])
        receives, sends = self.exchange(messages, {peer: m.nbytes for peer, m in packing.incoming.items()})
        return _GlooPending(
            self, packing, receives, {peer: (m, work) for peer, m, work in sends}, packing.begin(values)
        )


class _GlooPending:
    def __init__(
        self,
        transport: PackedGloo,
        packing: Packing,
        receives: dict[int, tuple[torch.Tensor, dist.Work]],
        sends: dict[int, tuple[torch.Tensor, dist.Work]],
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
