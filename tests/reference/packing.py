"""The packing of one ``Start``: what goes to and comes from every other rank, and what stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from districompile.plan.plan import Collective, Exchange, Reduction
from districompile.runtime.transports.messages import Message, combine, slots_of


class Pending(Protocol):
    """A transfer under way."""

    def wait(self) -> dict[str, torch.Tensor]:
        """Complete the transfer: the result of each collective by name. Called again, it gives the same tensors."""


class Transport(Protocol):
    """What moves bytes between the ranks of one axis of the mesh. All ranks make the same calls in the same order."""

    rank: int
    ranks: int

    def post(self, collectives: Sequence[Collective], values: Mapping[str, torch.Tensor]) -> Pending:
        """Start the transfer of ``values[c.source]`` for each collective. The values may change once this returns."""

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """``tensor`` of rank ``src`` on every rank. All pass a tensor of the same shape and dtype."""

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all ranks, in rank order. All pass the same shape and dtype."""

    def barrier(self) -> None:
        """Wait until every rank is here."""

    def close(self) -> None:
        """Release what the transport holds; what is under way is lost."""


class Packing:
    """How one ``Start`` is packed on one rank: what goes to and comes from every other rank, and what stays."""

    def __init__(self, collectives: Sequence[Collective], rank: int, ranks: int) -> None:
        self.collectives = tuple(collectives)
        self.rank = rank
        self.outgoing: dict[int, Message] = {}
        self.incoming: dict[int, Message] = {}
        for peer in range(ranks):
            if peer != rank:
                out = Message.of(s for c in collectives for s in slots_of(c, rank, peer))
                into = Message.of(s for c in collectives for s in slots_of(c, peer, rank))
                if out.nbytes:
                    self.outgoing[peer] = out
                if into.nbytes:
                    self.incoming[peer] = into
        self._own = tuple(s for c in collectives if isinstance(c, Exchange) for s in slots_of(c, rank, rank))
        self._covered = {c.name: _is_covered(c, rank) for c in collectives if isinstance(c, Exchange)}

    def check(self, values: Mapping[str, torch.Tensor]) -> None:
        """Raise where a value is not what the plan says: a defect of an engine or of the plan, never of a user."""
        for c in self.collectives:
            value, spec = values[c.source], c.specs[self.rank]
            if tuple(value.shape) != spec.shape or value.dtype != spec.dtype:
                raise RuntimeError(
                    f"{c.module_path}: {c.source} is {value.dtype}{tuple(value.shape)} on rank {self.rank}, "
                    f"but the plan says {spec.dtype}{spec.shape}"
                )

    def begin(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The results as far as they are known at the ``Start``: own rows and fill; a reduction's own contribution."""
        results: dict[str, torch.Tensor] = {}
        for c in self.collectives:
            value, spec = values[c.source], c.results[self.rank]
            if isinstance(c, Reduction):
                results[c.name] = value.clone(memory_format=torch.contiguous_format)
                continue
            results[c.name] = torch.empty(spec.shape, dtype=spec.dtype, device=value.device)
            if not self._covered[c.name]:
                results[c.name].fill_(c.fill)
        for slot in self._own:
            slot.in_result(results[slot.name]).copy_(slot.of(values[slot.source]))
        return results

    def finish(self, results: dict[str, torch.Tensor], messages: Mapping[int, torch.Tensor]) -> None:
        """Put what the other ranks sent (uint8, by rank) in its place."""
        contributions: dict[str, dict[int, torch.Tensor]] = {}
        for peer, into in self.incoming.items():
            for slot in into.slots:
                piece = slot.inside(messages[peer])
                if slot.dim is None:
                    contributions.setdefault(slot.name, {})[peer] = piece
                else:
                    slot.in_result(results[slot.name]).copy_(piece)
        for c in self.collectives:
            if isinstance(c, Reduction) and c.name in contributions:
                own = results[c.name]
                parts = contributions[c.name] | {self.rank: own}
                results[c.name] = combine(c.op, [parts[r].to(own.device) for r in sorted(parts)])


class PackingCache:
    """Packings of one rank, worked out at the first ``Start`` of each set of collectives."""

    def __init__(self, rank: int, ranks: int) -> None:
        self._rank, self._ranks = rank, ranks
        self._packings: dict[tuple[str, ...], Packing] = {}

    def __call__(self, collectives: Sequence[Collective]) -> Packing:
        key = tuple(c.name for c in collectives)
        packing = self._packings.get(key)
        if packing is None or any(a is not b for a, b in zip(packing.collectives, collectives, strict=True)):
            packing = self._packings[key] = Packing(collectives, self._rank, self._ranks)
        return packing


def _is_covered(c: Exchange, rank: int) -> bool:
    """Whether the pieces to ``rank`` leave no row of its result to be filled."""
    end = 0
    for at, rows in sorted((p.at, p.rows) for p in c.pieces if p.dst == rank):
        if at > end:
            return False
        end = max(end, at + rows)
    return end >= c.results[rank].shape[c.dim]
