"""How the static executor sends: routes between fixed places, and the protocol of what carries them.

A *region* is memory of one rank into which the others' rows arrive; where the hardware allows it the others write it
themselves. A *route* is one ``Post`` between places that are known: which bytes go to whom, and where what comes from
whom belongs. Routes are worked out once; what happens at every call is copies, signals and nothing else.

What keeps ranks from overwriting what another one still reads (and a run repeatable):

- A result that the next call reads is received into two places in turn; into one, if the next call is done with it
  when it posts it again: then no rank sends it before the receiver has posted, too (:attr:`Route.meets`).
- No rank posts in a call before every rank has finished the call before it (:meth:`Link.finish`).
- A route that is waited for in the call that posts it is announced by a signal of its own (two in turn, as the
  places), which the receiver takes back. What the next call waits for has arrived by the end of its own call.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from districompile.ir.plan import Collective, Exchange, Reduction, TensorSpec
from districompile.runtime.arena import ALIGN, aligned
from districompile.runtime.trace import Spans
from districompile.runtime.transport import Slot, slots_of


def gathered(c: Collective, rank: int) -> TensorSpec:
    """What ``rank`` receives of ``c``: the result of an exchange; of a reduction all contributions, stacked."""
    if isinstance(c, Reduction):
        return TensorSpec((len(c.specs), *c.specs[rank].shape), c.specs[rank].dtype)
    return c.results[rank]


@dataclasses.dataclass(frozen=True)
class ReceiveLayout:
    """Where a rank receives each collective: ``copies`` times from ``offsets[name]`` on, ``stride`` bytes apart. All of
    it ends at ``nbytes``."""

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
        """The place of ``c`` in a region's ``memory`` (uint8) of ``rank``."""
        return view(memory, self.offsets[c.name] + copy * self.stride, gathered(c, rank))


def view(memory: torch.Tensor, offset: int, spec: TensorSpec) -> torch.Tensor:
    """The tensor ``spec`` that lies at ``offset`` of ``memory`` (uint8)."""
    return memory[offset : offset + spec.nbytes].view(spec.dtype).view(spec.shape)


