"""Operators that work along the dims they name and treat all others alike: local where the rows are none of those."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from districompile.cutter import Cutter, Value
from districompile.ir.layout import Layout, Refused
from districompile.passes.rules.common import along, positive
from districompile.registry import Sample, rule

aten = torch.ops.aten


def _arguments(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The operator's arguments by name, defaults filled in."""
    schema = op._schema.arguments
    out = {a.name: a.default_value for a in schema if a.has_default_value()}
    out.update(zip((a.name for a in schema), args, strict=False))
    out.update(kwargs)
    return out


def _along(given: dict[str, Any], ndim: int) -> set[int]:
    dim = given.get("dim")
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return set(range(ndim))
    return {positive(d, ndim) for d in ([dim] if isinstance(dim, int) else dim)}


def _sample(*tail: Any) -> Callable[[], Iterable[Sample]]:
    return lambda: [Sample((torch.randn(2, 3, 9, 4), *tail), (2,))]


_ONE_DIM: dict[Any, tuple[Any, ...]] = {
    aten.cummax.default: (1,), aten.cummin.default: (1,), aten.sort.default: (1, True), aten.argsort.default: (-1,),
    aten.topk.default: (2, -1), aten.kthvalue.default: (2, 1), aten.mode.default: (1,),
    aten.prod.dim_int: (1,), aten.median.dim: (1,), aten.nanmedian.dim: (1,),
    aten.glu.default: (3,), aten.any.dim: (1,), aten.all.dim: (1,),
}  # fmt: skip


def dimwise(cut: Cutter, x: Value, *args: Any, **kwargs: Any) -> Any:
    """Local, or refused where the rows are among the dims named."""
    op = cut.operator
    given = _arguments(op, (x, *args), kwargs)
    dims = _along(given, x.ndim)
    where = x.layout.cut
    if where is None or where.dim in dims:
        raise Refused(f"{op._schema.name.removeprefix('aten::')} over the rows")
    return _local(cut, op, x, dims, (x, *args), kwargs)


def _local(cut: Cutter, op: Any, x: Value, dims: set[int], args: Any, kwargs: Any) -> Any:
    where = x.layout.cut
    assert where is not None
    node = cut.emit(op, *args, **kwargs)
    outs: Any = cut.out
    many = isinstance(outs, list | tuple)
    values = []
    for i, out in enumerate(outs if many else [outs]):
        part = cut.emit(operator.getitem, node, i) if many else node
        gone = sum(1 for d in dims if d < where.dim) if out.ndim < x.ndim else 0
        values.append(cut.value(part, Layout.whole(out.shape).with_dim(where.dim - gone, x.layout.dims[where.dim])))
    return tuple(values) if many else values[0]


def _truths(*tail: Any) -> Callable[[], Iterable[Sample]]:
    return lambda: [Sample((torch.randn(2, 3, 9, 4) > 0, *tail), (2,))]


for _op, _tail in _ONE_DIM.items():
    _make = _truths if _op in (aten.any.dim, aten.all.dim) else _sample
    rule(_op, kind="dimwise", mixed=True, samples=_make(*_tail))(dimwise)


_FFT = {
    aten.fft_fftn.default: (None, [-2, -1]), aten.fft_ifftn.default: (None, [-2, -1]), aten.fft_fft2.default: (),
    aten.fft_ifft2.default: (), aten.fft_rfft2.default: (), aten.fft_rfftn.default: (None, [2, 3]),
    aten.fft_fft.default: (None, -1), aten.fft_ifft.default: (None, 2), aten.fft_rfft.default: (None, 2),
    aten.fft_fftshift.default: ([-2, -1],), aten.fft_ifftshift.default: ([2, 3],), aten.fft_irfft2.default: (),
    aten.fft_irfftn.default: (None, [-2, -1]), aten.fft_irfft.default: (None, -1),
}  # fmt: skip


def _fourier(cut: Cutter, x: Value, *args: Any, **kwargs: Any) -> Any:
    """Every frequency has a part of every row: transformed whole on every rank, then cut again."""
    op = cut.operator
    dims = _along(_arguments(op, (x, *args), kwargs), x.ndim)
    where = x.layout.cut
    assert where is not None
    if where.dim not in dims:
        return _local(cut, op, x, set(), (x, *args), kwargs)
    node = cut.emit(op, cut.gather(x, kind="other"), *args, **kwargs)
    whole = cut.whole_value(node)
    try:
        bounds = cut.bounds(cut.out_shape[where.dim])
    except Refused:
        return whole
    return cut.take(whole, Layout.cut_at(cut.out_shape, where.dim, bounds))


for _op, _tail in _FFT.items():
    rule(_op, kind="everything", samples=_sample(*_tail))(_fourier)


@rule(aten.view_as_real.default, kind="pass-through", mixed=True,
      samples=lambda: [Sample((torch.randn(2, 9, 4, dtype=torch.complex64),), (1,))])  # fmt: skip
