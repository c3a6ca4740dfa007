"""Operators that only rearrange dims: the layout is rearranged, the local shapes follow from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from districompile.cutter import Cutter, Value
from districompile.ir.layout import Layout, Refused
from districompile.passes.rules.common import positive
from districompile.registry import Sample, rule

aten = torch.ops.aten


def _reshape_samples() -> Iterable[Sample]:
    x = torch.randn(2, 6, 9, 4)
    yield Sample((x, [2, 6, 36]), (2,))
    yield Sample((x, [12, 9, 4]), (2,))
    yield Sample((x, [2, 6, 3, 3, 4]), (2,))
    yield Sample((x, [2, 2, 3, 9, 2, 2]), (2,))
    yield Sample((x, [2, 6, 3, 12]), (2,))
    yield Sample((torch.randn(2, 72, 5), [2, 8, 3, 3, 5]), (1,))


@rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    kind="shape",
    mixed=True,
    samples=_reshape_samples,
)
@rule(
    aten.flatten.using_ints, kind="shape", mixed=True,
    samples=lambda: [Sample((torch.randn(2, 6, 9, 4), 2), (2,)), Sample((torch.randn(2, 6, 9, 4), 1, 2), (2,))],
)  # fmt: skip
@rule(
    aten.unflatten.int,
    kind="shape",
    mixed=True,
    samples=lambda: [
        Sample((torch.randn(2, 36, 4), 1, [9, -1]), (1,)),
        Sample((torch.randn(2, 7, 6), 2, [2, 3]), (1,)),
    ],
)
@rule(aten.view_as.default, aten.reshape_as.default, kind="shape", mixed=True,
      samples=lambda: [Sample((torch.randn(2, 9, 4), torch.randn(2, 36)), (1, None))])  # fmt: skip
@rule(aten.squeeze.dim, kind="shape", mixed=True, samples=lambda: [Sample((torch.randn(2, 1, 9), 1), (2,))])
@rule(aten.squeeze.dims, kind="shape", mixed=True, samples=lambda: [Sample((torch.randn(1, 1, 9), [0, 1]), (2,))])
@rule(aten.squeeze.default, kind="shape", mixed=True, samples=lambda: [Sample((torch.randn(2, 1, 9),), (2,))])
def reshape(cut: Cutter, x: Value, *args: Any) -> Value:
    """Any reshape. Where it splits the rows at a place that is no rank's border, the rows are re-cut so that it is."""
    shape = cut.out_shape
    try:
        layout = x.layout.regrouped(shape)
    except Refused:
        x = _recut_for(cut, cut.unmixed(x), shape)
        layout = x.layout.regrouped(shape)
    return cut.call(aten.reshape.default, x, cut.local_sizes(layout), layout=layout)


def _recut_for(cut: Cutter, x: Value, shape: Sequence[int]) -> Value:
    where = x.layout.cut
    assert where is not None
    if where.index:
        raise Refused(f"reshape of {list(x.shape)} to {list(shape)} breaks the rows up")
    rows = x.layout.coarse(where.dim)  # rows and what was merged into them: tokens that become windows
    x = cut.value(x.node, x.layout.with_dim(where.dim, (rows,)), x.whole)
    for outer in sorted({s for s in shape if rows.size % s == 0 and 1 < s < rows.size}, reverse=True):
        inner = rows.size // outer
        bounds = tuple(b * inner for b in cut.bounds(outer))
        moved = x.layout.map_cut(lambda f, b=bounds: type(f)(f.size, b))  # type: ignore[misc]
        try:
            moved.regrouped(shape)
        except Refused:
            continue
        return cut.rebound(x, bounds)
    raise Refused(f"reshape of {list(x.shape)} to {list(shape)} breaks the rows up")


def _permute(cut: Cutter, x: Value, order: Sequence[int]) -> Value:
    return cut.call(aten.permute.default, x, list(order), layout=x.layout.permuted(order))


@rule(
    aten.permute.default, kind="shape", mixed=True,
    samples=lambda: [Sample((torch.randn(2, 3, 7, 4), [0, 2, 3, 1]), (2,))],
)  # fmt: skip
def permute(cut: Cutter, x: Value, order: Sequence[int]) -> Value:
    return _permute(cut, x, [positive(d, x.ndim) for d in order])


@rule(
    aten.transpose.int, aten.swapaxes.default, kind="shape", mixed=True,
    samples=lambda: [Sample((torch.randn(2, 3, 7, 4), 1, -2), (2,))],
)  # fmt: skip
def transpose(cut: Cutter, x: Value, a: int, b: int) -> Value:
    order = list(range(x.ndim))
    a, b = positive(a, x.ndim), positive(b, x.ndim)
    order[a], order[b] = order[b], order[a]
    return _permute(cut, x, order)


@rule(aten.t.default, aten.mT.default, aten.numpy_T.default, kind="shape", mixed=True,
      samples=lambda: [Sample((torch.randn(7, 4),), (0,))])  # fmt: skip
def matrix_transpose(cut: Cutter, x: Value) -> Value:
    order = list(range(x.ndim))
    if x.ndim > 1:
        order[-1], order[-2] = order[-2], order[-1]
    return _permute(cut, x, order)


