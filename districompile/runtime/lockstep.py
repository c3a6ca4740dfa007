"""All ranks in one process, a step at a time: for ``verify``, ``simulate`` and tests. Messages go through a mailbox."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch

from districompile.ir.plan import Collective
from districompile.runtime.arena import allocate
from districompile.runtime.links import Region, Route, coalesce, recorded
from districompile.runtime.trace import Spans
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


class LockstepLinks:
    """Links of ``ranks`` executors in one process, on one device: each writes straight into the others' regions, as
    copy engines do between GPUs. Signals are counted here, so that a schedule that could overtake itself is found."""

    def __init__(self, ranks: int, device: torch.device) -> None:
        self.ranks, self.device = ranks, device
        self.memory: list[list[torch.Tensor]] = []  # region -> by rank
        # region, word, src, dst -> whether the call that posted it waits for it, and how many src had finished before
        self.signals: dict[tuple[int, int, int, int], tuple[bool, int]] = {}
        self.met: set[tuple[int, int | None, int, int]] = set()  # likewise: what rank src lets rank dst overwrite
        self.held: dict[tuple[int, int, int, int], Callable[[], None]] = {}  # sends that wait for that
        self.finished = [0] * ranks  # calls
        self.links = tuple(LockstepLink(self, rank) for rank in range(ranks))

    def clear(self) -> None:
        """Forget what is under way, after a call that failed half way."""
        self.signals.clear()
        self.met.clear()
        self.held.clear()
        self.finished = [0] * self.ranks


class LockstepLink:
    """The link of one rank of :class:`LockstepLinks`."""

    capturable = False  # ranks take turns
    symmetric_bytes = 0
    writes_remote = True

    def __init__(self, group: LockstepLinks, rank: int) -> None:
        self.group, self.rank, self.ranks = group, rank, group.ranks
        self.spans: Spans | None = None
        self._regions = 0
        self._copies: dict[tuple[Route, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def region(self, nbytes: int, words: int) -> Region:
        number, memory = self._regions, self.group.memory
        self._regions += 1
        if number == len(memory):
            memory.append([allocate(nbytes, self.group.device) for _ in range(self.ranks)])
        parts = memory[number]
        return Region(number, parts[self.rank], {r: m for r, m in enumerate(parts) if r != self.rank}, words)

    def settle(self) -> None:
        """Ranks in lockstep prepare before any of them runs."""

    def begin(self, overlapped: bool) -> None:
        """Nothing is prepared."""

    def post(self, route: Route) -> None:
        calls = self.group.finished[self.rank]
        with recorded(self.spans, "post", route.name, "transfer", route.sent_bytes):
            for source, target in route.own:
                target.copy_(source)
            for peer, parts in route.outgoing.items():
                if (route, peer) not in self._copies:
                    self._copies[route, peer] = coalesce(parts)
                copies = self._copies[route, peer]
                if route.meets is not None and not self._met(route, peer):
                    copies = [(source.clone(), target) for source, target in copies]
                    self.group.held[self._word(route, peer)] = functools.partial(self._send, route, peer, copies, calls)
                else:
                    self._send(route, peer, copies, calls)
        if route.meets is not None:
            for peer in route.incoming:
                self.group.met.add((route.region.number, route.meets, self.rank, peer))
                held = self.group.held.pop((route.region.number, route.word, peer, self.rank), None)
                if held is not None:
                    held()

    def _send(
        self, route: Route, peer: int, copies: Sequence[tuple[torch.Tensor, torch.Tensor]], calls: int
    ) -> None:  # fmt: skip
        """``calls``: that this rank had finished when it posted."""
        if route.meets is not None:
            self.group.met.remove((route.region.number, route.meets, peer, self.rank))
        for source, target in copies:
            target.copy_(source)
        if self._word(route, peer) in self.group.signals:
            raise RuntimeError(f"rank {self.rank} posts {route.name} again before rank {peer} has read it")
        self.group.signals[self._word(route, peer)] = route.answered, calls

    def _word(self, route: Route, peer: int) -> tuple[int, int, int, int]:
        return route.region.number, route.word, self.rank, peer

    def _met(self, route: Route, peer: int) -> bool:
        """Whether ``peer`` has read what ``route`` overwrites there."""
        return (route.region.number, route.meets, peer, self.rank) in self.group.met

    def arrived(self, route: Route) -> bool:
        """Whether every rank has posted ``route`` and, where no signal tells it, ended the call in which it did."""
        found = [self.group.signals.get((route.region.number, route.word, p, self.rank)) for p in route.incoming]
        return all(
            s is not None and (s[0] or self.group.finished[p] > s[1])
            for p, s in zip(route.incoming, found, strict=True)
        )

    def ready(self, route: Route) -> bool:
        return True  # it is a defect if not: see wait

    def wait(self, route: Route) -> None:
        if not self.arrived(route):
            raise RuntimeError(f"rank {self.rank} waits for {route.name}, which has not come so far from every rank")
        for peer in route.incoming:
            del self.group.signals[route.region.number, route.word, peer, self.rank]

    def sent(self, route: Route) -> None:
        """What was posted has been copied."""

    def join(self) -> None:
        """What was posted has been copied."""

    def finish(self) -> None:
        self.group.finished[self.rank] += 1

    def together(self) -> bool:
        return min(self.group.finished) >= self.group.finished[self.rank]

    def close(self) -> None:
        self._copies.clear()
