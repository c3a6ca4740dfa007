# SPDX-License-Identifier: Apache-2.0
"""Transfers between fixed addresses, and the protocol of the channels that carry them.

A *receive buffer* is memory of one rank in which other ranks' rows arrive. Where the hardware allows it, the other
ranks write it themselves. A *transfer plan* is one ``Start`` between known addresses: which bytes go to which rank, and
where the bytes from each rank belong. Transfers are planned once. A call then consists of copies and signals alone.

Three rules ensure that no rank overwrites what another one still reads, and that a run repeats bit for bit:

- A result that the next call reads is received into two buffers in turn. One buffer is enough if the next call has read
  the result before it posts it again. Then no rank sends it before the receiver has posted as well
  (:attr:`TransferPlan.needs_ack`).
- No rank posts in a call before every rank has finished the call before it (:meth:`Channel.finish`).
- A transfer that is waited for in the call that posts it is announced by its own signal (two in turn, like the
  buffers), which the receiver resets. A transfer that the next call waits for has arrived by the end of its own call.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from districompile.ir.spec import TensorSpec
from districompile.plan.plan import Collective, Exchange, Reduction
from districompile.runtime.executor.arena import ALIGN, aligned
from districompile.runtime.trace import Spans
from districompile.runtime.transports.messages import PackedSlice, slots_of


def gathered(c: Collective, rank: int) -> TensorSpec:
    """Return the shape and dtype that ``rank`` receives of ``c``.

    For an exchange, that is its result; for a reduction, the stacked contributions of all ranks.
    """
    if isinstance(c, Reduction):
        return TensorSpec((len(c.specs), *c.specs[rank].shape), c.specs[rank].dtype)
    return c.results[rank]


@dataclasses.dataclass(frozen=True)
class ReceiveLayout:
    """Where a rank receives each collective: ``copies`` times from ``offsets[name]`` on, ``stride`` bytes apart.

    The layout ends at ``nbytes``.
    """

    offsets: Mapping[str, int]
    stride: int
    nbytes: int
    copies: int

    @staticmethod
    def of(collectives: Sequence[Collective], rank: int, copies: int, start: int = 0) -> ReceiveLayout:
        offsets: dict[str, int] = {}
        end = start
        for c in collectives:
            offsets[c.name] = end
            end += aligned(gathered(c, rank).nbytes)
        return ReceiveLayout(offsets, end - start, start + (end - start) * copies, copies)

    def inside(self, memory: torch.Tensor, c: Collective, rank: int, copy: int) -> torch.Tensor:
        """Return the view of ``c`` in a buffer's ``memory`` (uint8) of ``rank``."""
        return view(memory, self.offsets[c.name] + copy * self.stride, gathered(c, rank))


def view(memory: torch.Tensor, offset: int, spec: TensorSpec) -> torch.Tensor:
    """Return the tensor ``spec`` that lies at ``offset`` of ``memory`` (uint8)."""
    return memory[offset : offset + spec.nbytes].view(spec.dtype).view(spec.shape)


@dataclasses.dataclass(eq=False)
class ReceiveBuffer:
    """Memory that other ranks write into.

    ``local`` (uint8) is the memory that this rank receives into. ``remote`` is that of other ranks, where this one can
    write it. ``signals`` is the number of its signal slots. ``number`` is the same on all ranks.
    """

    number: int
    local: torch.Tensor
    remote: Mapping[int, torch.Tensor]
    signals: int = 0


@dataclasses.dataclass(frozen=True)
class SliceCopy:
    """A row slice for another rank: rows of a source and, if that rank's memory can be written, their ``target``.

    ``closes``: in the target's memory, nothing but padding follows the rows up to the next aligned address.
    """

    source: torch.Tensor
    target: torch.Tensor | None
    closes: bool