def view_as_real(cut: Cutter, x: Value) -> Value:
    return along(cut, x, aten.view_as_real.default)


@rule(aten.view_as_complex.default, kind="pass-through", mixed=True,
      samples=lambda: [Sample((torch.randn(2, 9, 4, 2),), (1,))])  # fmt: skip
def view_as_complex(cut: Cutter, x: Value) -> Value:
    return along(cut, x, aten.view_as_complex.default)


def _gather_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 9, 4)
    yield Sample((x, 1, torch.randint(0, 3, (2, 5, 9, 4))), (2, 2))
    yield Sample((x, -1, torch.randint(0, 4, (2, 3, 9, 2))), (2, None))


@rule(aten.gather.default, kind="dimwise", samples=_gather_samples)
def gather(cut: Cutter, x: Value, dim: int, index: Value, *args: Any, **kwargs: Any) -> Value:
    leader = x if x.is_cut else index
    where = leader.layout.cut
    assert where is not None
    if where.dim == positive(dim, x.ndim) or x.shape[where.dim] != index.shape[where.dim]:
        raise Refused("rows are picked by an index")
    factors = leader.layout.dims[where.dim]
    parts = [cut.align(v, where.dim, factors) for v in (x, index)]
    layout = Layout.whole(cut.out_shape).with_dim(where.dim, factors)
    return cut.call(aten.gather.default, parts[0], dim, parts[1], *args, layout=layout, **kwargs)


@rule(
    aten.index_select.default, kind="dimwise",
    samples=lambda: [Sample((torch.randn(2, 3, 9, 4), 1, torch.tensor([2, 0, 1, 1])), (2, None))],
)  # fmt: skip
def index_select(cut: Cutter, x: Value, dim: int, index: Value) -> Value:
    if x.cut_dim is None or x.cut_dim == positive(dim, x.ndim) or index.is_cut:
        raise Refused("rows are picked by an index")
    return along(cut, x, aten.index_select.default, dim, index)


def _index_samples() -> Iterable[Sample]:
    yield Sample((torch.randn(11, 6), [torch.randint(0, 11, (2, 9))]), (None, 1))
    yield Sample((torch.randn(2, 3, 9, 4), [None, torch.tensor([2, 0])]), (2, None))
    yield Sample((torch.randn(2, 9, 3), [None, None, torch.tensor([[2, 0], [1, 1]])]), (1, None))


@rule(aten.index.Tensor, kind="dimwise", samples=_index_samples)
def index(cut: Cutter, x: Value, indices: Sequence[Value | None]) -> Value:
    """One tensor of positions, in a dim that is not cut."""
    named = [(d, i) for d, i in enumerate(indices) if i is not None]
    if len(named) != 1 or (x.is_cut and named[0][1].is_cut) or named[0][1].dtype in (torch.bool, torch.uint8):
        raise Refused("indexing by several tensors, or by a mask")
    dim, at = named[0]
    if x.cut_dim == dim:
        raise Refused("rows are picked by an index")
    dims = (*x.layout.dims[:dim], *at.layout.dims, *x.layout.dims[dim + 1 :])
    return cut.call(aten.index.Tensor, x, list(indices), layout=Layout(dims))


@rule(
    aten.index_put.default, kind="dimwise",
    samples=lambda: [
        Sample((torch.randn(2, 3, 9), [None, torch.tensor([2, 0])], torch.randn(2, 2, 9)), (2, None, 2)),
        Sample((torch.randn(3, 9), [torch.tensor([1])], torch.randn(9)), (1, None, 0)),
        Sample((torch.randn(3, 9), [torch.tensor([1])], torch.tensor(2.0)), (1, None, None)),
    ],
)  # fmt: skip
def index_put(cut: Cutter, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool = False) -> Value:
    """Positions given in dims before the rows, in one tensor each; the rows are the same dim of both, from the end."""
    named = [d for d, i in enumerate(indices) if i is not None]
    leader = x if x.is_cut else values
    where = leader.layout.cut
    if where is None or any(i is not None and i.is_cut for i in indices):
        raise Refused("the positions are cut")
    behind = leader.ndim - where.dim
    dim = x.ndim - behind
    if max(named) >= dim or named != list(range(named[0], named[0] + len(named))):
        raise Refused("rows are written by an index")
    factors = leader.layout.dims[where.dim]
    x = cut.align(x, dim, factors)
    if values.ndim >= behind and values.shape[-behind] != 1:
        values = cut.align(values, values.ndim - behind, factors)
    return cut.call(aten.index_put.default, x, list(indices), values, accumulate, layout=x.layout)


_SCATTER = (
    aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.scatter.reduce, aten.scatter.value_reduce,
    aten.scatter_reduce.two,
)  # fmt: skip


