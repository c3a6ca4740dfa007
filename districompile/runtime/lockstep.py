"""All ranks in one process, a step at a time: for ``verify``, ``simulate`` and tests. Messages go through a mailbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from districompile.ir.plan import Collective
from districompile.runtime.transport import Packing, PackingCache, Pending


class LockstepGroup:
    """``ranks`` transports that share a mailbox. Step all ranks in turn: who waits must find what it waits for."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.mail: dict[tuple[int, int, int], torch.Tensor] = {}  # (post, src, dst) -> message
        self.transports = tuple(LockstepTransport(self, rank) for rank in range(ranks))

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


class LockstepTransport:
    """The transport of one rank of a :class:`LockstepGroup`."""

    def __init__(self, group: LockstepGroup, rank: int) -> None:
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
        return _LockstepPending(self.group, packing, self.posts - 1, packing.begin(values))

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Every rank is called with the same tensor here."""
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        raise NotImplementedError("ranks in lockstep see each other's tensors: nothing to gather")

    def barrier(self) -> None:
        """Ranks in lockstep are always together."""

    def close(self) -> None:
        """Nothing is held."""


class _LockstepPending:
    def __init__(self, group: LockstepGroup, packing: Packing, post: int, results: dict[str, torch.Tensor]) -> None:
        self._group, self._packing, self._post, self._results = group, packing, post, results
        self._done = False

    def wait(self) -> dict[str, torch.Tensor]:
        if not self._done:
            messages = {p: self._group.take(self._post, p, self._packing.rank) for p in self._packing.incoming}
            self._packing.finish(self._results, messages)
            self._done = True
        return self._results
