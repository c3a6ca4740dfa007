# SPDX-License-Identifier: Apache-2.0
"""Operators that work along named dims and treat all others alike: they are local unless a named dim is sharded."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from districompile.ir.layout import Layout, Refused
from districompile.passes.rules.common import keep_sharding, positive
from districompile.sharding.builder import ShardedValue, ShardingBuilder
from districompile.sharding.registry import Sample, rule

aten = torch.ops.aten


def _arguments(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the operator's arguments by name, with its defaults."""
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


def dimwise(builder: ShardingBuilder, x: ShardedValue, *args: Any, **kwargs: Any) -> Any:
    """Compute locally. Raise :class:`Refused` where a named dim is sharded."""
    op = builder.operator
    given = _arguments(op, (x, *args), kwargs)
    dims = _along(given, x.ndim)
    axis = x.layout.sharded_axis
    if axis is None or axis.dim in dims:
        raise Refused(f"{op._schema.name.removeprefix('aten::')} over the rows")
    return _local(builder, op, x, dims, (x, *args), kwargs)


def _local(builder: ShardingBuilder, op: Any, x: ShardedValue, dims: set[int], args: Any, kwargs: Any) -> Any:
    axis = x.layout.sharded_axis
    assert axis is not None
    node = builder.emit(op, *args, **kwargs)
    outs: Any = builder.out
    many = isinstance(outs, list | tuple)
    values = []
    for i, out in enumerate(outs if many else [outs]):
        part = builder.emit(operator.getitem, node, i) if many else node
        gone = sum(1 for d in dims if d < axis.dim) if out.ndim < x.ndim else 0
        values.append(
            builder.value(part, Layout.replicated(out.shape).with_dim(axis.dim - gone, x.layout.dims[axis.dim]))
        )
    return tuple(values) if many else values[0]


def _truths(*tail: Any) -> Callable[[], Iterable[Sample]]:
    return lambda: [Sample((torch.randn(2, 3, 9, 4) > 0, *tail), (2,))]


for _op, _tail in _ONE_DIM.items():
    _make = _truths if _op in (aten.any.dim, aten.all.dim) else _sample
    rule(_op, partially_replicated=True, samples=_make(*_tail))(dimwise)


_FFT = {
    aten.fft_fftn.default: (None, [-2, -1]), aten.fft_ifftn.default: (None, [-2, -1]), aten.fft_fft2.default: (),
    aten.fft_ifft2.default: (), aten.fft_rfft2.default: (), aten.fft_rfftn.default: (None, [2, 3]),
    aten.fft_fft.default: (None, -1), aten.fft_ifft.default: (None, 2), aten.fft_rfft.default: (None, 2),
    aten.fft_fftshift.default: ([-2, -1],), aten.fft_ifftshift.default: ([2, 3],), aten.fft_irfft2.default: (),
    aten.fft_irfftn.default: (None, [-2, -1]), aten.fft_irfft.default: (None, -1),
}  # fmt: skip


def _fourier(builder: ShardingBuilder, x: ShardedValue, *args: Any, **kwargs: Any) -> Any:
    """Transform gathered rows on every rank, then shard the result: every frequency has a part of every row."""
    op = builder.operator
    dims = _along(_arguments(op, (x, *args), kwargs), x.ndim)
    axis = x.layout.sharded_axis
    assert axis is not None
    if axis.dim not in dims:
        return _local(builder, op, x, set(), (x, *args), kwargs)
    node = builder.emit(op, builder.gather(x, purpose="other"), *args, **kwargs)
    replicated = builder.replicated_value(node)
    try:
        bounds = builder.bounds(builder.out_shape[axis.dim])
    except Refused:
        return replicated
    return builder.slice_local(replicated, Layout.sharded_at(builder.out_shape, axis.dim, bounds))


for _op, _tail in _FFT.items():
    rule(_op, samples=_sample(*_tail))(_fourier)


@rule(aten.view_as_real.default, partially_replicated=True,
      samples=lambda: [Sample((torch.randn(2, 9, 4, dtype=torch.complex64),), (1,))])  # fmt: skip
def view_as_real(builder: ShardingBuilder, x: ShardedValue) -> ShardedValue:
    """Shard ``view_as_real``, which is local: the new dim is the last."""
    return keep_sharding(builder, x, aten.view_as_real.default)


