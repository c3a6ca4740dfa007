"""Taking tensors apart and putting them together: slices, splits, concatenation, and writes into a slice.

Along other dims than the rows all is local. Along the rows, whole tensors beside a cut one make a *mixed* dim (text
tokens beside an image's), and slicing them off again gives the parts back; nothing is sent. What is left is a fetch.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from districompile.cutter import Cutter, Value, rows_of
from districompile.ir.layout import Factor, Layout, PerRank, Refused, per_rank
from districompile.passes.rules.common import along, positive
from districompile.registry import Sample, rule

aten = torch.ops.aten


def _slice_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 12, 4)
    yield Sample((x, 2, 1, 11), (2,))
    yield Sample((x, 2, 0, sys.maxsize, 2), (2,))
    yield Sample((x, 2, 1, sys.maxsize, 2), (2,))
    yield Sample((x, 3, 1, 3), (2,))
    yield Sample((x, 2, -9, -1), (2,))
    yield Sample((x, 2, 3, 4), (2,))
    yield Sample((x, 2, -1, sys.maxsize), (2,))


@rule(aten.slice.Tensor, kind="window", samples=_slice_samples, mixed=True, few=True)
def slice_(
    cut: Cutter, x: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Value:
    dim = positive(dim, x.ndim)
    first, last, step = slice(start, end, step).indices(x.shape[dim])
    if x.cut_dim != dim:
        return along(cut, x, aten.slice.Tensor, dim, first, last, step)
    return rows_between(cut, x, first, last, step)


def rows_between(cut: Cutter, x: Value, first: int, last: int, step: int = 1) -> Value:
    """Rows first, first + step, ... below last of the cut dim."""
    dim = x.cut_dim
    assert dim is not None
    size = len(range(first, last, step))
    if size == x.shape[dim]:
        return x
    if size == 0:
        return cut.whole_value(cut.emit(aten.slice.Tensor, x, dim, 0, 0))
    if x.layout.cut.mixed and step == 1:  # type: ignore[union-attr]
        part = _part_of_mixed(cut, x, dim, first, last)
        if part is not None:
            return part
    x = cut.unmixed(x)
    x.layout.coarse(dim)
    try:
        bounds = cut.bounds(size)
    except Refused:  # fewer rows than ranks: all of them on every rank, and no others
        return cut.whole_value(_stepped(cut, cut.fetch(x, [(first, last)] * cut.ranks), dim, step))
    want = [(first + a * step, first + (b - 1) * step + 1) for a, b in itertools.pairwise(bounds)]
    node = _stepped(cut, cut.fetch(x, want), dim, step)
    return cut.value(node, x.layout.with_dim(dim, (Factor(size, bounds),)))


def _stepped(cut: Cutter, node: torch.fx.Node, dim: int, step: int) -> torch.fx.Node:
    return node if step == 1 else cut.emit(aten.slice.Tensor, node, dim, 0, sys.maxsize, step)


def _part_of_mixed(cut: Cutter, x: Value, dim: int, first: int, last: int) -> Value | None:
    """A slice that keeps all cut rows, or none of them; None where it is another one."""
    factor = x.layout.coarse(dim)
    assert factor.bounds is not None
    begin, end = factor.bounds[0], factor.bounds[-1]
    if last <= begin:
        return cut.whole_value(cut.emit(aten.slice.Tensor, x, dim, first, last))
    missing: Any = per_rank(factor.rows - (b - a) for a, b in itertools.pairwise(factor.bounds))
    if first >= end:
        return cut.whole_value(cut.emit(aten.slice.Tensor, x, dim, _less(first, missing), _less(last, missing)))
    if first > begin or last < end:
        return None
    node = cut.emit(aten.slice.Tensor, x, dim, first, _less(last, missing))
    return cut.value(node, x.layout.with_dim(dim, (Factor(last - first, tuple(b - first for b in factor.bounds)),)))


def _less(x: int, by: int | PerRank[int]) -> int | PerRank[int]:
    return per_rank(x - v for v in by.values) if isinstance(by, PerRank) else x - by


def _select_samples() -> Iterable[Sample]:
    yield Sample((torch.randn(3, 7, 2), 0, 1), (1,))
    yield Sample((torch.randn(3, 7, 2), 1, -2), (1,))


@rule(aten.select.int, kind="shape", samples=_select_samples, mixed=True, few=True)
def select(cut: Cutter, x: Value, dim: int, index: int) -> Value:
    dim = positive(dim, x.ndim)
    if x.cut_dim != dim:
        return cut.call(aten.select.int, x, dim, index, layout=x.layout.without([dim]))
    index = positive(index, x.shape[dim])
    return _squeezed(cut, _row(cut, x, index), dim)


def _row(cut: Cutter, x: Value, index: int) -> Value:
    """One row, on every rank."""
    row = rows_between(cut, x, index, index + 1)
    return cut.gather(row) if cut.ranks > 1 else cut.whole_value(row.node)


def _squeezed(cut: Cutter, x: Value, dim: int) -> Value:
    return cut.whole_value(cut.emit(aten.select.int, x, dim, 0))


def _pieces(cut: Cutter, x: Value, dim: int, sizes: Sequence[int]) -> tuple[Value, ...]:
    out, start = [], 0
    for size in sizes:
        if x.cut_dim == dim:
            out.append(rows_between(cut, x, start, start + size))
        else:
            assert cut.target is not None
            node = cut.emit(aten.slice.Tensor, x, dim, start, start + size, name=f"{cut.target.name}_part")
            out.append(cut.value(node, x.layout.with_dim(dim, Layout.whole((size,)).dims[0])))
        start += size
    return tuple(out)


@rule(
    aten.split_with_sizes.default, kind="shape", mixed=True, few=True,
    samples=lambda: [
        Sample((torch.randn(2, 7, 9), [4, 5], -1), (1,)), Sample((torch.randn(2, 12, 3), [5, 1, 6], 1), (1,)),
    ],
)  # fmt: skip
@rule(
    aten.split.Tensor, aten.chunk.default, aten.tensor_split.sections, kind="shape", mixed=True, few=True,
    samples=lambda: [Sample((torch.randn(2, 7, 9), 4, -1), (1,)), Sample((torch.randn(2, 12, 3), 3, 1), (1,))],
)  # fmt: skip
def split(cut: Cutter, x: Value, how: Any, dim: int = 0) -> tuple[Value, ...]:
    dim = positive(dim, x.ndim)
    results: Any = cut.out
    return _pieces(cut, x, dim, [int(t.shape[dim]) for t in results])


@rule(
    aten.unbind.int, kind="shape", mixed=True, few=True,
    samples=lambda: [Sample((torch.randn(3, 7, 2), 0), (1,)), Sample((torch.randn(3, 5, 2), 1), (1,))],
)  # fmt: skip
def unbind(cut: Cutter, x: Value, dim: int = 0) -> tuple[Value, ...]:
    dim = positive(dim, x.ndim)
    if x.cut_dim == dim:
        whole = cut.gather(x)
        nodes = [cut.emit(aten.select.int, whole, dim, i) for i in range(x.shape[dim])]
        return tuple(cut.whole_value(n) for n in nodes)
    layout = x.layout.without([dim])
    assert cut.target is not None
    name = cut.target.name
    return tuple(
        cut.value(cut.emit(aten.select.int, x, dim, i, name=f"{name}_part"), layout) for i in range(x.shape[dim])
    )


def _cat_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 7)
    yield Sample(([x, torch.randn(2, 1, 7)], 1), (2, 2))
    yield Sample(([x, torch.randn(2, 1, 7)], 1), (2, None))
    yield Sample(([torch.randn(2, 3, 4), x], -1), (None, 2))
    yield Sample(([torch.randn(2, 3, 2), x, torch.randn(2, 3, 3), torch.randn(2, 3, 1)], 2), (None, 2, None, None))
    yield Sample(([x, torch.randn(2, 3, 5), torch.randn(2, 3, 6)], 2), (2, None, 2))
    yield Sample(([torch.randn(2, 3, 29), x], 2), (None, 2))
    yield Sample(([x, torch.randn(2, 3, 5)], 2), (2, 1))


@rule(aten.cat.default, aten.concat.default, kind="shape", samples=_cat_samples, mixed=True)
def cat(cut: Cutter, tensors: Sequence[Value], dim: int = 0) -> Value:
    tensors = [t for t in tensors if t.shape != (0,)]
    dim = positive(dim, len(cut.out_shape))
    elsewhere = [t for t in tensors if t.is_cut and t.cut_dim != dim]
    if not elsewhere:
        return _cat_rows(cut, [t for t in tensors if t.shape[dim]], dim)
    leader = elsewhere[0]
    where = leader.layout.cut
    assert where is not None
    factors = leader.layout.dims[where.dim]
    parts = [cut.align(t, where.dim, factors) for t in tensors]
    layout = Layout.whole(cut.out_shape).with_dim(where.dim, factors)
    return cut.call(aten.cat.default, parts, dim, layout=layout)


def _cat_rows(cut: Cutter, tensors: Sequence[Value], dim: int) -> Value:
    """Concatenation along the rows: one cut tensor with whole ones beside it becomes mixed, if the whole ones are not
    more than it; otherwise each rank gathers its share of the result."""
    shape, total = cut.out_shape, cut.out_shape[dim]
    cuts = [i for i, t in enumerate(tensors) if t.is_cut]
    factor = tensors[cuts[0]].layout.coarse(dim)
    if len(cuts) == 1 and total - factor.rows <= factor.rows and factor.bounds is not None:
        offset = sum(t.shape[dim] for t in tensors[: cuts[0]])
        layout = Layout.whole(shape).with_dim(dim, (Factor(total, tuple(b + offset for b in factor.bounds)),))
        joined = cut.emit(aten.cat.default, list(tensors), dim)
        wholes = [t.whole if t.is_cut else t.node for t in tensors]
        return cut.value(joined, layout, cut.emit(aten.cat.default, wholes, dim) if all(wholes) else None)
    bounds = cut.bounds(total)
    layout = Layout.cut_at(shape, dim, bounds)
    node: torch.fx.Node | None = None
    offset = 0
    for t in tensors:
        # What a rank has of the others is zero here, so that adding up puts all in their places
        want = [(a - offset, b - offset) for a, b in itertools.pairwise(bounds)]
        part = cut.fetch(t, want) if t.is_cut else cut.window(t, dim, want)
        add = aten.logical_or.default if t.dtype == torch.bool else aten.add.Tensor
        node = part if node is None else cut.emit(add, node, part)
        offset += t.shape[dim]
    assert node is not None
    return cut.value(node, layout)


@rule(aten.stack.default, kind="shape", mixed=True,
      samples=lambda: [Sample(([torch.randn(2, 7), torch.randn(2, 7)], 1), (1, 1))])  # fmt: skip
def stack(cut: Cutter, tensors: Sequence[Value], dim: int = 0) -> Value:
    leader = next(t for t in tensors if t.is_cut)
    where = leader.layout.cut
    assert where is not None
    dim = positive(dim, leader.ndim + 1)
    factors = leader.layout.dims[where.dim]
    parts = [cut.align(t, where.dim, factors) for t in tensors]
    layout = parts[0].layout.insert(dim, Layout.whole((len(parts),)).dims[0])
    return cut.call(aten.stack.default, parts, dim, layout=layout)


def _scatter_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 12, 4)
    yield Sample((x, torch.randn(2, 2, 12, 4), 1, 0, 2), (2, 2))
    yield Sample((x, torch.randn(2, 2, 12, 4), 1, 0, 2), (None, 2))
    yield Sample((x, torch.randn(2, 3, 5, 4), 2, 3, 8), (2, 2))
    yield Sample((x, torch.randn(2, 3, 1, 4), 2, -1, sys.maxsize), (2, None))
    yield Sample((x, torch.randn(2, 3, 7, 4), 2, 3, 10), (None, 2))
    yield Sample((x, torch.randn(2, 3, 6, 4), 2, 1, sys.maxsize, 2), (2, 2))
    yield Sample((x, torch.randn(2, 3, 4, 4), 2, 0, 11, 3), (None, 2))
    yield Sample((x, torch.randn(2, 3, 2, 4), 2, 4, 10, 5), (2, None))


@rule(aten.slice_scatter.default, kind="window", samples=_scatter_samples)
def slice_scatter(
    cut: Cutter, x: Value, source: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Value:
    """A write into a slice. Into rows: each rank replaces those of its own that are written."""
    dim = positive(dim, x.ndim)
    first, last, step = slice(start, end, step).indices(x.shape[dim])
    leader = x if x.is_cut else source
    where = leader.layout.cut
    assert where is not None
    if where.dim != dim:
        factors = leader.layout.dims[where.dim]
        parts = [cut.align(v, where.dim, factors) for v in (x, source)]
        layout = parts[0].layout
        return cut.call(aten.slice_scatter.default, *parts, dim, first, last, step, layout=layout)
    if not x.is_cut:
        x = cut.take(x, Layout.cut_at(x.shape, dim, cut.bounds(x.shape[dim])))
    _, bounds, _ = rows_of(x)
    if step != 1:
        return _every(cut, x, source, dim, first, step)
    want = [(a - first, b - first) for a, b in itertools.pairwise(bounds)]
    new = cut.fetch(source, want) if source.is_cut else cut.window(source, dim, want)
    return _where_rows(cut, x, new, dim, first, last)


def _every(cut: Cutter, x: Value, source: Value, dim: int, first: int, step: int) -> Value:
    """``source`` in rows first, first + step, ...: each rank writes those that fall into its own."""
    _, bounds, _ = rows_of(x)
    count = source.shape[dim]
    before = [min(count, max(0, -((first - b) // step))) for b in bounds]  # rows of source above each border
    want = list(itertools.pairwise(before))
    new = cut.fetch(source, want) if source.is_cut else cut.window(source, dim, want)
    starts = [min(first + a * step - b, c - b) for (a, _), b, c in zip(want, bounds, bounds[1:], strict=False)]
    stops = [s + max(0, (b - a - 1) * step + 1) if b > a else s for s, (a, b) in zip(starts, want, strict=True)]
    node = cut.emit(aten.slice_scatter.default, x, new, dim, per_rank(starts), per_rank(stops), step)
    return cut.value(node, x.layout)


def _where_rows(cut: Cutter, x: Value, new: torch.fx.Node, dim: int, first: int, last: int) -> Value:
    """``new`` in rows [first, last) of the whole, ``x`` elsewhere."""
    _, bounds, _ = rows_of(x)
    device = x.node.meta["local"][0].device
    rows = cut.emit(aten.arange.start, per_rank(bounds[:-1]), per_rank(bounds[1:]), device=device, pin_memory=False)
    inside = cut.emit(
        aten.logical_and.default, cut.emit(aten.ge.Scalar, rows, first), cut.emit(aten.lt.Scalar, rows, last)
    )
    heights = per_rank(b - a for a, b in itertools.pairwise(bounds))
    mask = cut.emit(aten.reshape.default, inside, [heights if d == dim else 1 for d in range(x.ndim)])
    return cut.value(cut.emit(aten.where.self, mask, new, x), x.layout)


@rule(
    aten.select_scatter.default, kind="window",
    samples=lambda: [
        Sample((torch.randn(2, 9, 4), torch.randn(9, 4), 0, 1), (1, 0)),
        Sample((torch.randn(2, 9, 4), torch.randn(2, 4), 1, 7), (1, None)),
    ],
)  # fmt: skip
def select_scatter(cut: Cutter, x: Value, source: Value, dim: int, index: int) -> Value:
    dim = positive(dim, x.ndim)
    index = positive(index, x.shape[dim])
    thick = source.layout.insert(dim)
    thicker = cut.call(aten.unsqueeze.default, source, dim, layout=thick)
    return slice_scatter(cut, x, thicker, dim, index, index + 1)  # type: ignore[no-any-return]
