"""What moves bytes between ranks: the protocol, and the packing that all transports share.

Everything that one ``Post`` sends to one rank travels as one contiguous message of bytes: a network of a hundred group
norms has a hundred tiny statistics, and their cost is the number of messages, not their size. Where each piece lies in
a message follows from the plan alone, so that nothing but payload is sent, and is worked out once per ``Post``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch

from districompile.errors import LaunchError
from districompile.ir.plan import Collective, Exchange, Reduction, TensorSpec

_ALIGN = 16  # bytes: an offset at which any dtype may be viewed


class TransportError(LaunchError):
    """A transfer failed because another rank is gone or does not answer: a consequence of that rank's failure.

    ``silent``: that rank's process is still there, so that it will never tell an error of its own."""

    def __init__(self, message: str, silent: bool = False) -> None:
        super().__init__(message)
        self.silent = silent


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


@dataclasses.dataclass(frozen=True)
class Slot:
    """A piece in a message: rows of ``source`` from ``start`` along ``dim``, put at row ``at`` of the result of the
    collective ``name``; ``spec`` is its shape. For a reduction (``dim`` is None) it is a whole contribution."""

    name: str
    source: str
    dim: int | None
    start: int
    at: int
    spec: TensorSpec
    offset: int = 0

    def inside(self, message: torch.Tensor) -> torch.Tensor:
        """The part of ``message`` (uint8) that holds this piece, as a tensor of the piece's shape and dtype."""
        part = message[self.offset : self.offset + self.spec.nbytes]
        return part.view(self.spec.dtype).view(self.spec.shape)

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """The rows of the sender's ``value``."""
        return value if self.dim is None else value.narrow(self.dim, self.start, self.spec.shape[self.dim])

    def in_result(self, result: torch.Tensor) -> torch.Tensor:
        """The rows of the receiver's ``result``."""
        return result if self.dim is None else result.narrow(self.dim, self.at, self.spec.shape[self.dim])


@dataclasses.dataclass(frozen=True)
class Message:
    """All pieces that one rank sends to another in one ``Post``."""

    slots: tuple[Slot, ...]
    nbytes: int

    @staticmethod
    def of(slots: Iterable[Slot]) -> Message:
        placed: list[Slot] = []
        offset = 0
        for slot in slots:
            placed.append(dataclasses.replace(slot, offset=offset))
            offset += -(-slot.spec.nbytes // _ALIGN) * _ALIGN
        return Message(tuple(placed), offset)

    def pack(self, values: Mapping[str, torch.Tensor], message: torch.Tensor) -> None:
        """Copy the pieces out of ``values`` (by source name) into ``message``."""
        for slot in self.slots:
            slot.inside(message).copy_(slot.of(values[slot.source]))


class Packing:
    """How one ``Post`` is packed on one rank: what goes to and comes from every other rank, and what stays."""

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
                    f"{c.site}: {c.source} is {value.dtype}{tuple(value.shape)} on rank {self.rank}, "
                    f"but the plan says {spec.dtype}{spec.shape}"
                )

    def begin(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The results as far as they are known at the ``Post``: own rows and fill; a reduction's own contribution."""
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


def combine(op: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Reduce ``parts`` in their order, so that every rank gets the same bits. Half precision is summed in float32."""
    dtype = parts[0].dtype
    wide = torch.float32 if op == "sum" and dtype in (torch.float16, torch.bfloat16) else dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        other = part.to(wide)
        total = total + other if op == "sum" else torch.maximum(total, other) if op == "max" else total.minimum(other)
    return total.to(dtype)


class PackingCache:
    """Packings of one rank, worked out at the first ``Post`` of each set of collectives."""

    def __init__(self, rank: int, ranks: int) -> None:
        self._rank, self._ranks = rank, ranks
        self._packings: dict[tuple[str, ...], Packing] = {}

    def __call__(self, collectives: Sequence[Collective]) -> Packing:
        key = tuple(c.name for c in collectives)
        packing = self._packings.get(key)
        if packing is None or any(a is not b for a, b in zip(packing.collectives, collectives, strict=True)):
            packing = self._packings[key] = Packing(collectives, self._rank, self._ranks)
        return packing


def slots_of(c: Collective, src: int, dst: int) -> list[Slot]:
    """The pieces of ``c`` from ``src`` to ``dst``, in the order both sides pack them."""
    spec = c.specs[src]
    if isinstance(c, Reduction):
        return [Slot(c.name, c.source, None, 0, 0, spec)] if spec.nbytes else []
    slots = []
    for p in c.pieces:
        if p.src == src and p.dst == dst:
            shape = (*spec.shape[: c.dim], p.rows, *spec.shape[c.dim + 1 :])
            if math.prod(shape):
                slots.append(Slot(c.name, c.source, c.dim, p.start, p.at, TensorSpec(shape, spec.dtype)))
    return slots


def _is_covered(c: Exchange, rank: int) -> bool:
    """Whether the pieces to ``rank`` leave no row of its result to be filled."""
    end = 0
    for at, rows in sorted((p.at, p.rows) for p in c.pieces if p.dst == rank):
        if at > end:
            return False
        end = max(end, at + rows)
    return end >= c.results[rank].shape[c.dim]
