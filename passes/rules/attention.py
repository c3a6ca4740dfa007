"""Attention: queries stay cut, keys and values are fetched whole."""

from __future__ import annotations

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
        raise Refused("the channels of the queries are cut")
    if dim is None or dim == nd - 2:
        free = mask is None and dim is not None and _same_rows(k, v)
        k, v = (cut.gather(t, kind="attention", any_order=free) for t in (k, v))
        if dim is None:
            mask = None if mask is None else cut.gather(mask)
            return cut.call(_SDPA, q, k, v, mask, 0.0, is_causal, layout=_layout(cut, q), **kwargs)
        if mask is not None:
            mask = _mask(cut, q, mask)
        return cut.call(_SDPA, q, k, v, mask, 0.0, is_causal, layout=_layout(cut, q), **kwargs)
    if mask is not None and (mask.is_cut or (mask.ndim > nd - 1 - dim and mask.shape[mask.ndim - (nd - dim)] != 1)):
        raise Refused("a mask that differs by row, where rows are in the batch")
    factors = q.layout.dims[dim]
    if k.shape[dim] != q.shape[dim]:
        raise Refused("keys are broadcast over the rows in the batch")
    k, v = cut.align(k, dim, factors), cut.align(v, dim, factors)
    return cut.call(_SDPA, q, k, v, mask, 0.0, is_causal, layout=_layout(cut, q), **kwargs)


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