def _scatter_samples(op: Any) -> Callable[[], Iterable[Sample]]:
    def samples() -> Iterable[Sample]:
        index = torch.stack([torch.randperm(5)[:3] for _ in range(2 * 9 * 4)], -1).reshape(3, 2, 9, 4).transpose(0, 1)
        x, alone = torch.randn(2, 5, 9, 4), "value" in str(op)
        kwargs = {"reduce": "add"} if op in (aten.scatter.reduce, aten.scatter.value_reduce) else {}
        tail: tuple[Any, ...] = (0.5,) if alone else (torch.randn(2, 4, 9, 4),)
        tail = (*tail, "amax") if op is aten.scatter_reduce.two else tail
        tensors = 2 if alone else 3
        for rows in ((2,) * tensors, (None, *(2,) * (tensors - 1)), (2, *(None,) * (tensors - 1))):
            yield Sample((x, 1, index, *tail), rows, kwargs)

    return samples


def _scatter(cut: Cutter, x: Value, dim: int, index: Value, source: Any, *args: Any, **kwargs: Any) -> Value:
    """Written to positions in another dim than the rows."""
    op = cut.operator
    tensors = [v for v in (x, index, source) if isinstance(v, Value)]
    leader = next(v for v in tensors if v.is_cut)
    where = leader.layout.cut
    assert where is not None
    if where.dim == positive(dim, x.ndim) or len({v.shape[where.dim] for v in tensors}) > 1:
        raise Refused("rows are written by an index")
    factors = leader.layout.dims[where.dim]
    parts = [cut.align(v, where.dim, factors) for v in tensors]
    tail = parts[2:] if isinstance(source, Value) else [source]
    layout = Layout.whole(cut.out_shape).with_dim(where.dim, factors)
    return cut.call(op, parts[0], dim, parts[1], *tail, *args, layout=layout, **kwargs)


for _op in _SCATTER:
    rule(_op, kind="dimwise", samples=_scatter_samples(_op))(_scatter)


@rule(aten.one_hot.default, kind="pass-through", mixed=True,
      samples=lambda: [Sample((torch.randint(0, 5, (2, 9, 4)), 5), (1,))])  # fmt: skip
def one_hot(cut: Cutter, x: Value, classes: int) -> Value:
    return cut.call(aten.one_hot.default, x, classes, layout=x.layout.insert(x.ndim, Layout.whole((classes,)).dims[0]))


@rule(aten.cdist.default, aten._cdist_forward.default, kind="pass-through", mixed=True,
      samples=lambda: [Sample((torch.randn(2, 9, 4), torch.randn(2, 5, 4), 2.0, None), (1, None))])  # fmt: skip
def cdist(cut: Cutter, a: Value, b: Value, p: float = 2.0, mode: int | None = None) -> Value:
    """Distances of rows to a table."""
    op = cut.operator
    if a.cut_dim != a.ndim - 2:
        raise Refused("distances to rows, or of rows in the batch")
    return along(cut, a, op, cut.gather(b), p, mode)


@rule(aten.outer.default, aten.ger.default, kind="contraction", mixed=True,
      samples=lambda: [Sample((torch.randn(9), torch.randn(4)), (0, None)),
                       Sample((torch.randn(3), torch.randn(9)), (None, 0))])  # fmt: skip
def outer(cut: Cutter, a: Value, b: Value) -> Value:
    b = cut.gather(b) if a.is_cut else b
    return cut.call(aten.outer.default, a, b, layout=Layout((a.layout.dims[0], b.layout.dims[0])))


@rule(aten.type_as.default, kind="pass-through", mixed=True,
      samples=lambda: [Sample((torch.randn(2, 9), torch.randn(3).double()), (1, None))])  # fmt: skip
def type_as(cut: Cutter, x: Value, other: Value) -> Value:
    """The dtype of another tensor, of any shape."""
    return cut.call(aten._to_copy.default, x, dtype=cut.out.dtype, layout=x.layout)


@rule(
    aten._native_batch_norm_legit_no_training.default, kind="pass-through",
    samples=lambda: [
        Sample((torch.randn(2, 6, 9, 4), torch.randn(6), torch.randn(6), torch.randn(6), torch.rand(6) + 0.5, 0.1,
                1e-5), (2, None, None, None, None)),
    ],
)  # fmt: skip
def batch_norm(
    cut: Cutter,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value,
    var: Value,
    momentum: float,
    eps: float,
) -> tuple[Value, Value, Value]:
    """By running statistics: pointwise. What it would save for the backward pass is empty."""
    if x.cut_dim == 1:
        raise Refused("the channels are cut")
    node = cut.emit(aten.batch_norm.default, x, weight, bias, mean, var, False, momentum, eps, False)
    empty = [cut.whole_value(cut.emit(aten.new_zeros.default, x, [0])) for _ in range(2)]
    return cut.value(node, x.layout), empty[0], empty[1]