@rule(aten.view_as_complex.default, partially_replicated=True,
      samples=lambda: [Sample((torch.randn(2, 9, 4, 2),), (1,))])  # fmt: skip
def view_as_complex(builder: ShardingBuilder, x: ShardedValue) -> ShardedValue:
    """Shard ``view_as_complex``, which is local: only the last dim, of size 2, disappears."""
    return keep_sharding(builder, x, aten.view_as_complex.default)


def _picked(builder: ShardingBuilder, x: ShardedValue, index: ShardedValue, dim: int) -> tuple[Any, ShardedValue]:
    """Divide the rows that ``index`` picks along its dim ``dim`` among the ranks. Return all of ``x``, and the index.

    Tokens that are merged by their likeness (token merging) are picked this way. What follows is then divided, too.
    """
    if index.is_sharded and index.sharded_dim != dim:
        raise Refused("rows are picked by an index that is sharded along another dim")
    if not index.is_sharded:
        index = builder.slice_local(index, Layout.sharded_at(index.shape, dim, builder.bounds(index.shape[dim])))
    return builder.gather(x, purpose="other"), index


def _gather_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 9, 4)
    yield Sample((x, 2, torch.randint(0, 9, (2, 3, 11, 4))), (2, None))
    yield Sample((x, -2, torch.randint(0, 9, (1, 3, 8, 2))), (2, 2))
    yield Sample((x, 2, torch.randint(0, 9, (2, 3, 11, 4))), (None, 2))
    yield Sample((x, 1, torch.randint(0, 3, (2, 5, 9, 4))), (2, 2))
    yield Sample((x, -1, torch.randint(0, 4, (2, 3, 9, 2))), (2, None))


@rule(aten.gather.default, samples=_gather_samples)
def gather(
    builder: ShardingBuilder, x: ShardedValue, dim: int, index: ShardedValue, *args: Any, **kwargs: Any
) -> ShardedValue:
    """Shard ``gather``. Along the rows, every rank computes a part of the picked ones from all rows.

    Along another dim, ``x`` and ``index`` must have the same number of rows.
    """
    at = positive(dim, x.ndim)
    if at in (x.sharded_dim, index.sharded_dim):
        whole, index = _picked(builder, x, index, at)
        layout = Layout.replicated(builder.out_shape).with_dim(at, index.layout.dims[at])
        return builder.call(aten.gather.default, whole, dim, index, *args, layout=layout, **kwargs)
    leader = x if x.is_sharded else index
    axis = leader.layout.sharded_axis
    assert axis is not None
    if x.shape[axis.dim] != index.shape[axis.dim]:
        raise Refused("rows are picked by an index")
    factors = leader.layout.dims[axis.dim]
    parts = [builder.redistribute(v, axis.dim, factors) for v in (x, index)]
    layout = Layout.replicated(builder.out_shape).with_dim(axis.dim, factors)
    return builder.call(aten.gather.default, parts[0], dim, parts[1], *args, layout=layout, **kwargs)


@rule(
    aten.index_select.default,
    samples=lambda: [
        Sample((torch.randn(2, 3, 9, 4), 1, torch.tensor([2, 0, 1, 1])), (2, None)),
        Sample((torch.randn(2, 9, 4), 1, torch.randint(0, 9, (12,))), (1, None)),
        Sample((torch.randn(2, 9, 4), -2, torch.randint(0, 9, (8,))), (1, 0)),
        Sample((torch.randn(2, 9, 4), 1, torch.randint(0, 9, (8,))), (None, 0)),
    ],
)  # fmt: skip
def index_select(builder: ShardingBuilder, x: ShardedValue, dim: int, index: ShardedValue) -> ShardedValue:
    """Shard ``index_select``. Along the rows, every rank computes a part of the picked ones from all rows."""
    at = positive(dim, x.ndim)
    if index.ndim == 1 and (x.sharded_dim == at or (index.is_sharded and not x.is_sharded)):
        whole, index = _picked(builder, x, index, 0)
        layout = Layout.replicated(builder.out_shape).with_dim(at, index.layout.dims[0])
        return builder.call(aten.index_select.default, whole, dim, index, layout=layout)
    if x.sharded_dim is None or x.sharded_dim == at or index.is_sharded:
        raise Refused("rows are picked by an index")
    return keep_sharding(builder, x, aten.index_select.default, dim, index)


