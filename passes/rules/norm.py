"""Normalisation: statistics over rows are merged over the ranks, everything else is local."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from districompile.cutter import Cutter, Value
from districompile.ir.layout import Factor, Layout, Refused, per_rank
from districompile.ir.ops import ops
from districompile.passes.rules.common import along, cast, wide
from districompile.passes.rules.reduction import spread_over_rows
from districompile.registry import Sample, rule

aten = torch.ops.aten


def _group_norm_samples() -> Iterable[Sample]:
    w, b = torch.randn(6), torch.randn(6)
    yield Sample((torch.randn(2, 6, 9, 4) * 3 + 5, 3, w, b), (2, None, None))
    yield Sample((torch.randn(2, 6, 9), 2, w, b, 1e-6), (2, None, None))
    yield Sample((torch.randn(1, 6, 2, 9, 4), 3), (3,))
    yield Sample((torch.randn(9, 6, 5), 3, w, b), (0, None, None))


@rule(aten.group_norm.default, kind="statistics", samples=_group_norm_samples)
def group_norm(
    cut: Cutter, x: Value, groups: int, weight: Value | None = None, bias: Value | None = None, eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Value:  # fmt: skip
    """Each rank's (mean, variance) by group, merged over the ranks in float32: the biased variance of the whole
    image."""
    where = x.layout.cut
    if where is None or (weight is not None and weight.is_cut):
        raise Refused("the affine parameters are cut")
    if where.dim == 0:
        return along(cut, x, aten.group_norm.default, groups, weight, bias, eps, cudnn_enabled)
    if where.dim == 1:
        raise Refused("the channels are cut")
    moments = cut.emit(ops.moments.default, x, groups, name=f"{cut.target.name}_moments")  # type: ignore[union-attr]
    stats = merge(cut, x, moments, x.shape[1] // groups)
    node = cut.emit(ops.normalize.default, x, stats, groups, weight, bias, eps, name=cut.target.name)  # type: ignore[union-attr]
    return cut.value(node, x.layout)


def merge(cut: Cutter, x: Value, moments: torch.fx.Node, channels: int) -> torch.fx.Node:
    """Statistics of the whole from each rank's ``moments`` (1, 2, B, G): gathered along their first dim, then
    merged."""
    ranks = cut.ranks
    shape = (ranks, *moments.meta["local"][0].shape[1:])
    stats = cut.value(moments, Layout.whole(shape).with_dim(0, (Factor(ranks, tuple(range(ranks + 1))),)))
    gathered = cut.fetch(stats, [(0, ranks)] * ranks, kind="norm", any_order=True)
    counts = [float(channels * math.prod(x.layout.local_shape(r)[2:])) for r in range(ranks)]
    mine: Any = per_rank([counts[r:] + counts[:r] for r in range(ranks)])  # own first, as gathered
    return cut.emit(ops.merge_moments.default, gathered, mine)


@rule(
    aten.instance_norm.default,
    kind="statistics",
    samples=lambda: [
        Sample(
            (torch.randn(2, 6, 9, 4), torch.randn(6), torch.randn(6), None, None, True, 0.1, 1e-5, False),
            (2, None, None),
        ),
        Sample((torch.randn(2, 6, 9, 4), None, None, None, None, True, 0.1, 1e-5, False), (2,)),
    ],
)
def instance_norm(
    cut: Cutter, x: Value, weight: Value | None, bias: Value | None, mean: Value | None, var: Value | None,
    use_input_stats: bool, momentum: float, eps: float, cudnn: bool,
) -> Value:  # fmt: skip
    if not use_input_stats:
        raise Refused("instance norm over running statistics")
    return group_norm(cut, x, x.shape[1], weight, bias, eps)  # type: ignore[no-any-return]


@rule(
    aten.batch_norm.default, kind="statistics",
    samples=lambda: [
        Sample(
            (torch.randn(2, 6, 9, 4), torch.randn(6), torch.randn(6), torch.randn(6), torch.rand(6) + 0.5, False, 0.1,
             1e-5, False),
            (2, None, None, None, None),
        )
    ],
)  # fmt: skip
def batch_norm(
    cut: Cutter, x: Value, weight: Value | None, bias: Value | None, mean: Value | None, var: Value | None,
    training: bool, momentum: float, eps: float, cudnn: bool,
) -> Value:  # fmt: skip
    if training or x.cut_dim == 1:
        raise Refused("batch norm in training mode, or over cut channels")
    return along(cut, x, aten.batch_norm.default, weight, bias, mean, var, False, momentum, eps, cudnn)


def _layer_norm_samples() -> Iterable[Sample]:
    yield Sample((torch.randn(2, 9, 6), [6]), (1,))
    yield Sample(
        (torch.randn(2, 3, 9, 4) * 3 + 5, [3, 9, 4], torch.randn(3, 9, 4), torch.randn(3, 9, 4)), (2, None, None)
    )
    yield Sample((torch.randn(2, 9, 4), [9, 4], torch.randn(9, 4), None, 1e-3), (1, 0))
    yield Sample((torch.randn(9, 4), [9, 4]), (0,))


@rule(aten.layer_norm.default, kind="pass-through", mixed=True, samples=_layer_norm_samples)
def layer_norm(
    cut: Cutter, x: Value, shape: Sequence[int], weight: Value | None = None, bias: Value | None = None,
    eps: float = 1e-5, *args: Any,
) -> Value:  # fmt: skip
    """Local where the normalised dims are whole; statistics of all ranks where the rows are among them."""
    first = x.ndim - len(shape)
    if x.cut_dim is None:
        raise Refused("the affine parameters are cut")
    if x.cut_dim < first:
        parameters = [None if v is None else cut.gather(v) for v in (weight, bias)]
        return along(cut, x, aten.layer_norm.default, list(shape), *parameters, eps, *args)
    x = cut.unmixed(x)
    count = math.prod(x.shape[:first])
    flat = x.layout.regrouped((count, 1, math.prod(shape)))
    y = cut.call(aten.reshape.default, x, cut.local_sizes(flat), layout=flat)
    stats = merge(cut, y, cut.emit(ops.moments.default, y, 1), 1)
    node = cut.emit(ops.normalize.default, y, stats, 1, None, None, eps)
    return _scaled(cut, cut.emit(aten.reshape.default, node, cut.local_sizes(x.layout)), x, weight, bias)


def _scaled(cut: Cutter, node: Any, x: Value, weight: Value | None, bias: Value | None) -> Value:
    """``node``, laid out as ``x``, times ``weight`` plus ``bias``, which have its last dims."""
    dim = x.cut_dim
    assert dim is not None
    for op, v in ((aten.mul.Tensor, weight), (aten.add.Tensor, bias)):
        if v is not None:
            node = cut.emit(op, node, cut.align(v, dim - (x.ndim - v.ndim), x.layout.dims[dim]))
    return cut.value(node, x.layout)


def _rms_samples() -> Iterable[Sample]:
    yield Sample((torch.randn(2, 9, 6), [6]), (1,))
    yield Sample((torch.randn(2, 3, 9, 4), [3, 9, 4], torch.randn(3, 9, 4), 1e-3), (2, None))
    yield Sample((torch.randn(2, 9, 4), [9, 4]), (1,))


@rule(aten.rms_norm.default, kind="pass-through", mixed=True, samples=_rms_samples)
def rms_norm(
    cut: Cutter, x: Value, shape: Sequence[int], weight: Value | None = None, eps: float | None = None
) -> Value:
    """As :func:`layer_norm`, without a mean."""
    first = x.ndim - len(shape)
    if x.cut_dim is None:
        raise Refused("the weight is cut")
    if x.cut_dim < first:
        return along(cut, x, aten.rms_norm.default, list(shape), None if weight is None else cut.gather(weight), eps)
    x = cut.unmixed(x)
    y = cast(cut, x.node, wide(x.dtype))
    squares = cut.emit(aten.sum.dim_IntList, cut.emit(aten.mul.Tensor, y, y), list(range(first, x.ndim)), True)
    mean = cut.emit(aten.div.Tensor, cut.reduce(squares, "sum"), float(math.prod(shape)))
    small = torch.finfo(x.dtype).eps if eps is None else eps
    scale = cut.emit(aten.rsqrt.default, cut.emit(aten.add.Tensor, mean, small))
    return _scaled(cut, cast(cut, cut.emit(aten.mul.Tensor, y, scale), cut.out.dtype), x, weight, None)


def _batch_statistics_samples() -> Iterable[Sample]:
    w, b = torch.randn(6), torch.randn(6)
    yield Sample((torch.randn(2, 6, 9, 4) + 3, w, b, True, 0.1, 1e-5), (2, None, None))
    yield Sample((torch.randn(9, 6, 4), None, None, True, 0.1, 1e-3), (0,))


@rule(aten._native_batch_norm_legit.no_stats, kind="statistics", samples=_batch_statistics_samples)
def batch_statistics(
    cut: Cutter, x: Value, weight: Value | None, bias: Value | None, training: bool, momentum: float, eps: float
) -> tuple[Value, Value, Value]:
    """Batch norm by the statistics of the batch at hand, over all ranks; also gives mean and 1 / deviation."""
    if x.cut_dim is None or x.cut_dim == 1 or not training:
        raise Refused("the channels are cut")
    dims = [d for d in range(x.ndim) if d != 1]
    spread, centre = spread_over_rows(cut, x, dims, True, 0)
    scale = cut.emit(aten.rsqrt.default, cut.emit(aten.add.Tensor, spread, eps))
    node = cut.emit(aten.mul.Tensor, cut.emit(aten.sub.Tensor, cast(cut, x.node, wide(x.dtype)), centre), scale)
    for op, v in ((aten.mul.Tensor, weight), (aten.add.Tensor, bias)):
        if v is not None:
            sizes = [-1 if d == 1 else 1 for d in range(x.ndim)]
            node = cut.emit(op, node, cut.emit(aten.reshape.default, cut.gather(v), sizes))
    saved = [cut.whole_value(cut.emit(aten.reshape.default, v, [-1])) for v in (centre, scale)]
    return cut.value(cast(cut, node, x.dtype), x.layout), saved[0], saved[1]
