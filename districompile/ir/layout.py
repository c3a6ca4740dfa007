"""Layouts: which factor of which dim is cut over the ranks.

A dim is a product of factors, outermost first, so that ``view``, ``permute`` and friends carry the cut along:
``(B, C, H*, W) -> flatten -> (B, C, H* W) -> transpose -> (B, H* W, C)``. At most one factor of a tensor is cut. Its
``bounds`` are R+1 offsets: rank r owns ``[bounds[r], bounds[r + 1])`` of it.

A *mixed* factor carries replicated parts beside the cut one: what lies before ``bounds[0]`` and behind ``bounds[-1]``
is on every rank. So text tokens stand before or behind an image's: ``(B, 77 + H* W, C)``, and a rank holds
``[text | its own tokens]``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class Refused(Exception):
    """A rule or a layout operation cannot be done on cut tensors; the message is the reason shown in the report."""


class NotOutermost(Refused):
    """The cut rows are not the outermost factor of their dim, where an operator needs them to be."""


@dataclasses.dataclass(frozen=True)
class PerRank(Generic[T]):
    """A value that differs by rank, standing in an argument of a node of the SPMD graph."""

    values: tuple[T, ...]

    def __repr__(self) -> str:
        return "|".join(map(repr, self.values))


@overload
def per_rank(values: Iterable[int]) -> int | PerRank[int]: ...
@overload
def per_rank(values: Iterable[T]) -> T | PerRank[T]: ...
def per_rank(values: Iterable[Any]) -> Any:
    """A :class:`PerRank`, or the plain value where all ranks agree."""
    items = tuple(values)
    return items[0] if all(v == items[0] for v in items) else PerRank(items)


def at_rank(x: Any, rank: int) -> Any:
    """``x`` with every :class:`PerRank` in it (nested in lists, tuples, dicts, slices) replaced by the rank's value."""
    if isinstance(x, PerRank):
        return x.values[rank]
    if isinstance(x, list | tuple):
        return type(x)(at_rank(v, rank) for v in x)
    if isinstance(x, dict):
        return {k: at_rank(v, rank) for k, v in x.items()}
    return x


@dataclasses.dataclass(frozen=True)
class Factor:
    """``size`` elements, cut at ``bounds`` or (None) whole on every rank. Mixed where the bounds do not reach from 0 to
    ``size``."""

    size: int
    bounds: tuple[int, ...] | None = None

    def local(self, rank: int) -> int:
        if self.bounds is None:
            return self.size
        return self.bounds[0] + self.bounds[rank + 1] - self.bounds[rank] + self.size - self.bounds[-1]

    @property
    def mixed(self) -> bool:
        return self.bounds is not None and (self.bounds[0] > 0 or self.bounds[-1] < self.size)

    @property
    def unmixed(self) -> Factor:
        """The same elements, those before the cut part given to the first rank, those behind it to the last."""
        if self.bounds is None or not self.mixed:
            return self
        return Factor(self.size, (0, *self.bounds[1:-1], self.size))

    @property
    def rows(self) -> int:
        """How many elements are divided among the ranks."""
        return 0 if self.bounds is None else self.bounds[-1] - self.bounds[0]

    def recut(self, bounds: Sequence[int]) -> Factor:
        """The factor with its cut part divided at ``bounds``, which count from the cut part's start."""
        assert self.bounds is not None
        return Factor(self.size, tuple(self.bounds[0] + b for b in bounds))

    def scaled(self, k: int) -> Factor:
        """The factor of ``size * k`` that this one becomes when ``k`` inner elements are merged into each of its
        own."""
        return Factor(self.size * k, None if self.bounds is None else tuple(b * k for b in self.bounds))

    def __repr__(self) -> str:
        if self.bounds is None:
            return str(self.size)
        if not self.mixed:
            return f"{self.size}*"
        before, after = self.bounds[0], self.size - self.bounds[-1]
        return "+".join([*([str(before)] if before else []), f"{self.rows}*", *([str(after)] if after else [])])


Dim = tuple[Factor, ...]


@dataclasses.dataclass(frozen=True)
class Cut:
    """Where a layout is cut: dim, position of the factor in that dim, the factor's bounds and size."""

    dim: int
    index: int
    bounds: tuple[int, ...]
    size: int

    @property
    def factor(self) -> Factor:
        return Factor(self.size, self.bounds)

    @property
    def mixed(self) -> bool:
        return self.factor.mixed

    @property
    def rows(self) -> int:
        return self.factor.rows


def _tidy(dim: Iterable[Factor]) -> Dim:
    """Merge neighbouring whole factors and drop ones, so that equal layouts compare equal."""
    out: list[Factor] = []
    for f in dim:
        if f.bounds is None and f.size == 1:
            continue
        if out and f.bounds is None and out[-1].bounds is None:
            out[-1] = Factor(out[-1].size * f.size)
        else:
            out.append(f)
    return tuple(out)