@rule(aten.movedim.int, kind="shape", mixed=True, samples=lambda: [Sample((torch.randn(2, 3, 7), 1, -1), (2,))])
def movedim(cut: Cutter, x: Value, source: int, target: int) -> Value:
    order = list(range(x.ndim))
    order.insert(positive(target, x.ndim), order.pop(positive(source, x.ndim)))
    return _permute(cut, x, order)


@rule(aten.unsqueeze.default, kind="shape", mixed=True, samples=lambda: [Sample((torch.randn(2, 7), -1), (1,))])
def unsqueeze(cut: Cutter, x: Value, dim: int) -> Value:
    dim = positive(dim, x.ndim + 1)
    return cut.call(aten.unsqueeze.default, x, dim, layout=x.layout.insert(dim))


def _expand_samples() -> Iterable[Sample]:
    yield Sample((torch.randn(1, 7, 1), [3, 7, 5]), (1,))
    yield Sample((torch.randn(7, 1), [2, 3, -1, 4]), (0,))


@rule(aten.expand.default, aten.broadcast_to.default, kind="shape", mixed=True, samples=_expand_samples)
def expand(cut: Cutter, x: Value, size: Sequence[int], **kwargs: Any) -> Value:
    shape = cut.out_shape
    extra = len(shape) - x.ndim
    where = x.layout.cut
    assert where is not None
    if shape[where.dim + extra] != x.shape[where.dim]:  # one row, which only one rank can have "cut", becomes many
        return cut.whole_value(cut.emit(aten.expand.default, cut.gather(x), list(shape)))
    layout = Layout.whole(shape).with_dim(where.dim + extra, x.layout.dims[where.dim])
    return cut.call(aten.expand.default, x, cut.local_sizes(layout), layout=layout)


@rule(aten.expand_as.default, kind="shape", mixed=True,
      samples=lambda: [
          Sample((torch.randn(1, 7), torch.randn(3, 7)), (1, 1)),
          Sample((torch.randn(1, 7), torch.randn(3, 7)), (None, 1)),
          Sample((torch.randn(1), torch.randn(3, 7)), (None, 1)),
      ])  # fmt: skip
def expand_as(cut: Cutter, x: Value, other: Value) -> Value:
    where = other.layout.cut
    if x.is_cut or where is None:
        return expand(cut, x, other.shape)  # type: ignore[no-any-return]
    dim = where.dim - (other.ndim - x.ndim)
    layout = Layout.whole(cut.out_shape).with_dim(where.dim, other.layout.dims[where.dim])
    if dim >= 0 and x.shape[dim] == other.shape[where.dim] != 1:
        x = cut.align(x, dim, other.layout.dims[where.dim])
    return cut.call(aten.expand.default, x, cut.local_sizes(layout), layout=layout)


@rule(
    aten.repeat.default,
    aten.tile.default,
    kind="shape",
    mixed=True,
    samples=lambda: [
        Sample((torch.randn(2, 7, 3), [2, 1, 3]), (1,)),
        Sample((torch.randn(7, 3), [2, 1, 2]), (0,)),
        Sample((torch.randn(2, 7, 3), [1, 2, 1]), (1,)),
    ],
)
def repeat(cut: Cutter, x: Value, repeats: Sequence[int]) -> Value:
    times = [1] * (x.ndim - len(repeats)) + list(repeats)
    extra = len(times) - x.ndim
    where = x.layout.cut
    assert where is not None
    if times[where.dim + extra] != 1:
        return _repeat_rows(cut, x, times)
    layout = Layout.whole(cut.out_shape).with_dim(where.dim + extra, x.layout.dims[where.dim])
    return cut.call(aten.repeat.default, x, times, layout=layout)


def _repeat_rows(cut: Cutter, x: Value, times: Sequence[int]) -> Value:
    """The rows themselves repeated: copies stand one after the other, so each rank's part may come from anywhere."""
    whole = cut.gather(x)
    node = cut.emit(aten.repeat.default, whole, list(times))
    dim = len(times) - x.ndim + (x.cut_dim or 0)
    size = cut.out_shape[dim]
    return cut.take(cut.whole_value(node), Layout.cut_at(cut.out_shape, dim, cut.bounds(size)))


@rule(
    aten.repeat_interleave.self_int,
    kind="shape",
    mixed=True,
    samples=lambda: [Sample((torch.randn(2, 7, 3), 2, 1), (1,)), Sample((torch.randn(2, 7, 3), 2, 0), (1,))],
)
def repeat_interleave(cut: Cutter, x: Value, repeats: int, dim: int | None = None, **kwargs: Any) -> Value:
    if dim is None:
        raise Refused("repeat_interleave over the flattened tensor")  # a flat tensor holds no rows
    dim = positive(dim, x.ndim)
    x = cut.unmixed(x) if x.cut_dim == dim else x
    where = x.layout.cut
    assert where is not None
    factors = (x.layout.coarse(dim).scaled(repeats),) if dim == where.dim else Layout.whole(cut.out_shape).dims[dim]
    layout = x.layout.with_dim(dim, factors)
    return cut.call(aten.repeat_interleave.self_int, x, repeats, dim, layout=layout)
