# SPDX-License-Identifier: Apache-2.0
"""Layouts: which factor of which dim is sharded over the ranks.

A dim is a product of factors, outermost first. ``view`` and ``permute`` therefore keep a sharding: ``(B, C, H*, W) ->
flatten -> (B, C, H* W) -> transpose -> (B, H* W, C)``. At most one factor of a tensor is sharded. Its ``bounds`` are
R+1 offsets: rank r owns ``[bounds[r], bounds[r + 1])``.

A *partially replicated* factor has replicated parts beside the sharded one: what lies before ``bounds[0]`` and behind
``bounds[-1]`` is on every rank. Text tokens can stand before or behind an image's in this way: in
``(B, 77 + H* W, C)`` a rank holds ``[text | its own tokens]``.

A *segmented* factor has several sharded segments one after the other, such as text and image tokens that are each
divided among the ranks: ``(B, 77* + H* W, C)``. A rank holds ``[its text | its image]``. The ranks' parts one after
the other are the *held order* of the elements, in which the factor is sharded at plain bounds.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class Refused(Exception):
    """A rule or a layout operation is not possible on sharded tensors. The report shows the message."""


class NotOutermost(Refused):
    """An operator needs the sharded rows to be the outermost factor of their dim, and they are not."""


@dataclasses.dataclass(frozen=True)
class PerRank(Generic[T]):
    """An argument of a node of the SPMD graph that differs by rank, one value a rank."""

    values: tuple[T, ...]

    def __repr__(self) -> str:
        return "|".join(map(repr, self.values))


@overload
def per_rank(values: Iterable[int]) -> int | PerRank[int]: ...
@overload
def per_rank(values: Iterable[T]) -> T | PerRank[T]: ...
def per_rank(values: Iterable[Any]) -> Any:
    """Return a :class:`PerRank`, or the plain value where all ranks agree."""
    items = tuple(values)
    return items[0] if all(v == items[0] for v in items) else PerRank(items)


def at_rank(x: Any, rank: int) -> Any:
    """Replace every :class:`PerRank` in nested lists, tuples and dicts by the value of one rank."""
    if isinstance(x, PerRank):
        return x.values[rank]
    if isinstance(x, list | tuple):
        return type(x)(at_rank(v, rank) for v in x)
    if isinstance(x, dict):
        return {k: at_rank(v, rank) for k, v in x.items()}
    return x


@dataclasses.dataclass(frozen=True)
class Part:
    """A run of elements of a factor, [start, stop): sharded at ``bounds``, which count from its start, or replicated.

    Of a sharded part, some ranks may own nothing.
    """

    start: int
    stop: int
    bounds: tuple[int, ...] | None = None

    def local(self, rank: int) -> int:
        """Return the number of its elements on one rank."""
        return self.stop - self.start if self.bounds is None else self.bounds[rank + 1] - self.bounds[rank]


@dataclasses.dataclass(frozen=True)
class Factor:
    """A factor of ``size`` elements, sharded at ``bounds`` or (None) replicated.

    It is partially replicated where the bounds do not reach from 0 to ``size``. It is segmented where ``segments`` has
    the bounds of two or more sharded segments, each of which begins at 0. ``bounds`` then count in the held order.
    """

    size: int
    bounds: tuple[int, ...] | None = None
    segments: tuple[tuple[int, ...], ...] = ()

    @staticmethod
    def of_parts(lengths: Sequence[int], bounds: Sequence[tuple[int, ...] | None]) -> Factor | None:
        """Join parts of some lengths, sharded at bounds from 0 or (None) replicated, to a factor.

        Return None where a replicated part stands between sharded ones: no factor describes that.
        """
        sharded = [i for i, b in enumerate(bounds) if b is not None]
        if not sharded:
            return Factor(sum(lengths))
        first, last = sharded[0], sharded[-1]
        segments = tuple(b for b in bounds[first : last + 1] if b is not None)
        if len(segments) != last + 1 - first:
            return None
        before = sum(lengths[:first])
        joined = tuple(before + sum(offsets) for offsets in zip(*segments, strict=True))
        return Factor(sum(lengths), joined, segments if len(segments) > 1 else ())

    def local(self, rank: int) -> int:
        """Return the elements on one rank, replicated ones included."""
        if self.bounds is None:
            return self.size
        return self.bounds[0] + self.bounds[rank + 1] - self.bounds[rank] + self.size - self.bounds[-1]

    @property
    def partially_replicated(self) -> bool:
        return self.bounds is not None and (self.bounds[0] > 0 or self.bounds[-1] < self.size)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts in order, none of them empty."""
        if self.bounds is None:
            return (Part(0, self.size),)
        first, last = self.bounds[0], self.bounds[-1]
        found = [Part(0, first)]
        for segment in self.segments or (tuple(b - first for b in self.bounds),):
            found.append(Part(found[-1].stop, found[-1].stop + segment[-1], segment))
        return tuple(p for p in (*found, Part(last, self.size)) if p.start < p.stop)

    @property
    def drop_replicas(self) -> Factor:
        """The factor with replicated elements on one rank only: the first (those before) or the last (those behind)."""
        if self.bounds is None or not self.partially_replicated:
            return self
        before, after, ranks = self.bounds[0], self.size - self.bounds[-1], len(self.bounds) - 1
        segments = self.segments
        if segments and before:
            segments = ((0, *[before] * ranks), *segments)
        if segments and after:
            segments = (*segments, (*[0] * ranks, after))
        return Factor(self.size, (0, *self.bounds[1:-1], self.size), segments)

    @property
    def rows(self) -> int:
        """The number of elements that are divided among the ranks."""
        return 0 if self.bounds is None else self.bounds[-1] - self.bounds[0]

    def resharded(self, bounds: Callable[[int], tuple[int, ...]]) -> Factor:
        """Return the factor with each sharded part divided at ``bounds(its number of elements)``."""
        assert self.bounds is not None
        found = Factor.of_parts(
            [p.stop - p.start for p in self.parts],
            [None if p.bounds is None else bounds(p.stop - p.start) for p in self.parts],
        )
        assert found is not None
        return found

    def scaled(self, k: int) -> Factor:
        """Return the factor of ``size * k`` elements that results when ``k`` inner elements are merged into each."""

        def scaled(bounds: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(b * k for b in bounds)

        return Factor(
            self.size * k, None if self.bounds is None else scaled(self.bounds), tuple(map(scaled, self.segments))
        )

    def __repr__(self) -> str:
        if self.bounds is None:
            return str(self.size)
        return "+".join(f"{p.stop - p.start}{'' if p.bounds is None else '*'}" for p in self.parts)


Dim = tuple[Factor, ...]


@dataclasses.dataclass(frozen=True)
class ShardedAxis:
    """The sharded axis of a layout: dim, position of the factor in that dim, the factor's bounds, size and segments."""

    dim: int
    index: int
    bounds: tuple[int, ...]
    size: int
    segments: tuple[tuple[int, ...], ...] = ()

    @property
    def factor(self) -> Factor:
        return Factor(self.size, self.bounds, self.segments)

    @property
    def partially_replicated(self) -> bool:
        return self.factor.partially_replicated

    @property
    def rows(self) -> int:
        return self.factor.rows


def _canonical(dim: Iterable[Factor]) -> Dim:
    """Merge neighbouring replicated factors and drop factors of one, so that equal layouts compare equal."""
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
    """The layout of a tensor: one tuple of factors for each dim."""

    dims: tuple[Dim, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(_canonical(d) for d in self.dims))

    @staticmethod
    def replicated(shape: Sequence[int]) -> Layout:
        """Return the layout of a replicated tensor."""
        return Layout(tuple((Factor(int(s)),) for s in shape))

    @staticmethod
    def sharded_at(shape: Sequence[int], dim: int, bounds: Sequence[int]) -> Layout:
        """Return the layout of a tensor whose ``dim`` is one factor, sharded at ``bounds``."""
        return Layout.replicated(shape).with_dim(dim % len(shape), (Factor(shape[dim], tuple(bounds)),))

    @property
    def shape(self) -> tuple[int, ...]:
        """The global shape."""
        return tuple(math.prod(f.size for f in d) for d in self.dims)

    @property
    def ndim(self) -> int:
        return len(self.dims)

    @property
    def sharded_axis(self) -> ShardedAxis | None:
        """The sharded axis, or None for a replicated tensor."""
        for i, d in enumerate(self.dims):
            for j, f in enumerate(d):
                if f.bounds is not None:
                    return ShardedAxis(i, j, f.bounds, f.size, f.segments)
        return None

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Return the shape of one rank's tensor."""
        return tuple(math.prod(f.local(rank) for f in d) for d in self.dims)

    def with_dim(self, dim: int, factors: Sequence[Factor]) -> Layout:
        """Return the layout with other factors for one dim."""
        return Layout((*self.dims[:dim], tuple(factors), *self.dims[dim + 1 :]))

    def without(self, dims: Iterable[int]) -> Layout:
        """Return the layout without some dims."""
        drop = set(dims)
        return Layout(tuple(d for i, d in enumerate(self.dims) if i not in drop))

    def insert(self, dim: int, factors: Sequence[Factor] = ()) -> Layout:
        """Return the layout with a new dim before ``dim``, by default of size 1."""
        return Layout((*self.dims[:dim], tuple(factors), *self.dims[dim:]))

    def permuted(self, order: Sequence[int]) -> Layout:
        """Return the layout after ``permute``."""
        return Layout(tuple(self.dims[i] for i in order))

    def merged_dim(self, dim: int) -> Factor:
        """Return the dim as one factor. Raise :class:`NotOutermost` where its sharded factor is not the outermost."""
        factors = self.dims[dim]
        if not factors:
            return Factor(1)
        inner = math.prod(f.size for f in factors[1:])
        if any(f.bounds is not None for f in factors[1:]):
            raise NotOutermost("the sharded rows are not the outermost part of the dim")
        return factors[0].scaled(inner)

    def all_factors(self) -> tuple[list[Factor], int]:
        """Return all factors of all dims, and the position of the sharded one among them (-1: none)."""
        factors = [f for d in self.dims for f in (d or (Factor(1),))]
        return factors, next((i for i, f in enumerate(factors) if f.bounds is not None), -1)

    def map_sharded(self, f: Callable[[Factor], Factor]) -> Layout:
        """Return the layout with ``f`` applied to its sharded factor."""
        return Layout(tuple(tuple(f(g) if g.bounds is not None else g for g in d) for d in self.dims))

    def regrouped(self, shape: Sequence[int]) -> Layout:
        """Return the layout after ``reshape`` to ``shape`` (no -1). Raise :class:`Refused` where there is none."""
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
    """Split ``f`` into outer x inner, where outer divides ``need`` (a factor across two dims is split at the gcd)."""
    outer = need if f.size % need == 0 else math.gcd(f.size, need)
    if outer == 1:
        raise Refused(f"reshape splits a dim of {f.size} unevenly")
    inner = f.size // outer
    if f.bounds is None:
        return Factor(outer), Factor(inner)
    if any(b % inner for bounds in (f.bounds, *f.segments) for b in bounds):
        raise Refused(f"reshape splits the sharded rows inside a rank ({f.size} = {outer} x {inner})")
    segments = tuple(tuple(b // inner for b in bounds) for bounds in f.segments)
    return Factor(outer, tuple(b // inner for b in f.bounds), segments), Factor(inner)


def scale_bounds(cut_points: Sequence[float], n: int) -> tuple[int, ...] | None:
    """Return the bounds of ``n`` rows at the image's cut points, or None where some rank would have no row."""
    bounds = tuple(min(n, max(0, math.floor(f * n + 0.5))) for f in cut_points)
    return bounds if all(a < b for a, b in itertools.pairwise(bounds)) else None


def choose_cut_points(rows: int, ranks: int, sizes: Iterable[int]) -> tuple[float, ...]:
    """Choose the cut points of the image: fractions of its height, the same for every map.

    ``sizes`` are the heights of all maps in the graph. Ranks are aligned down to the deepest map that has a row for
    each of them, unless the tallest rank becomes much taller in this way. Each further misaligned level costs 2 % of a
    step (wider halos), which is weighed against the imbalance that it saves.
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