@dataclasses.dataclass(eq=False)
class TransferPlan:
    """One ``Start`` between fixed addresses.

    ``signal_slot`` is the number of its signal in ``buffer``, the same on all ranks. ``exposed``: nothing is computed
    before it is waited for, or before the call ends, so that a separate stream would gain nothing. ``waited_in_call``:
    the call that posts it waits for it. ``needs_ack`` is the number of another signal: a receiver sets it when it has
    read what the transfer overwrites, and nothing is sent to that receiver before.
    """

    name: str
    signal_slot: int
    buffer: ReceiveBuffer
    own: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    outgoing: Mapping[int, tuple[SliceCopy, ...]]
    incoming: Mapping[int, tuple[torch.Tensor, ...]]
    exposed: bool = False
    waited_in_call: bool = True
    needs_ack: int | None = None

    @property
    def sent_bytes(self) -> int:
        return sum(p.source.nbytes for parts in self.outgoing.values() for p in parts)


class Channel(Protocol):
    """The transport of one rank within its group: it carries transfers.

    All ranks call ``receive_buffer``, ``post`` and ``finish`` alike and in the same order.
    """

    rank: int
    ranks: int
    capturable: bool  #: whether ``post``, ``wait`` and ``join`` may be captured into a CUDA graph
    writes_remote: bool  #: whether buffers have ``remote`` memory
    spans: Spans | None  #: where transfers are recorded; None: nowhere

    @property
    def symmetric_bytes(self) -> int:
        """GPU memory of this rank outside PyTorch's allocator, and thus outside its statistics, in bytes."""

    def receive_buffer(self, nbytes: int, signals: int) -> ReceiveBuffer:
        """Allocate zeroed memory to receive into, at least ``nbytes`` on every rank.

        Call :meth:`settle` before its first use.
        """

    def settle(self) -> None:
        """Wait, on the host, until every rank has prepared its buffers."""

    def begin(self, overlapped: bool) -> None:
        """Begin a call. ``overlapped``: the call posts a transfer that is not ``exposed``."""

    def post(self, transfer: TransferPlan) -> None:
        """Start to send the sources, with the values that they have when the work queued so far is done."""

    def ready(self, transfer: TransferPlan) -> bool:
        """Return whether :meth:`wait` can go on. False only for channels between ranks of one process."""

    def wait(self, transfer: TransferPlan) -> None:
        """Make later work wait for the transfer: it may read what the other ranks posted, and overwrite the sources."""

    def sent(self, transfer: TransferPlan) -> None:
        """Make later work wait until the sources of this transfer may be overwritten."""

    def join(self) -> None:
        """Make later work wait until the sources of all transfers may be overwritten."""

    def finish(self) -> None:
        """End a call. Never captured.

        If ranks write each other's buffers, later work waits until all ranks have done this call's reads, and until the
        posted transfers have arrived on all ranks.
        """

    def together(self) -> bool:
        """Return whether every rank has finished as many calls as this one. False only for ranks of one process."""

    def close(self) -> None:
        """Release the channel's resources."""