@dataclasses.dataclass(eq=False)
class Region:
    """``local`` memory (uint8) that this rank receives into; ``remote`` is that of other ranks, where this one can
    write it. ``words`` signals belong to it; ``number`` is the same on all ranks."""

    number: int
    local: torch.Tensor
    remote: Mapping[int, torch.Tensor]
    words: int = 0


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece for another rank: rows of a source and, where that rank's memory can be written, their ``target``.
    ``closes``: nothing but padding follows them there up to the next aligned address."""

    source: torch.Tensor
    target: torch.Tensor | None
    closes: bool


@dataclasses.dataclass(eq=False)
class Route:
    """One ``Post`` between fixed places. ``word`` is the number of its signal in ``region``, the same on all ranks.
    ``at_once``: nothing is computed before it is waited for, or the call ends, so that nothing is gained beside the
    compute stream. ``answered``: the call that posts it waits for it. ``meets``: the number of another signal, by which
    a rank says that it has read what the route overwrites; nothing is sent to it before.
    """

    name: str
    word: int
    region: Region
    own: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    outgoing: Mapping[int, tuple[Part, ...]]
    incoming: Mapping[int, tuple[torch.Tensor, ...]]
    at_once: bool = False
    answered: bool = True
    meets: int | None = None

    @property
    def sent_bytes(self) -> int:
        return sum(p.source.nbytes for parts in self.outgoing.values() for p in parts)


class Link(Protocol):
    """Carries routes. All ranks call ``region``, ``post`` and ``finish`` alike and in the same order."""

    rank: int
    ranks: int
    capturable: bool  #: whether ``post``, ``wait`` and ``join`` may be captured into a CUDA graph
    writes_remote: bool  #: whether regions have ``remote`` memory
    spans: Spans | None  #: where transfers are recorded, if anybody wants to know

    @property
    def symmetric_bytes(self) -> int:
        """Memory of this rank's GPU that PyTorch's allocator, and so its statistics, know nothing of."""

    def region(self, nbytes: int, words: int) -> Region:
        """Zeroed memory to receive into, at least ``nbytes`` on every rank. Call :meth:`settle` before its first
        use."""

    def settle(self) -> None:
        """Every rank has prepared its regions. Waits on the host."""

    def begin(self, overlapped: bool) -> None:
        """A call begins; ``overlapped``: something is posted in it that is not ``at_once``."""

    def post(self, route: Route) -> None:
        """Start to send the sources, as they are when the work queued so far is done."""

    def ready(self, route: Route) -> bool:
        """Whether :meth:`wait` can go on; only links in one process ever say no."""

    def wait(self, route: Route) -> None:
        """Work queued from here on finds what the others posted on this route, and may overwrite what was sent on
        it."""

    def sent(self, route: Route) -> None:
        """Work queued from here on may overwrite what was posted on this route."""

    def join(self) -> None:
        """Work queued from here on may overwrite whatever was posted."""

    def finish(self) -> None:
        """End of a call: work queued from here on comes after the call's reads, and finds what was posted, of all ranks
        (where ranks write each other's regions). Never captured."""

    def together(self) -> bool:
        """As :meth:`ready`, for :meth:`finish`."""

    def close(self) -> None:
        """Release what the link holds."""


class SilentLink:
    """A link whose posts send nothing and whose waits wait for nothing, for timing what a call would take if transfers
    were free. Ranks still end each call together."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.rank, self.ranks = link.rank, link.ranks
        self.capturable, self.writes_remote = link.capturable, link.writes_remote
        self.symmetric_bytes = link.symmetric_bytes
        self.spans: Spans | None = None

    def region(self, nbytes: int, words: int) -> Region:
        return self._link.region(nbytes, words)

    def settle(self) -> None:
        self._link.settle()

    def begin(self, overlapped: bool) -> None:
        pass

    def post(self, route: Route) -> None:
        for source, target in route.own:
            target.copy_(source)

    def ready(self, route: Route) -> bool:
        return True

    def wait(self, route: Route) -> None:
        pass

    def sent(self, route: Route) -> None:
        pass

    def join(self) -> None:
        pass

    def finish(self) -> None:
        self._link.finish()

    def together(self) -> bool:
        return self._link.together()

    def close(self) -> None:
        self._link.close()


def build_route(
    name: str, word: int, region: Region, collectives: Sequence[Collective], rank: int, ranks: int,
    source: Callable[[str], torch.Tensor], result: Callable[[Collective, int], torch.Tensor | None],
) -> Route:  # fmt: skip
    """``source`` gives this rank's values; ``result`` the place of a collective on a rank, None where it is out of
    reach."""

    def arriving(slot: Slot, c: Collective, src: int, dst: int) -> torch.Tensor | None:
        memory = result(c, dst)
        if memory is None:
            return None
        return memory[src] if isinstance(c, Reduction) else slot.in_result(memory)

    def parts(dst: int) -> list[Part]:
        return [
            Part(slot.of(source(c.source)), arriving(slot, c, rank, dst), _closes(c, slot, rank, dst))
            for c in collectives for slot in slots_of(c, rank, dst)
        ]  # fmt: skip

    others = [r for r in range(ranks) if r != rank]
    incoming: dict[int, tuple[torch.Tensor, ...]] = {}
    for src in others:
        places = [arriving(slot, c, src, rank) for c in collectives for slot in slots_of(c, src, rank)]
        incoming[src] = tuple(p for p in places if p is not None)
    outgoing = {dst: tuple(parts(dst)) for dst in others}
    own = tuple((p.source, p.target) for p in parts(rank) if p.target is not None)
    return Route(
        name, word, region, own, {d: p for d, p in outgoing.items() if p}, {s: p for s, p in incoming.items() if p}
    )


def _closes(c: Collective, slot: Slot, src: int, dst: int) -> bool:
    if isinstance(c, Exchange):
        return slot.at + slot.spec.shape[c.dim] == c.results[dst].shape[c.dim]
    return src == len(c.specs) - 1


def coalesce(parts: Sequence[Part]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(source, target) pairs that copy ``parts``: neighbours in both memories become one copy of bytes, across padding,
    too. Strided pieces stay as they are."""
    strided = [(p.source, p.target) for p in parts if p.target is not None and not _dense(p)]
    runs: list[tuple[Part, int, int, int]] = []  # first part, source and target address, bytes
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


def _dense(part: Part) -> bool:
    return part.target is not None and part.source.is_contiguous() and part.target.is_contiguous()


def _same_storage(a: Part, b: Part) -> bool:
    def start(t: torch.Tensor | None) -> int:
        return 0 if t is None else t.untyped_storage().data_ptr()

    return start(a.source) == start(b.source) and start(a.target) == start(b.target)


def _bytes(start: torch.Tensor, nbytes: int) -> torch.Tensor:
    """``nbytes`` of memory from the first element of ``start`` on."""
    flat = torch.empty(0, dtype=torch.uint8, device=start.device)
    offset = start.data_ptr() - start.untyped_storage().data_ptr()
    return flat.set_(start.untyped_storage(), offset, (nbytes,), (1,))


def recorded(
    spans: Spans | None, kind: str, name: str, lane: str, nbytes: int = 0
) -> contextlib.AbstractContextManager[None]:
    """Record the time of what is queued inside, if anybody wants to know."""
    return contextlib.nullcontext() if spans is None else spans.span(kind, name, lane, nbytes)