@dataclasses.dataclass(frozen=True)
class Layout:
    """One tuple of factors for each dim of a tensor."""

    dims: tuple[Dim, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(_tidy(d) for d in self.dims))

    @staticmethod
    def whole(shape: Sequence[int]) -> Layout:
        return Layout(tuple((Factor(int(s)),) for s in shape))

    @staticmethod
    def cut_at(shape: Sequence[int], dim: int, bounds: Sequence[int]) -> Layout:
        return Layout.whole(shape).with_dim(dim % len(shape), (Factor(shape[dim], tuple(bounds)),))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(f.size for f in d) for d in self.dims)

    @property
    def ndim(self) -> int:
        return len(self.dims)

    @property
    def cut(self) -> Cut | None:
        for i, d in enumerate(self.dims):
            for j, f in enumerate(d):
                if f.bounds is not None:
                    return Cut(i, j, f.bounds, f.size)
        return None

    def local_shape(self, rank: int) -> tuple[int, ...]:
        return tuple(math.prod(f.local(rank) for f in d) for d in self.dims)

    def with_dim(self, dim: int, factors: Sequence[Factor]) -> Layout:
        return Layout((*self.dims[:dim], tuple(factors), *self.dims[dim + 1 :]))

    def without(self, dims: Iterable[int]) -> Layout:
        drop = set(dims)
        return Layout(tuple(d for i, d in enumerate(self.dims) if i not in drop))

    def insert(self, dim: int, factors: Sequence[Factor] = ()) -> Layout:
        return Layout((*self.dims[:dim], tuple(factors), *self.dims[dim:]))

    def permuted(self, order: Sequence[int]) -> Layout:
        return Layout(tuple(self.dims[i] for i in order))

    def coarse(self, dim: int) -> Factor:
        """The dim as one factor, which takes its cut factor to be outermost; refuses otherwise."""
        factors = self.dims[dim]
        if not factors:
            return Factor(1)
        inner = math.prod(f.size for f in factors[1:])
        if any(f.bounds is not None for f in factors[1:]):
            raise NotOutermost("the cut rows are not the outermost part of the dim")
        return factors[0].scaled(inner)

    def flat(self) -> tuple[list[Factor], int]:
        """All factors in a row, and where the cut one stands (-1: none)."""
        factors = [f for d in self.dims for f in (d or (Factor(1),))]
        return factors, next((i for i, f in enumerate(factors) if f.bounds is not None), -1)

    def map_cut(self, f: Callable[[Factor], Factor]) -> Layout:
        return Layout(tuple(tuple(f(g) if g.bounds is not None else g for g in d) for d in self.dims))

    def regrouped(self, shape: Sequence[int]) -> Layout:
        """The layout after ``reshape`` to ``shape`` (no -1); refuses where the cut factor would be broken up."""
        queue = [f for d in self.dims for f in d][::-1]
        out: list[list[Factor]] = []
        for size in shape:
            dim: list[Factor] = []
            need = size
            while need > 1:
                f = queue.pop()
                if need % f.size == 0:
                    dim.append(f)
                    need //= f.size
                else:
                    outer, inner = _split(f, need)
                    dim.append(outer)
                    queue.append(inner)
                    need //= outer.size
            out.append(dim)
        if any(f.size != 1 for f in queue):
            raise Refused(f"reshape of {self} to {list(shape)}")
        return Layout(tuple(map(tuple, out)))

    def __repr__(self) -> str:
        return "[" + ", ".join("(" + " ".join(map(repr, d)) + ")" if len(d) > 1 else repr(d[0]) if d else "1"
                               for d in self.dims) + "]"  # fmt: skip


def _split(f: Factor, need: int) -> tuple[Factor, Factor]:
    """``f`` as outer x inner, where outer divides ``need`` (a piece that straddles two dims is cut at the gcd)."""
    outer = need if f.size % need == 0 else math.gcd(f.size, need)
    if outer == 1:
        raise Refused(f"reshape splits a dim of {f.size} unevenly")
    inner = f.size // outer
    if f.bounds is None:
        return Factor(outer), Factor(inner)
    if any(b % inner for b in f.bounds):
        raise Refused(f"reshape splits the cut rows inside a rank ({f.size} = {outer} x {inner})")
    return Factor(outer, tuple(b // inner for b in f.bounds)), Factor(inner)


def scale_bounds(fractions: Sequence[float], n: int) -> tuple[int, ...] | None:
    """Bounds of ``n`` rows at the image's cut points; None where some rank would be left without a row."""
    bounds = tuple(min(n, max(0, math.floor(f * n + 0.5))) for f in fractions)
    return bounds if all(a < b for a, b in itertools.pairwise(bounds)) else None


def choose_fractions(rows: int, ranks: int, sizes: Iterable[int]) -> tuple[float, ...]:
    """Cut points of the image as fractions of its height, the same for every map of it.

    ``sizes`` are the heights of all maps in the graph. Ranks are aligned down to the deepest map that has a row for
    each of them, unless that makes the tallest rank much taller than it need be: each further misaligned level is
    weighed as 2 % of a step (wider halos), against the imbalance it saves.
    """
    units = sorted({n for n in sizes if ranks <= n <= rows and rows % n == 0} | {rows})
    best: tuple[float, tuple[float, ...]] | None = None
    for units_n in units:  # coarsest first: it wins ties
        offsets = [round(units_n * r / ranks) for r in range(ranks + 1)]
        tallest = max(b - a for a, b in itertools.pairwise(offsets)) / units_n
        misaligned = sum(1 for n in units if n < units_n)
        cost = tallest * (1 + 0.02 * misaligned)
        if best is None or cost < best[0] - 1e-9:
            best = cost, tuple(o / units_n for o in offsets)
    assert best is not None
    return best[1]