class SilentChannel:
    """A channel whose posts send nothing and whose waits return at once, to time calls as if transfers were free.

    Ranks still end each call together.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.rank, self.ranks = channel.rank, channel.ranks
        self.capturable, self.writes_remote = channel.capturable, channel.writes_remote
        self.symmetric_bytes = channel.symmetric_bytes
        self.spans: Spans | None = None

    def receive_buffer(self, nbytes: int, signals: int) -> ReceiveBuffer:
        return self._channel.receive_buffer(nbytes, signals)

    def settle(self) -> None:
        self._channel.settle()

    def begin(self, overlapped: bool) -> None:
        pass

    def post(self, transfer: TransferPlan) -> None:
        for source, target in transfer.own:
            target.copy_(source)

    def ready(self, transfer: TransferPlan) -> bool:
        return True

    def wait(self, transfer: TransferPlan) -> None:
        pass

    def sent(self, transfer: TransferPlan) -> None:
        pass

    def join(self) -> None:
        pass

    def finish(self) -> None:
        self._channel.finish()

    def together(self) -> bool:
        return self._channel.together()

    def close(self) -> None:
        self._channel.close()


def build_transfer_plan(
    name: str, signal_slot: int, buffer: ReceiveBuffer, collectives: Sequence[Collective], rank: int, ranks: int,
    source: Callable[[str], torch.Tensor], result: Callable[[Collective, int], torch.Tensor | None],
) -> TransferPlan:  # fmt: skip
    """Plan the transfer of ``collectives``.

    ``source`` returns this rank's value of a name. ``result`` returns the memory of a collective on a rank, or None if
    this rank cannot write it.
    """

    def arriving(slot: PackedSlice, c: Collective, src: int, dst: int) -> torch.Tensor | None:
        memory = result(c, dst)
        if memory is None:
            return None
        return memory[src] if isinstance(c, Reduction) else slot.in_result(memory)

    def parts(dst: int) -> list[SliceCopy]:
        return [
            SliceCopy(slot.of(source(c.source)), arriving(slot, c, rank, dst), _closes(c, slot, rank, dst))
            for c in collectives for slot in slots_of(c, rank, dst)
        ]  # fmt: skip

    others = [r for r in range(ranks) if r != rank]
    incoming: dict[int, tuple[torch.Tensor, ...]] = {}
    for src in others:
        places = [arriving(slot, c, src, rank) for c in collectives for slot in slots_of(c, src, rank)]
        incoming[src] = tuple(p for p in places if p is not None)
    outgoing = {dst: tuple(parts(dst)) for dst in others}
    own = tuple((p.source, p.target) for p in parts(rank) if p.target is not None)
    return TransferPlan(
        name,
        signal_slot,
        buffer,
        own,
        {d: p for d, p in outgoing.items() if p},
        {s: p for s, p in incoming.items() if p},
    )


def _closes(c: Collective, slot: PackedSlice, src: int, dst: int) -> bool:
    if isinstance(c, Exchange):
        return slot.at + slot.spec.shape[c.dim] == c.results[dst].shape[c.dim]
    return src == len(c.specs) - 1


def coalesce(parts: Sequence[SliceCopy]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (source, target) pairs that copy ``parts``.

    Slices that are neighbours in both memories become one copy of bytes, also across padding. Strided slices stay as
    they are.
    """
    strided = [(p.source, p.target) for p in parts if p.target is not None and not _dense(p)]
    runs: list[tuple[SliceCopy, int, int, int]] = []  # first part, source and target address, bytes
    closes = False
    for part in parts:
        if part.target is None or not _dense(part):
            continue
        s, t, n = part.source.data_ptr(), part.target.data_ptr(), part.source.nbytes
        if runs:
            first, source, target, length = runs[-1]
            gap = s - source - length
            fits = gap == 0 or (closes and 0 < gap < ALIGN and (target + length + gap) % ALIGN == 0)
            if fits and gap == t - target - length and _same_storage(first, part):
                runs[-1] = (first, source, target, length + gap + n)
                closes = part.closes
                continue
        runs.append((part, s, t, n))
        closes = part.closes
    copies = [(_bytes(p.source, n), _bytes(p.target, n)) for p, _, _, n in runs if p.target is not None]
    return copies + [(s, t) for s, t in strided if t is not None]


def _dense(part: SliceCopy) -> bool:
    return part.target is not None and part.source.is_contiguous() and part.target.is_contiguous()


def _same_storage(a: SliceCopy, b: SliceCopy) -> bool:
    def start(t: torch.Tensor | None) -> int:
        return 0 if t is None else t.untyped_storage().data_ptr()

    return start(a.source) == start(b.source) and start(a.target) == start(b.target)


def _bytes(start: torch.Tensor, nbytes: int) -> torch.Tensor:
    """Return ``nbytes`` of memory from the first element of ``start`` on."""
    flat = torch.empty(0, dtype=torch.uint8, device=start.device)
    offset = start.data_ptr() - start.untyped_storage().data_ptr()
    return flat.set_(start.untyped_storage(), offset, (nbytes,), (1,))


def recorded(
    spans: Spans | None, kind: str, name: str, lane: str, nbytes: int = 0
) -> contextlib.AbstractContextManager[None]:
    """Record the time of the work that is queued inside, in ``spans``; None: record nothing."""
    return contextlib.nullcontext() if spans is None else spans.span(kind, name, lane, nbytes)