def _is_mask(index: ShardedValue) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def _index_samples() -> Iterable[Sample]:
    yield Sample((torch.randn(11, 6), [torch.randint(0, 11, (2, 9))]), (None, 1))
    yield Sample((torch.randn(2, 3, 9, 4), [None, torch.tensor([2, 0])]), (2, None))
    yield Sample((torch.randn(2, 9, 3), [None, None, torch.tensor([[2, 0], [1, 1]])]), (1, None))
    yield Sample((torch.randn(2, 9, 3), [None, torch.randint(0, 9, (12,))]), (1, None))
    yield Sample((torch.randn(2, 9, 3), [None, torch.randint(0, 9, (8,))]), (1, 0))


@rule(aten.index.Tensor, samples=_index_samples)
def index(builder: ShardingBuilder, x: ShardedValue, indices: Sequence[ShardedValue | None]) -> ShardedValue:
    """Shard indexing by one tensor of positions. Among the rows, every rank computes a part of the picked ones."""
    named = [(d, i) for d, i in enumerate(indices) if i is not None]
    if len(named) == 1 and x.sharded_dim == named[0][0] and named[0][1].ndim == 1 and not _is_mask(named[0][1]):
        whole, at = _picked(builder, x, named[0][1], 0)
        dims = (*whole.layout.dims[: named[0][0]], *at.layout.dims, *whole.layout.dims[named[0][0] + 1 :])
        chosen = [None if i is None else at for i in indices]
        return builder.call(aten.index.Tensor, whole, chosen, layout=Layout(dims))
    if len(named) != 1 or (x.is_sharded and named[0][1].is_sharded) or _is_mask(named[0][1]):
        raise Refused("indexing by several tensors, or by a mask")
    dim, at = named[0]
    if x.sharded_dim == dim:
        raise Refused("rows are picked by an index")
    dims = (*x.layout.dims[:dim], *at.layout.dims, *x.layout.dims[dim + 1 :])
    return builder.call(aten.index.Tensor, x, list(indices), layout=Layout(dims))


@rule(
    aten.index_put.default,
    samples=lambda: [
        Sample((torch.randn(2, 3, 9), [None, torch.tensor([2, 0])], torch.randn(2, 2, 9)), (2, None, 2)),
        Sample((torch.randn(3, 9), [torch.tensor([1])], torch.randn(9)), (1, None, 0)),
        Sample((torch.randn(3, 9), [torch.tensor([1])], torch.tensor(2.0)), (1, None, None)),
    ],
)  # fmt: skip
def index_put(
    builder: ShardingBuilder,
    x: ShardedValue,
    indices: Sequence[ShardedValue | None],
    values: ShardedValue,
    accumulate: bool = False,
) -> ShardedValue:
    """Shard a write to positions in dims before the rows, with one tensor for each of these dims.

    Counted from the end, the rows are the same dim of ``x`` and ``values``.
    """
    named = [d for d, i in enumerate(indices) if i is not None]
    leader = x if x.is_sharded else values
    axis = leader.layout.sharded_axis
    if axis is None or any(i is not None and i.is_sharded for i in indices):
        raise Refused("the positions are sharded")
    behind = leader.ndim - axis.dim
    dim = x.ndim - behind
    if max(named) >= dim or named != list(range(named[0], named[0] + len(named))):
        raise Refused("rows are written by an index")
    factors = leader.layout.dims[axis.dim]
    x = builder.redistribute(x, dim, factors)
    if values.ndim >= behind and values.shape[-behind] != 1:
        values = builder.redistribute(values, values.ndim - behind, factors)
    return builder.call(aten.index_put.default, x, list(indices), values, accumulate, layout=x.layout)


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


