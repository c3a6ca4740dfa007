"""Rules at random sizes, strides, paddings, dilations and uneven rows: cut -> local operator -> join equals the
operator."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from districompile.sharding.registry import Sample
from tests.helpers_cut import Cutting, Function
from tests.helpers_properties import MANY, check, places, randn, spatial

aten = torch.ops.aten


def _each(draw: st.DrawFn, n: int, low: int, high: int) -> list[int]:
    return [draw(st.integers(low, high)) for _ in range(n)]


@MANY
@given(st.data(), places())
def test_convolutions(data: st.DataObject, cut_points: tuple[float, ...]) -> None:
    n, sizes, at = data.draw(spatial())
    k, s = _each(data.draw, n, 1, 5), _each(data.draw, n, 1, 3)
    p, d = _each(data.draw, n, 0, 4), _each(data.draw, n, 1, 3)
    groups = data.draw(st.sampled_from([1, 2, 4]))
    assume(all(v + 2 * q >= (kk - 1) * dd + 1 for v, q, kk, dd in zip(sizes, p, k, d, strict=True)))
    op = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}[n]
    bias = data.draw(st.sampled_from([None, randn(8)]))
    args = (randn(2, 4, *sizes), randn(8, 4 // groups, *k), bias, s, p, d, groups)
    check(op, Sample(args, (2 + at, None, *([None] if bias is not None else []))), cut_points)


@MANY
@given(st.data(), places())
def test_convolutions_padded_by_name(data: st.DataObject, cut_points: tuple[float, ...]) -> None:
    n, sizes, at = data.draw(spatial())
    k, d = _each(data.draw, n, 1, 4), _each(data.draw, n, 1, 2)
    mode = data.draw(st.sampled_from(["same", "valid"]))
    assume(mode == "same" or all(v >= (kk - 1) * dd + 1 for v, kk, dd in zip(sizes, k, d, strict=True)))
    op = {1: aten.conv1d.padding, 2: aten.conv2d.padding, 3: aten.conv3d.padding}[n]
    check(op, Sample((randn(2, 4, *sizes), randn(4, 4, *k), None, [1] * n, mode, d), (2 + at, None)), cut_points)


@MANY
@given(st.data(), places())
def test_transposed_convolutions(data: st.DataObject, cut_points: tuple[float, ...]) -> None:
    n, sizes, at = data.draw(spatial())
    k, s = _each(data.draw, n, 1, 5), _each(data.draw, n, 1, 3)
    p, d = _each(data.draw, n, 0, 2), _each(data.draw, n, 1, 2)
    extra = [data.draw(st.integers(0, max(s[i], d[i]) - 1)) for i in range(n)]
    out = [(sizes[i] - 1) * s[i] - 2 * p[i] + (k[i] - 1) * d[i] + extra[i] + 1 for i in range(n)]
    assume(all(v > 0 for v in out))
    groups = data.draw(st.sampled_from([1, 2]))
    op = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}[n]
    args = (randn(2, 4, *sizes), randn(4, 6 // groups, *k), None, s, p, extra, groups, d)
    check(op, Sample(args, (2 + at, None)), cut_points, ("reaches past what the rank's rows make",))


@MANY
@given(st.data(), places())
def test_pooling(data: st.DataObject, cut_points: tuple[float, ...]) -> None:
    n, sizes, at = data.draw(spatial())
    k, s = _each(data.draw, n, 1, 4), _each(data.draw, n, 1, 3)
    p = [data.draw(st.integers(0, kk // 2)) for kk in k]
    ceil = data.draw(st.booleans())
    if data.draw(st.booleans()):
        op = {1: aten.max_pool1d.default, 2: aten.max_pool2d.default, 3: aten.max_pool3d.default}[n]
        args: tuple[Any, ...] = (k, s, p, [1] * n, ceil)
    else:
        op = {1: aten.avg_pool1d.default, 2: aten.avg_pool2d.default, 3: aten.avg_pool3d.default}[n]
        args = (k, s, p, ceil, data.draw(st.booleans()))
    check(op, Sample((randn(2, 3, *sizes), *args), (2 + at,)), cut_points)


@MANY
@given(st.data(), places())
def test_adaptive_pooling(data: st.DataObject, cut_points: tuple[float, ...]) -> None:
    n, sizes, at = data.draw(spatial())
    op = {
        1: aten.adaptive_avg_pool1d.default,
        2: aten.adaptive_avg_pool2d.default,
        3: aten.adaptive_avg_pool3d.default,
    }[n]
    check(op, Sample((randn(2, 3, *sizes), _each(data.draw, n, 1, 12)), (2 + at,)), cut_points)


_RESIZE = {
    ("nearest", 1): aten.upsample_nearest1d.vec,
    ("nearest", 2): aten.upsample_nearest2d.vec,
    ("nearest", 3): aten.upsample_nearest3d.vec,
    ("exact", 1): aten._upsample_nearest_exact1d.vec,
    ("exact", 2): aten._upsample_nearest_exact2d.vec,
    ("exact", 3): aten._upsample_nearest_exact3d.vec,
    ("linear", 1): aten.upsample_linear1d.vec,
    ("linear", 2): aten.upsample_bilinear2d.vec,
    ("linear", 3): aten.upsample_trilinear3d.vec,
    ("cubic", 2): aten.upsample_bicubic2d.vec,
    ("linear_aa", 2): aten._upsample_bilinear2d_aa.vec,
    ("cubic_aa", 2): aten._upsample_bicubic2d_aa.vec,
}


@settings(MANY, max_examples=80)
@given(st.data(), places())
def test_resizing(data: st.DataObject, cut_points: tuple[float, ...]) -> None:
    n, sizes, at = data.draw(spatial())
    kind = data.draw(st.sampled_from([k for k, m in _RESIZE if m == n]))
    op = _RESIZE[kind, n]
    x = randn(2, 3, *sizes)
    if data.draw(st.booleans()):
        size: Any = [data.draw(st.integers(max(1, v // 3), v * 3)) for v in sizes]
        scales = None
    else:
        size, scales = None, [data.draw(st.sampled_from([0.5, 0.75, 1.0, 1.3, 2.0, 3.0])) for _ in sizes]
    corners = () if kind in ("nearest", "exact") else (data.draw(st.booleans()),)
    check(op, Sample((x, size, *corners, scales), (2 + at,)), cut_points)


@MANY
@given(st.data(), places())
def test_padding(data: st.DataObject, cut_points: tuple[float, ...]) -> None:
    n, sizes, at = data.draw(spatial())
    mode = data.draw(st.sampled_from(["constant", "reflect", "replicate", "circular"]))
    least = -2 if mode == "constant" else 0
    sides = [data.draw(st.integers(least, 3)) for _ in range(2 * n)]
    check(aten.pad.default, Sample((randn(2, 3, *sizes), sides, mode), (2 + at,)), cut_points)


@MANY
@given(st.data(), places())
def test_slices_rolls_flips(data: st.DataObject, cut_points: tuple[float, ...]) -> None:
    h = data.draw(st.integers(8, 17))
    x, dim = randn(2, h, 5), data.draw(st.sampled_from([1, 2]))
    start = data.draw(st.integers(-h, h - 1))
    stop = data.draw(st.integers(-h, h + 3))
    step = data.draw(st.integers(1, 3))
    size = len(range(*slice(start, stop, step).indices(x.shape[dim])))
    if size:
        check(aten.slice.Tensor, Sample((x, dim, start, stop, step), (1,)), cut_points)
    check(aten.roll.default, Sample((x, [start, 1], [1, 2]), (1,)), cut_points)
    check(aten.flip.default, Sample((x, [dim]), (1,)), cut_points)
    check(aten.select.int, Sample((x, 1, start), (1,)), cut_points)
    pieces = data.draw(st.integers(1, 5))
    check(aten.chunk.default, Sample((x, pieces, 1), (1,)), cut_points)


@MANY
@given(st.data(), places())
def test_joins_and_writes(data: st.DataObject, cut_points: tuple[float, ...]) -> None:
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=2, max_size=4))
    parts = [randn(2, n, 3) + i for i, n in enumerate(sizes)]
    rows = [1 if n >= 7 and data.draw(st.booleans()) else None for n in sizes]
    assume(any(r is not None for r in rows))
    check(aten.cat.default, Sample((parts, 1), tuple(rows)), cut_points)
    h = data.draw(st.integers(8, 14))
    first = data.draw(st.integers(0, h - 1))
    count = data.draw(st.integers(1, h - first))
    source = data.draw(st.sampled_from([None, 1])) if count >= 7 else None
    sample = Sample((randn(2, h, 3), randn(2, count, 3), 1, first, first + count), (1, source))
    check(aten.slice_scatter.default, sample, cut_points)


@MANY
@given(st.data(), places())
def test_writes_into_every_other_row(data: st.DataObject, cut_points: tuple[float, ...]) -> None:
    h, step = data.draw(st.integers(8, 17)), data.draw(st.integers(2, 4))
    first, last = data.draw(st.integers(0, h - 1)), data.draw(st.integers(1, h))
    count = len(range(first, last, step))
    assume(count > 0)
    rows = (data.draw(st.sampled_from([None, 1])), data.draw(st.sampled_from([None, 1])) if count >= 7 else None)
    assume(rows != (None, None))
    check(
        aten.slice_scatter.default, Sample((randn(2, h, 3), randn(2, count, 3), 1, first, last, step), rows), cut_points
    )


@MANY
@given(st.data(), places())
def test_scans_and_extremes(data: st.DataObject, cut_points: tuple[float, ...]) -> None:
    x = randn(2, 3, data.draw(st.integers(7, 13)), 4) * 3
    if data.draw(st.booleans()):
        x = x.round()  # several rows hold the maximum: the first one counts
    dim, keep = data.draw(st.integers(-4, 3)), data.draw(st.booleans())
    for op in (aten.cumsum.default, aten.logcumsumexp.default):
        check(op, Sample((x, dim), (2,)), cut_points)
    check(aten.cumprod.default, Sample((x / 4, dim), (2,)), cut_points)
    for op in (aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default):
        check(op, Sample((x, dim, keep), (2,)), cut_points)


@MANY
@given(st.data(), places())
def test_warps_and_turns(data: st.DataObject, cut_points: tuple[float, ...]) -> None:
    x = randn(2, 3, data.draw(st.integers(7, 12)), 5)
    grid = randn(2, data.draw(st.integers(7, 12)), data.draw(st.integers(2, 5)), 2)
    mode, edge, corners = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2)), data.draw(st.booleans())
    rows = (data.draw(st.sampled_from([None, 2, 3])), data.draw(st.sampled_from([None, 1])))
    if rows != (None, None):
        check(aten.grid_sampler.default, Sample((x, grid, mode, edge, corners), rows), cut_points)
    check(aten.rot90.default, Sample((x, data.draw(st.integers(-3, 4)), [2, 3]), (2,)), cut_points)


@MANY
@given(st.data(), places())
def test_adaptive_maximum_pooling(data: st.DataObject, cut_points: tuple[float, ...]) -> None:
    n, sizes, at = data.draw(spatial())
    op = {
        1: aten.adaptive_max_pool1d.default,
        2: aten.adaptive_max_pool2d.default,
        3: aten.adaptive_max_pool3d.default,
    }[n]
    check(op, Sample((randn(2, 3, *sizes), _each(data.draw, n, 1, 12)), (2 + at,), used=(0,)), cut_points)


@pytest.mark.slow
@MANY
@given(st.data(), places())
def test_tokens_become_windows(data: st.DataObject, cut_points: tuple[float, ...]) -> None:
    outer, inner, w = data.draw(st.integers(2, 9)), data.draw(st.integers(2, 4)), data.draw(st.sampled_from([2, 4]))
    x = randn(2, outer * inner, w, 3)

    def run(x: Tensor) -> Tensor:
        t = x.flatten(1, 2).view(2, outer, inner, w // 2, 2, 3)
        t = t - t.mean((2, 4), keepdim=True)
        return t.reshape(2, outer * inner * w, 3).view(x.shape) + x

    error, found = Cutting(Function(run), {"x": x}, {"x": 1}).at(cut_points)
    assert error <= 1e-5
    assert not [f for f in found.fallbacks if "too few" not in f.reason], found.fallbacks


@MANY
@given(st.data(), places())
def test_windows_taken_out_and_added_up(data: st.DataObject, cut_points: tuple[float, ...]) -> None:
    h, w = data.draw(st.integers(9, 16)), data.draw(st.integers(5, 7))
    k, d = _each(data.draw, 2, 1, 3), _each(data.draw, 2, 1, 2)
    p, s = _each(data.draw, 2, 0, 2), _each(data.draw, 2, 1, 2)
    out = [(v + 2 * p[i] - d[i] * (k[i] - 1) - 1) // s[i] + 1 for i, v in enumerate((h, w))]
    assume(min(out) > 0)
    check(aten.im2col.default, Sample((randn(2, 3, h, w), k, d, p, s), (2,)), cut_points)
    columns = randn(2, 3 * k[0] * k[1], out[0] * out[1])
    check(aten.col2im.default, Sample((columns, [h, w], k, d, p, s), (2,)), cut_points, ("no window reaches",))
    check(aten.unfold.default, Sample((randn(2, h, w), 1, k[0], s[0]), (1,)), cut_points)


@MANY
@given(st.data(), places())
def test_reductions(data: st.DataObject, cut_points: tuple[float, ...]) -> None:
    x = randn(2, 3, data.draw(st.integers(7, 13)), 4) + data.draw(st.integers(-3, 3))
    at = 2
    dims = sorted(data.draw(st.sets(st.integers(0, 3), min_size=1)))
    keep = data.draw(st.booleans())
    for op in (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default):
        check(op, Sample((x, dims, keep), (at,)), cut_points)
    correction = data.draw(st.sampled_from([0, 1]))
    if math.prod(x.shape[d] for d in dims) > correction:
        more = {"correction": correction, "keepdim": keep}
        for op in (aten.var.correction, aten.std.correction, aten.var_mean.correction):
            check(op, Sample((x, dims), (at,), more), cut_points)
    order = data.draw(st.sampled_from([1, 2, math.inf]))
    check(aten.linalg_vector_norm.default, Sample((x, order, dims, keep), (at,)), cut_points)
    dim = data.draw(st.integers(-4, 3))
    check(aten.softmax.int, Sample((x, dim), (at,)), cut_points)
    check(aten.log_softmax.int, Sample((x, dim), (at,)), cut_points)
