# SPDX-License-Identifier: Apache-2.0
"""Operators of SPMD graphs in addition to those of aten.

``fetch`` and ``reduce`` are the collectives. They have fake kernels, so that a graph with them can be traced and
checked; their real kernels raise an error. Lowering turns ``fetch`` into ``assemble(exchange(pack_boundary(x)), x)``:
pack the rows that other ranks read, transfer them, and assemble the result. ``last_step`` reads a value of the previous
call.

All others are *composites*: plain functions over aten operators. They are registered so that a dump shows one line for
ten operators, and so that a backend can match them as one operator. Every backend can decompose them
(``CompositeImplicitAutograd``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from districompile.ir.differences import add_difference, encode_difference
from districompile.ir.quantised import fp8_conv, fp8_linear

_LIB: Any = torch.library.Library("districompile", "DEF")  # type: ignore[no-untyped-call]

_LIB.define(
    "fetch(Tensor x, int dim, int[] bounds, int[] lo, int[] hi, str edge, str order, float fill, int rank,"
    " str site, str purpose) -> Tensor"
)
_LIB.define("reduce(Tensor x, str op, str site, str purpose) -> Tensor")
_LIB.define("exchange(Tensor x, int[] shape) -> Tensor")
_LIB.define("last_step(Tensor x) -> Tensor")
_LIB.define("assemble(Tensor received, Tensor x, int dim, int before, int after, int start, int stop) -> Tensor")
_LIB.define("assemble_in_place(Tensor received, Tensor x, int dim, int before, int start, int stop) -> Tensor")
_LIB.define("pack_boundary(Tensor x, int dim, int top, int bottom) -> Tensor")
_LIB.define("pick(Tensor x, int dim, int[] rows) -> Tensor")
_LIB.define(
    "border_scale(Tensor x, int dim, int first, int rows, int stride, int padding, int kernel, int low, int high)"
    " -> Tensor"
)
_LIB.define("window_sums(Tensor x, int dim, int[] starts, int[] stops, int[] counts) -> Tensor")
_LIB.define(
    "resample(Tensor x, int dim, int first, int rows, int lo, int size, float scale, bool aligned, str kind) -> Tensor"
)
_LIB.define("moments(Tensor x, int groups) -> Tensor")
_LIB.define("merge_moments(Tensor parts, float[] counts) -> Tensor")
_LIB.define("correct_moments(Tensor merged, Tensor stale, Tensor fresh) -> Tensor")
_LIB.define("announce(Tensor moments) -> Tensor")
_LIB.define("forecast_moments(Tensor moments, Tensor previous) -> Tensor")
_LIB.define("merge_forecasts(Tensor parts, Tensor fresh, float[] counts) -> Tensor")
_LIB.define("encode_difference(Tensor x, Tensor reference) -> Tensor")
_LIB.define("add_difference(Tensor reference, Tensor code) -> Tensor")
_LIB.define("normalize(Tensor x, Tensor stats, int groups, Tensor? weight, Tensor? bias, float eps) -> Tensor")
_LIB.define("fp8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor")
_LIB.define(
    "fp8_conv(Tensor x, Tensor weight, Tensor scale, Tensor? input_scale, Tensor? bias, int[] stride, int[] padding,"
    " int[] dilation, int groups) -> Tensor"
)


def fetch_meta(
    x: Tensor, dim: int, bounds: list[int], lo: list[int], hi: list[int], edge: str, order: str, fill: float,
    rank: int, module_path: str, purpose: str,
) -> Tensor:  # fmt: skip
    shape = list(x.shape)
    shape[dim] = hi[rank] - lo[rank]
    return x.new_empty(shape)


def _outside(*args: object, **kwargs: object) -> Tensor:
    raise RuntimeError("collectives run inside a program only (program.simulate, dc.load)")


def assemble(received: Tensor, x: Tensor, dim: int, before: int, after: int, start: int, stop: int) -> Tensor:
    """Concatenate ``received[:before]``, ``x[start:stop]`` and ``received[before:before + after]`` along ``dim``.

    The rank's own rows stand between those of others. The rows are dim 0 of ``received``, as they are transferred.
    """
    parts = []
    if before:
        parts.append(received.narrow(0, 0, before).movedim(0, dim))
    if stop > start or not (before or after):
        parts.append(x.narrow(dim, start, stop - start))
    if after:
        parts.append(received.narrow(0, before, after).movedim(0, dim))
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0].contiguous()


def assemble_in_place(received: Tensor, x: Tensor, dim: int, before: int, start: int, stop: int) -> Tensor:
    """Replace the rows of ``received`` behind its first ``before`` by ``x[start:stop]``.

    The result is that of :func:`assemble`. ``received`` has a gap for the own rows, into which a backend may write
    them.
    """
    after = before + stop - start
    parts = [received[:before].movedim(0, dim), x.narrow(dim, start, stop - start), received[after:].movedim(0, dim)]
    return torch.cat(parts, dim)


def pack_boundary(x: Tensor, dim: int, top: int, bottom: int) -> Tensor:
    """Return the first ``top`` and the last ``bottom`` rows of ``x`` along ``dim``, with the rows as dim 0.

    Other ranks read these rows. As dim 0, any run of them is contiguous. Where the two parts overlap, all rows are
    returned.
    """
    n = x.shape[dim]
    if top + bottom >= n:
        parts = [x]
    else:
        parts = [x.narrow(dim, 0, top)] if top else []
        parts += [x.narrow(dim, n - bottom, bottom)] if bottom or not top else []  # nobody reads a row: an empty result
    rows = [p.movedim(dim, 0) for p in parts]
    return torch.cat(rows) if len(rows) > 1 else rows[0].contiguous()


def pick(x: Tensor, dim: int, rows: list[int]) -> Tensor:
    """Compute ``x.index_select(dim, rows)`` by slices of consecutive rows, without an index tensor."""
    parts: list[Tensor] = []
    start = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            parts.append(x.narrow(dim, rows[start], i - start))
            start = i
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0].contiguous()


def window_sums(x: Tensor, dim: int, starts: list[int], stops: list[int], counts: list[int]) -> Tensor:
    """Sum rows [starts[i], stops[i]) of ``x`` along ``dim`` over counts[i], for each i; zero for an empty window."""
    parts = []
    for start, stop, count in zip(starts, stops, counts, strict=True):
        rows = x.narrow(dim, start, stop - start) if stop > start else torch.zeros_like(x.narrow(dim, 0, 1))
        parts.append(rows.sum(dim, keepdim=True) / count)
    return torch.cat(parts, dim)


def border_scale(
    x: Tensor, dim: int, first: int, rows: int, stride: int, padding: int, kernel: int, low: int, high: int
) -> Tensor:
    """Rescale rows [first, first + rows) of an average pooling over ``kernel`` rows, to average over [low, high)."""
    start = torch.arange(first, first + rows, device=x.device) * stride - padding
    count = (start + kernel).clamp(max=high) - start.clamp(min=low)
    return x * (kernel / count).to(x.dtype).reshape([-1 if d == dim else 1 for d in range(x.ndim)])


# Filters of torch's resizing: support on either side in source rows (times the scale when shrinking with antialias)
_FILTERS = {"linear": 1, "cubic": 2, "linear_aa": 1, "cubic_aa": 2}


def _cubic(x: Tensor, a: float) -> Tensor:
    """Compute Keys' cubic convolution kernel for |x| < 2."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def resample(
    x: Tensor, dim: int, first: int, rows: int, lo: int, size: int, scale: float, aligned: bool, kind: str
) -> Tensor:
    """Compute rows [first, first + rows) of a resizing of ``x`` along ``dim``.

    ``x`` holds rows lo, lo + 1, ... of the ``size`` rows of the global tensor. Output row y is centred at source row
    ``scale * y`` (``aligned`` at the corners) or ``scale * (y + 1/2) - 1/2``. ``kind`` is "linear" or "cubic", as
    ``torch.nn.functional.interpolate`` defines them, with "_aa" for ``antialias=True``. Weights are computed by
    operators, in float32 as torch does: no constant has to be copied to a device.
    """
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.arange(first, first + rows, dtype=precise, device=x.device)
    out: Tensor | None = None
    total: Tensor | None = None
    shape = [-1 if d == dim else 1 for d in range(x.ndim)]
    cubic, smooth = kind.startswith("cubic"), kind.endswith("_aa")
    if smooth:
        reach = _FILTERS[kind] * max(scale, 1.0)
        centre = scale * (y + 0.5)
        begin = torch.trunc(centre - reach + 0.5).clamp(min=0)
        end = torch.trunc(centre + reach + 0.5).clamp(max=size)
        taps = 2 * math.ceil(reach) + 1
    else:
        centre = scale * y if aligned else scale * (y + 0.5) - 0.5
        centre = centre if cubic else centre.clamp(min=0)
        begin = torch.floor(centre) - (1 if cubic else 0)
        taps = 4 if cubic else 2
    for t in range(taps):
        at = begin + t
        if smooth:
            distance = ((at - centre + 0.5) * (1.0 / max(scale, 1.0))).abs()
            weight = _cubic(distance, -0.5) if cubic else (1 - distance).clamp(min=0)
            weight = torch.where(at < end, weight, torch.zeros_like(weight))
            total = weight if total is None else total + weight
        else:
            distance = (centre - at).abs()
            weight = _cubic(distance, -0.75) if cubic else 1 - distance
        index = (at.clamp(min=0, max=size - 1) - lo).clamp(min=0, max=x.shape[dim] - 1).to(torch.int64)
        part = x.index_select(dim, index).to(precise) * weight.reshape(shape)
        out = part if out is None else out + part
    assert out is not None
    if total is not None:
        out = out / total.reshape(shape)
    return out.to(x.dtype)