def _scatter(
    builder: ShardingBuilder, x: ShardedValue, dim: int, index: ShardedValue, source: Any, *args: Any, **kwargs: Any
) -> ShardedValue:
    """Shard a write to positions in another dim than the rows."""
    op = builder.operator
    tensors = [v for v in (x, index, source) if isinstance(v, ShardedValue)]
    leader = next(v for v in tensors if v.is_sharded)
    axis = leader.layout.sharded_axis
    assert axis is not None
    if axis.dim == positive(dim, x.ndim) or len({v.shape[axis.dim] for v in tensors}) > 1:
        raise Refused("rows are written by an index")
    factors = leader.layout.dims[axis.dim]
    parts = [builder.redistribute(v, axis.dim, factors) for v in tensors]
    tail = parts[2:] if isinstance(source, ShardedValue) else [source]
    layout = Layout.replicated(builder.out_shape).with_dim(axis.dim, factors)
    return builder.call(op, parts[0], dim, parts[1], *tail, *args, layout=layout, **kwargs)


for _op in _SCATTER:
    rule(_op, samples=_scatter_samples(_op))(_scatter)


@rule(aten.one_hot.default, partially_replicated=True,
      samples=lambda: [Sample((torch.randint(0, 5, (2, 9, 4)), 5), (1,))])  # fmt: skip
def one_hot(builder: ShardingBuilder, x: ShardedValue, classes: int) -> ShardedValue:
    """Shard ``one_hot``, which is local: the new dim is the last."""
    return builder.call(
        aten.one_hot.default, x, classes, layout=x.layout.insert(x.ndim, Layout.replicated((classes,)).dims[0])
    )


@rule(aten.cdist.default, aten._cdist_forward.default, partially_replicated=True,
      samples=lambda: [Sample((torch.randn(2, 9, 4), torch.randn(2, 5, 4), 2.0, None), (1, None))])  # fmt: skip
def cdist(
    builder: ShardingBuilder, a: ShardedValue, b: ShardedValue, p: float = 2.0, mode: int | None = None
) -> ShardedValue:
    """Shard distances of rows to the entries of a table."""
    op = builder.operator
    if a.sharded_dim != a.ndim - 2:
        raise Refused("distances to rows, or of rows in the batch")
    return keep_sharding(builder, a, op, builder.gather(b), p, mode)


@rule(aten.outer.default, aten.ger.default, partially_replicated=True,
      samples=lambda: [Sample((torch.randn(9), torch.randn(4)), (0, None)),
                       Sample((torch.randn(3), torch.randn(9)), (None, 0))])  # fmt: skip
def outer(builder: ShardingBuilder, a: ShardedValue, b: ShardedValue) -> ShardedValue:
    """Shard an outer product: if ``a`` is sharded, ``b`` is gathered."""
    b = builder.gather(b) if a.is_sharded else b
    return builder.call(aten.outer.default, a, b, layout=Layout((a.layout.dims[0], b.layout.dims[0])))


@rule(aten.type_as.default, partially_replicated=True,
      samples=lambda: [Sample((torch.randn(2, 9), torch.randn(3).double()), (1, None))])  # fmt: skip
def type_as(builder: ShardingBuilder, x: ShardedValue, other: ShardedValue) -> ShardedValue:
    """Shard a cast to the dtype of another tensor, which may have any shape."""
    return builder.call(aten._to_copy.default, x, dtype=builder.out.dtype, layout=x.layout)


@rule(
    aten._native_batch_norm_legit_no_training.default,
    samples=lambda: [
        Sample((torch.randn(2, 6, 9, 4), torch.randn(6), torch.randn(6), torch.randn(6), torch.rand(6) + 0.5, 0.1,
                1e-5), (2, None, None, None, None)),
    ],
)  # fmt: skip
def batch_norm(
    builder: ShardingBuilder,
    x: ShardedValue,
    weight: ShardedValue | None,
    bias: ShardedValue | None,
    mean: ShardedValue,
    var: ShardedValue,
    momentum: float,
    eps: float,
) -> tuple[ShardedValue, ShardedValue, ShardedValue]:
    """Shard batch norm by running statistics, which is pointwise. The results for the backward pass are empty."""
    if x.sharded_dim == 1:
        raise Refused("the channels are sharded")
    node = builder.emit(aten.batch_norm.default, x, weight, bias, mean, var, False, momentum, eps, False)
    empty = [builder.replicated_value(builder.emit(aten.new_zeros.default, x, [0])) for _ in range(2)]
    return builder.value(node, x.layout), empty[0], empty[1]
