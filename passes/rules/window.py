"""Convolution: each output row reads a window of input rows, so ranks fetch a halo.

For output rows [a, b), stride s, padding p, dilation d and kernel k, the input rows are
[a*s - p, (b-1)*s - p + (k-1)*d + 1). Rows outside the image are the padding itself, so the local operator pads nothing
along the rows and has the same shape on every rank, border or not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from districompile.cutter import Cutter, Value
from districompile.ir.layout import Factor, Layout, Refused, per_rank
from districompile.passes.rules.common import along, positive, spread
from districompile.registry import Sample, rule

aten = torch.ops.aten


def window(
    cut: Cutter, x: Value, spatial: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], local: Callable[[Any, list[int]], Any], fill: float = 0.0,
) -> Value:  # fmt: skip
    """A window operator: ``local(x, padding)`` computes it with the given paddings. The cut may also be in the
    batch."""
    where = x.layout.cut
    assert where is not None
    first = x.ndim - spatial
    shape = cut.out_shape
    if where.dim < first:
        if where.dim == first - 1:
            raise Refused("the channels are cut")
        layout = Layout.whole(shape).with_dim(where.dim, x.layout.dims[where.dim])
        return cut.value(local(x.node, list(padding)), layout)
    x.layout.coarse(where.dim)
    i = where.dim - first
    bounds = cut.bounds(shape[where.dim])
    k, s, p, d = kernel[i], stride[i], padding[i], dilation[i]
    want = [(a * s - p, (b - 1) * s - p + (k - 1) * d + 1) for a, b in itertools.pairwise(bounds)]
    window = cut.fetch(x, want, fill=fill, kind="conv")
    rest = list(padding)
    rest[i] = 0
    layout = Layout.whole(shape).with_dim(where.dim, (Factor(shape[where.dim], bounds),))
    return cut.value(local(window, rest), layout)


def _conv_samples() -> Iterable[Sample]:
    x = torch.randn(2, 4, 13, 6)

    def w(o: int, i: int, *k: int) -> torch.Tensor:
        return torch.randn(o, i, *k)

    yield Sample((x, w(3, 4, 3, 3), torch.randn(3), [1, 1], [1, 1]), (2, None, None))
    yield Sample((x, w(3, 4, 3, 3), None, [2, 2], [1, 1]), (2, None))
    yield Sample((x, w(3, 4, 3, 3), None, [2, 2], [0, 0]), (2, None))
    yield Sample((x, w(3, 4, 1, 1)), (2, None))
    yield Sample((x, w(3, 4, 5, 3), None, [1, 1], [2, 1]), (2, None))
    yield Sample((x, w(3, 4, 3, 3), None, [1, 1], [2, 2]), (2, None))  # the map grows by two rows
    yield Sample((x, w(3, 4, 3, 3), None, [1, 1], [2, 2], [2, 2]), (2, None))
    yield Sample((x, w(4, 1, 3, 3), None, [1, 1], [1, 1], [1, 1], 4), (2, None))
    yield Sample((x, w(3, 4, 4, 4), None, [2, 2], [1, 1]), (2, None))
    yield Sample((x, w(3, 4, 3, 3), None, [1, 1], [1, 1]), (3, None))  # columns cut
    yield Sample((torch.randn(9, 4, 5, 5), w(3, 4, 3, 3), None, [1, 1], [1, 1]), (0, None))
    yield Sample((torch.randn(4, 13, 6), w(3, 4, 3, 3), torch.randn(3), [1, 1], [1, 1]), (1, None, None))  # no batch


@rule(aten.conv2d.default, kind="window", samples=_conv_samples)
@rule(
    aten.conv1d.default, kind="window",
    samples=lambda: [Sample((torch.randn(2, 4, 13), torch.randn(3, 4, 3), None, [1], [1]), (2, None))],
)  # fmt: skip
@rule(
    aten.conv3d.default, kind="window",
    samples=lambda: [
        Sample((torch.randn(1, 2, 3, 9, 4), torch.randn(3, 2, 3, 3, 1), None, [1] * 3, [1, 1, 0]), (3, None)),
        Sample((torch.randn(1, 2, 9, 3, 4), torch.randn(3, 2, 3, 3, 1), None, [1] * 3, [1, 1, 0]), (2, None)),
    ],
)  # fmt: skip
def conv(
    cut: Cutter, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Value:  # fmt: skip
    """conv1d, conv2d and conv3d, grouped, strided, dilated, along any spatial dim; "same" padding may be uneven."""
    n = weight.ndim - 2
    op = cut.operator
    s, d, kernel = spread(stride, n), spread(dilation, n), weight.shape[2:]
    p = spread(padding, n)
    if not x.is_cut:
        raise Refused("the weight is cut")
    bias = None if bias is None else cut.gather(bias)
    weight = cut.gather(weight)
    return window(cut, x, n, kernel, s, p, d, lambda v, q: cut.emit(op, v, weight, bias, s, q, d, groups))


@rule(
    aten.conv1d.padding, kind="window",
    samples=lambda: [Sample((torch.randn(2, 4, 13), torch.randn(3, 4, 4), None, [1], "same"), (2, None))],
)  # fmt: skip
@rule(
    aten.conv3d.padding, kind="window",
    samples=lambda: [
        Sample((torch.randn(1, 2, 3, 9, 4), torch.randn(3, 2, 2, 3, 2), None, [1, 1, 1], "same"), (3, None)),
    ],
)  # fmt: skip
@rule(
    aten.conv2d.padding, kind="window",
    samples=lambda: [
        Sample((torch.randn(2, 4, 13, 6), torch.randn(3, 4, 3, 5), None, [1, 1], "same"), (2, None)),
        Sample((torch.randn(2, 4, 13, 6), torch.randn(3, 4, 4, 3), None, [1, 1], "same"), (2, None)),
        Sample((torch.randn(2, 4, 13, 6), torch.randn(3, 4, 3, 3), None, [1, 1], "valid"), (2, None)),
    ],
)  # fmt: skip
def conv_padding(
    cut: Cutter, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: str = "valid",
    dilation: Any = 1, groups: int = 1,
) -> Value:  # fmt: skip
    """Padding by name. "same" with an even kernel pads one more below; columns are then padded by an operator of
    their own."""
    n = weight.ndim - 2
    s, d, kernel = spread(stride, n), spread(dilation, n), weight.shape[2:]
    op = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}[n]
    total = [(k - 1) * e if padding == "same" else 0 for k, e in zip(kernel, d, strict=True)]
    first = x.ndim - n
    uneven = [x.ndim - n + i for i, t in enumerate(total) if t % 2 and first + i != x.cut_dim]

    def local(v: Any, q: list[int]) -> Any:
        if uneven:
            flat = [side for i in reversed(range(n)) for side in (0, 1 if first + i in uneven else 0)]
            v = cut.emit(aten.constant_pad_nd.default, v, flat, 0.0)
        return cut.emit(op, v, cut.gather(weight), bias, s, q, d, groups)

    return window(cut, x, n, kernel, s, [t // 2 for t in total], d, local)


def _transposed_samples() -> Iterable[Sample]:
    x = torch.randn(2, 4, 9, 5)
    yield Sample((x, torch.randn(4, 3, 2, 2), torch.randn(3), [2, 2]), (2, None, None))
    yield Sample((x, torch.randn(4, 3, 4, 4), None, [2, 2], [1, 1]), (2, None))
    yield Sample((x, torch.randn(4, 3, 3, 3), None, [2, 2], [1, 1], [1, 1]), (2, None))
    yield Sample((x, torch.randn(4, 3, 4, 4), None, [2, 2], [3, 3]), (2, None))
    yield Sample((x[0], torch.randn(4, 3, 4, 4), None, [2, 2], [1, 1]), (1, None))
    yield Sample((x, torch.randn(4, 2, 3, 3), None, [1, 1], [1, 1], [0, 0], 2, [2, 2]), (2, None))


@rule(aten.conv_transpose2d.input, kind="window", samples=_transposed_samples)
@rule(
    aten.conv_transpose1d.default, kind="window",
    samples=lambda: [Sample((torch.randn(2, 4, 9), torch.randn(4, 3, 4), torch.randn(3), [2], [1]), (2, None, None))],
)  # fmt: skip
@rule(
    aten.conv_transpose3d.input,
    kind="window",
    samples=lambda: [
        Sample((torch.randn(1, 2, 2, 9, 3), torch.randn(2, 3, 1, 4, 2), None, [1, 2, 2], [0, 1, 0]), (3, None))
    ],
)
def conv_transpose(
    cut: Cutter, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Value:  # fmt: skip
    """Output row y gets input row i where i*s - p <= y <= i*s - p + (k-1)*d: fetch those, compute all they make,
    crop."""
    n = weight.ndim - 2
    op = cut.operator
    s, p, extra, d = spread(stride, n), spread(padding, n), spread(output_padding, n), spread(dilation, n)
    where = x.layout.cut
    if where is None:
        raise Refused("the weight is cut")
    first, shape = x.ndim - n, cut.out_shape
    if where.dim == first - 2:
        layout = Layout.whole(shape).with_dim(0, x.layout.dims[0])
        return cut.call(op, x, weight, bias, s, p, extra, groups, d, layout=layout)
    if where.dim < first:
        raise Refused("the channels are cut")
    i, dim = where.dim - first, where.dim
    bounds = cut.bounds(shape[dim])
    reach = (weight.shape[2 + i] - 1) * d[i]
    # From the first input row that reaches row a, or, where strides leave gaps, the one that stands before it
    want = [
        (min(-((reach - a - p[i]) // s[i]), (a + p[i]) // s[i]), (b - 1 + p[i]) // s[i] + 1)
        for a, b in itertools.pairwise(bounds)
    ]
    window = cut.fetch(x, want, kind="conv")
    rest, spare = list(p), list(extra)
    rest[i], spare[i] = 0, s[i] - 1  # room for rows that no input row reaches: the crop below takes what is due
    node = cut.emit(op, window, cut.gather(weight), bias, s, rest, _within(spare, s, d), groups, d)
    starts = [a - (lo * s[i] - p[i]) for (lo, _), a in zip(want, bounds, strict=False)]
    stops = [start + b - a for start, a, b in zip(starts, bounds, bounds[1:], strict=False)]
    return cut.value(
        _crop(cut, node, dim, starts, stops), Layout.whole(shape).with_dim(dim, (Factor(shape[dim], bounds),))
    )


def _within(output_padding: list[int], stride: list[int], dilation: list[int]) -> list[int]:
    """torch takes an output padding below the stride or the dilation only."""
    return [min(o, max(s, d) - 1) for o, s, d in zip(output_padding, stride, dilation, strict=True)]


def _crop(cut: Cutter, node: torch.fx.Node, dim: int, starts: Sequence[int], stops: Sequence[int]) -> torch.fx.Node:
    """Rows [start, stop) of each rank's local result; nothing where that is all of it."""
    sizes = [t.shape[dim] for t in node.meta["local"]]
    if any(b > n for b, n in zip(stops, sizes, strict=True)):
        raise Refused("the output padding reaches past what the rank's rows make")
    if all(a == 0 and b == n for a, b, n in zip(starts, stops, sizes, strict=True)):
        return node
    return cut.emit(aten.slice.Tensor, node, dim, per_rank(starts), per_rank(stops))