def _grouped(x: Tensor, groups: int) -> Tensor:
    precise = x if x.dtype == torch.float64 else x.to(torch.float32)
    return precise.reshape(x.shape[0], groups, -1)


def moments(x: Tensor, groups: int) -> Tensor:
    """Compute mean and biased variance of each group of channels over this rank's rows.

    ``x`` (B, C, ...) -> (1, 2, B, groups) in float32 (float64 stays). The mean is subtracted before anything is
    squared, so that a large mean over a small variance does not cancel.
    """
    y = _grouped(x, groups)
    mean = y.mean(-1, keepdim=True)
    var = (y - mean).square().mean(-1)
    return torch.stack([mean.squeeze(-1), var]).unsqueeze(0)


def merge_moments(parts: Tensor, counts: list[float]) -> Tensor:
    """Merge the moments of ``parts`` (R, 2 or more, B, G), which hold ``counts`` elements each, into (2, B, G).

    This is the parallel update of Chan, Golub and LeVeque, for R parts at once.
    """
    return _merged(parts[:, 0], parts[:, 1], counts)


def _merged(mean: Tensor, var: Tensor, counts: list[float]) -> Tensor:
    total = sum(counts)
    if len(set(counts)) == 1:
        average = mean.mean(0)
        return torch.stack([average, var.mean(0) + (mean - average).square().mean(0)])
    shares = [c / total for c in counts]  # plain numbers: a constant tensor would be copied to the device on every call
    average = mean[0] * shares[0]
    for r in range(1, len(shares)):
        average = average + mean[r] * shares[r]
    second = var + (mean - average).square()
    merged = second[0] * shares[0]
    for r in range(1, len(shares)):
        merged = merged + second[r] * shares[r]
    return torch.stack([average, merged])


