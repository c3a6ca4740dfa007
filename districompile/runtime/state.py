"""What the static executor keeps of a stream of calls from one call to the next."""

from __future__ import annotations

import dataclasses
import functools

import torch

from districompile.runtime.links import Region, Route


@dataclasses.dataclass
class Book:
    """What a stream of calls has behind it, as far as the next call depends on it. Equal on all ranks."""

    turn: dict[str, int] = dataclasses.field(default_factory=dict)  # collective -> the place it was last received in
    # collective -> what it last travelled on; None: it came out of an engine
    last: dict[str, Route | None] = dataclasses.field(default_factory=dict)
    unread: dict[Route, None] = dataclasses.field(default_factory=dict)  # posted, and not yet waited for
    half: dict[int, int] = dataclasses.field(default_factory=dict)  # message -> which of its signals was last used
    kept: dict[str, int] = dataclasses.field(default_factory=dict)  # state -> the place of its value

    def copy(self) -> Book:
        return Book(*(dict(getattr(self, f.name)) for f in dataclasses.fields(self)))

    @functools.cached_property
    def signature(self) -> tuple[object, ...]:
        """Equal where the next call does the same on the same memory. A book does not change once this was asked."""
        return tuple(frozenset(getattr(self, f.name).items()) for f in dataclasses.fields(self))


@dataclasses.dataclass(eq=False)
class StaticState:
    """The memory of one stream of calls, and what it holds."""

    number: int
    region: Region
    kept: torch.Tensor
    book: Book
    routes: dict[tuple[object, ...], Route] = dataclasses.field(default_factory=dict)