@rule(
    aten.pixel_shuffle.default, kind="window",
    samples=lambda: [Sample((torch.randn(2, 8, 7, 5), 2), (2,)), Sample((torch.randn(2, 8, 7, 5), 2), (3,)),
                     Sample((torch.randn(9, 8, 3, 5), 2), (0,))],
)  # fmt: skip
def pixel_shuffle(cut: Cutter, x: Value, factor: int) -> Value:
    """Each row becomes ``factor`` rows on the same rank."""
    if (x.cut_dim or 0) < x.ndim - 3:
        return along(cut, x, aten.pixel_shuffle.default, factor)
    return _scaled(cut, x, aten.pixel_shuffle.default, factor, x.layout.coarse(_row_dim(x)).scaled(factor))


@rule(
    aten.pixel_unshuffle.default, kind="window",
    samples=lambda: [Sample((torch.randn(2, 3, 14, 6), 2), (2,)), Sample((torch.randn(2, 3, 6, 14), 2), (3,)),
                     Sample((torch.randn(9, 3, 6, 4), 2), (0,))],
)  # fmt: skip
def pixel_unshuffle(cut: Cutter, x: Value, factor: int) -> Value:
    """``factor`` rows become one: the rows are re-cut at multiples of it first."""
    if (x.cut_dim or 0) < x.ndim - 3:
        return along(cut, x, aten.pixel_unshuffle.default, factor)
    dim = _row_dim(x)
    bounds = cut.bounds(cut.out_shape[dim])
    x = cut.rebound(x, [b * factor for b in bounds])
    return _scaled(cut, x, aten.pixel_unshuffle.default, factor, Factor(cut.out_shape[dim], bounds))


def _row_dim(x: Value) -> int:
    where = x.layout.cut
    assert where is not None
    if where.dim < positive(-2, x.ndim):
        raise Refused("the channels are cut")
    return where.dim


def _scaled(cut: Cutter, x: Value, op: Any, factor: int, rows: Factor) -> Value:
    return cut.call(op, x, factor, layout=Layout.whole(cut.out_shape).with_dim(_row_dim(x), (rows,)))