def correct_moments(merged: Tensor, stale: Tensor, fresh: Tensor) -> Tensor:
    """Correct moments as DistriFusion's asynchronous group norm does (arXiv 2402.19481, section 4.2).

    The result is E[x] and E[x^2] of the previous step's image on all ranks (``merged``, (2, B, G)) plus this rank's own
    change since then (``fresh`` minus ``stale``, each (1, 2, B, G)). It is computed in central moments: the variance is
    ``V + (v' - v) + 2 (m' - m) (m - M)``, which does not cancel where means are large. Where that is not positive, the
    rank's own variance is used, as in the paper.
    """
    pairs = (merged[0], merged[1], stale[0, 0], stale[0, 1], fresh[0, 0], fresh[0, 1])
    return torch.stack(corrected(*pairs))


def corrected(
    mean: Tensor, var: Tensor, old_mean: Tensor, old_var: Tensor, new_mean: Tensor, new_var: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute mean and variance of :func:`correct_moments`, each (B, G)."""
    shift = new_mean - old_mean
    moved = var + (new_var - old_var) + 2 * shift * (old_mean - mean)
    return mean + shift, torch.where(moved > 0, moved, new_var)


def announce(moments: Tensor) -> Tensor:
    """Pack a rank's statistics (1, 2, B, G) for sending in the exact phase: (1, 4, B, G), twice the same.

    The displaced phase sends :func:`forecast_moments` of the same shape instead.
    """
    return torch.cat([moments, moments], 1)


def forecast_moments(moments: Tensor, previous: Tensor) -> Tensor:
    """Forecast the moments of the next step from those of this one and those sent in the previous one.

    ``moments`` (1, 2, B, G), ``previous`` (1, 4, B, G) -> (1, 4, B, G): mean and variance of the next step, then those
    of this step. The forecast adds the last change to the mean, and multiplies the variance by the last factor. The
    change of the mean is limited to one standard deviation, the factor to ``MOST_GROWTH`` and its inverse. The variance
    therefore stays positive for any data (decision 37).
    """
    mean, var = moments[0, 0], moments[0, 1]
    return torch.stack([*forecast(mean, var, previous[0, 2], previous[0, 3]), mean, var]).unsqueeze(0)


MOST_GROWTH = 4.0  # of a variance from one step to the next
_SMALL = 1e-12  # below any variance that matters beside the epsilon of a norm


def forecast(mean: Tensor, var: Tensor, old_mean: Tensor, old_var: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and variance of :func:`forecast_moments`, each (B, G)."""
    most = torch.sqrt(var)
    shift = torch.minimum(torch.maximum(mean - old_mean, -most), most)
    growth = ((var + _SMALL) / (old_var + _SMALL)).clamp(1 / MOST_GROWTH, MOST_GROWTH)
    return mean + shift, var * growth


def merge_forecasts(parts: Tensor, fresh: Tensor, counts: list[float]) -> Tensor:
    """Merge every rank's forecast for this step with this rank's own moments of this step, into (2, B, G).

    ``parts`` are the forecasts, (R, 4, B, G), this rank's own first; ``fresh`` are the own moments, (1, 2, B, G). The
    forecasts of the others are corrected by half of the own forecast's error. Half is the share with the least error
    where the correlation between the ranks' errors is unknown (decision 37). All are then merged as in
    :func:`merge_moments`, so that the variance is a sum of positive terms.
    """
    mean, var = fresh[0, 0], fresh[0, 1]
    shift, growth = missed(parts[0, 0], parts[0, 1], mean, var)
    means = torch.cat([mean.unsqueeze(0), parts[1:, 0] + shift])
    return _merged(means, torch.cat([var.unsqueeze(0), parts[1:, 1] * growth]), counts)


def missed(expected_mean: Tensor, expected_var: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Return half of a forecast's error: a summand for the mean, and a factor for the variance."""
    growth = ((var + _SMALL) / (expected_var + _SMALL)).clamp(1 / MOST_GROWTH, MOST_GROWTH)
    return 0.5 * (mean - expected_mean), torch.sqrt(growth)


def normalize(x: Tensor, stats: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Compute ``(x - mean) / sqrt(var + eps) * weight + bias`` by group; ``stats`` (2, B, groups).

    The computation has the dtype of ``stats``, the result that of ``x``.
    """
    y = _grouped(x, groups)
    y = (y - stats[0].unsqueeze(-1)) * torch.rsqrt(stats[1] + eps).unsqueeze(-1)
    y = y.reshape(x.shape)
    shape = [1, x.shape[1]] + [1] * (x.ndim - 2)
    if weight is not None:
        y = y * weight.to(y.dtype).reshape(shape)
    if bias is not None:
        y = y + bias.to(y.dtype).reshape(shape)
    return y.to(x.dtype)


_LIB.impl("fetch", fetch_meta, "Meta")
_LIB.impl("fetch", _outside, "CompositeExplicitAutograd")
_LIB.impl("reduce", lambda x, op, module_path, purpose: torch.empty_like(x), "Meta")
_LIB.impl("reduce", _outside, "CompositeExplicitAutograd")
_LIB.impl("exchange", lambda x, shape: x.new_empty(shape), "Meta")
_LIB.impl("exchange", _outside, "CompositeExplicitAutograd")
_LIB.impl("last_step", lambda x: torch.empty_like(x), "Meta")
_LIB.impl("last_step", _outside, "CompositeExplicitAutograd")
COMPOSITES = {
    f.__name__: f
    for f in (
        assemble,
        assemble_in_place,
        pack_boundary,
        pick,
        border_scale,
        window_sums,
        resample,
        moments,
        merge_moments,
        correct_moments,
        announce,
        forecast_moments,
        merge_forecasts,
        normalize,
        encode_difference,
        add_difference,
        fp8_linear,
        fp8_conv,
    )
}
for _name, _function in COMPOSITES.items():
    _LIB.impl(_name, _function, "CompositeImplicitAutograd")

ops = torch.ops.districompile

# A gathered value may have other strides than the original, as may a value whose copy was dropped
ANY_STRIDES: dict[Any, Any] = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default: torch.ops.aten.reshape.default,
}
