"""Attention: queries stay cut, keys and values are fetched whole."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from districompile.cutter import Cutter, Value
from districompile.ir.layout import Layout, Refused
from districompile.registry import Sample, rule

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default


def _samples() -> Iterable[Sample]:
    q, k, v = (torch.randn(2, 2, 9, 4) for _ in range(3))
    yield Sample((q, k, v), (2, 2, 2))
    yield Sample((q, torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)), (2, None, None))
    yield Sample((q, k, v, torch.randn(9, 9)), (2, 2, 2, None))
    yield Sample((q, k, v, torch.randn(2, 1, 9, 9)), (2, 2, 2, 2))
    yield Sample((q, k, v, torch.randn(1, 9)), (2, 2, 2, None))
    yield Sample((torch.randn(2, 2, 5, 4), k, v), (None, 2, 2))
    yield Sample(tuple(torch.randn(9, 2, 5, 4) for _ in range(3)), (0, 0, 0))
    yield Sample((q, k, v), (2, 2, 2), {"scale": 0.7})
    across = [torch.randn(2, 2, n, 9) for n in (4, 5, 5)]
    yield Sample(tuple(across), (3, 3, 3))
    yield Sample((*across, torch.randn(4, 5)), (3, 3, None, None), {"scale": 0.7})
    yield Sample((*across, torch.rand(4, 5) > 0.2), (3, 3, 3, 0))
    batch = [torch.randn(n, 2, 5, 4) for n in (9, 1, 1)]
    yield Sample(tuple(batch), (0, None, None))
    yield Sample((batch[0], batch[0], batch[0], torch.randn(9, 1, 5, 5)), (0, 0, 0, None))
    yield Sample((q, k, v, None, 0.0, True), (2, 2, 2))
    yield Sample((q, k[:, :, :7], v[:, :, :7], None, 0.0, True), (2, None, None))
    yield Sample((q, k, v, None, 0.0, True), (None, 2, 2))
    yield Sample((*(torch.randn(9, 2, 5, 4) for _ in range(3)), None, 0.0, True), (0, 0, 0))


@rule(_SDPA, kind="everything", samples=_samples, mixed=True)
def attention(
    cut: Cutter, q: Value, k: Value, v: Value, mask: Value | None = None, dropout: float = 0.0,
    is_causal: bool = False, **kwargs: Any,
) -> Value:  # fmt: skip
    """Without a mask the order of the keys does not matter: a rank's own come first, and all ranks have one graph."""
    nd = q.ndim
    if is_causal and q.cut_dim == nd - 2:
        q = cut.unmixed(q)
        mask, is_causal = _causal(cut, q, k.shape[-2]), False
    dim = q.cut_dim
    if dim == nd - 1:
        return _over_rows(cut, q, k, v, mask, is_causal, **kwargs)
    if dim is None or dim == nd - 2:
        free = mask is None and dim is not None and _same_rows(k, v)
        k, v = (cut.gather(t, kind="attention", any_order=free) for t in (k, v))
        if dim is None:
            mask = None if mask is None else cut.gather(mask)
            return cut.call(_SDPA, q, k, v, mask, 0.0, is_causal, layout=_layout(cut, q), **kwargs)
        if mask is not None:
            mask = _mask(cut, q, mask)
        return cut.call(_SDPA, q, k, v, mask, 0.0, is_causal, layout=_layout(cut, q), **kwargs)
    factors = q.layout.dims[dim]
    if mask is not None:
        at = mask.ndim - (nd - dim)
        mask = cut.gather(mask) if at < 0 or mask.shape[at] == 1 else cut.align(mask, at, factors)
    k, v = (cut.gather(t) if t.shape[dim] == 1 else cut.align(t, dim, factors) for t in (k, v))
    return cut.call(_SDPA, q, k, v, mask, 0.0, is_causal, layout=_layout(cut, q), **kwargs)


def _over_rows(
    cut: Cutter, q: Value, k: Value, v: Value, mask: Value | None, is_causal: bool, *, scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:  # fmt: skip
    """Attention of channels to channels: the rows are contracted in the scores, and stay cut in the values."""
    if is_causal or enable_gqa or q.shape[-1] != v.shape[-1]:
        raise Refused("the channels of the queries are cut")
    q = cut.unmixed(q)
    factors = q.layout.dims[q.ndim - 1]
    k, v = cut.align(k, k.ndim - 1, factors), cut.align(v, v.ndim - 1, factors)
    part = cut.emit(aten.matmul.default, q, cut.emit(aten.transpose.int, k, -2, -1))
    scores = cut.emit(aten.mul.Tensor, cut.reduce(part, "sum"), q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        mask = cut.gather(mask)
        if mask.dtype == torch.bool:
            scores = cut.emit(aten.masked_fill.Scalar, scores, cut.emit(aten.logical_not.default, mask), -math.inf)
        else:
            scores = cut.emit(aten.add.Tensor, scores, mask)
    weights = cut.emit(aten.softmax.int, scores, -1)
    return cut.call(aten.matmul.default, weights, v, layout=Layout.whole(cut.out_shape).with_dim(q.ndim - 1, factors))


def _same_rows(k: Value, v: Value) -> bool:
    """Whether keys and values, fetched own rows first, come in one and the same order."""
    a, b = k.layout.cut, v.layout.cut
    return a is not None and a == b and a.index == 0 and k.whole is None and v.whole is None


def _causal(cut: Cutter, q: Value, keys: int) -> Value:
    """Query i sees the keys up to i: a mask of its own for each rank's queries."""
    dim, factor = q.ndim - 2, q.layout.coarse(q.ndim - 2)
    assert factor.bounds is not None
    device = q.node.meta["local"][0].device
    start, stop = cut.own(factor.bounds)
    rows = cut.emit(aten.arange.start, start, stop, device=device, pin_memory=False)
    seen = cut.emit(aten.arange.default, keys, device=device, pin_memory=False)
    node = cut.emit(aten.ge.Tensor, cut.emit(aten.unsqueeze.default, rows, 1), seen)
    return cut.value(node, Layout.whole((q.shape[dim], keys)).with_dim(0, q.layout.dims[dim]))


def _mask(cut: Cutter, q: Value, mask: Value) -> Value:
    if mask.ndim < 2 or mask.shape[-2] == 1:
        return cut.gather(mask)
    if mask.is_cut and mask.cut_dim != mask.ndim - 2:
        mask = cut.gather(mask)
    return cut.align(mask, mask.ndim - 2, q.layout.dims[q.ndim - 2])


def _layout(cut: Cutter, q: Value) -> Layout:
    shape = cut.out_shape
    layout = Layout.whole(shape)
    return layout if q.cut_dim is None else layout.with_dim(q.cut_dim, q.layout.dims[q.cut_dim])
