"""Operators that move rows to other places: padding, roll and flip. All are fetches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from districompile.cutter import Cutter, Value, rows_of
from districompile.ir.layout import Factor, Refused
from districompile.passes.rules.common import positive
from districompile.registry import Sample, rule

aten = torch.ops.aten


def _pad_samples() -> Iterable[Sample]:
    x = torch.randn(2, 3, 12, 4)
    yield Sample((x, [0, 1, 0, 1]), (2,))
    yield Sample((x, [2, 1, 3, 0], "constant", 0.5), (2,))
    for mode in ("reflect", "replicate", "circular"):
        yield Sample((x, [1, 2, 2, 1], mode), (2,))
    yield Sample((x, [-1, 0, -2, 1]), (2,))
    yield Sample((x, [1, 1]), (2,))
    yield Sample((torch.randn(9, 3, 5, 4), [1, 2, 2, 1], "circular"), (0,))


@rule(aten.pad.default, kind="window", samples=_pad_samples)
@rule(aten.constant_pad_nd.default, kind="window",
      samples=lambda: [Sample((torch.randn(2, 3, 12, 4), [2, 1, 3, 0], 0.5), (2,))])  # fmt: skip
def pad(cut: Cutter, x: Value, pad: Sequence[int], mode: Any = "constant", value: float | None = None) -> Value:
    if not isinstance(mode, str):  # constant_pad_nd(x, pad, value)
        mode, value = "constant", float(mode)
    fill = 0.0 if value is None else float(value)
    sides = {x.ndim - 1 - i: (pad[2 * i], pad[2 * i + 1]) for i in range(len(pad) // 2)}
    dim, _, size = rows_of(x)
    top, bottom = sides.pop(dim, (0, 0))
    node = x.node
    if any(a or b for a, b in sides.values()):
        node = _pad_other_dims(cut, x, sides, len(pad) // 2, mode, fill)
    layout = x.layout
    for d, (a, b) in sides.items():
        layout = layout.with_dim(d, (Factor(x.shape[d] + a + b),))
    inner = cut.value(node, layout)
    if not (top or bottom):
        return inner
    rows = size + top + bottom
    bounds = cut.bounds(rows)
    want = [(a - top, b - top) for a, b in itertools.pairwise(bounds)]
    edge = "zeros" if mode == "constant" else mode
    moved = cut.fetch(inner, want, edge=edge, fill=fill, kind="conv")
    return cut.value(moved, layout.with_dim(dim, (Factor(rows, bounds),)))


def _pad_other_dims(
    cut: Cutter, x: Value, sides: dict[int, tuple[int, int]], count: int, mode: str, fill: float
) -> torch.fx.Node:
    """Pad the whole dims locally; the rows get none here. As many dims as the original call names: torch takes the
    trailing 1, 2 or 3 of them, depending on the rank."""
    flat = [side for d in range(x.ndim - 1, x.ndim - 1 - count, -1) for side in sides.get(d, (0, 0))]
    if mode == "constant":
        return cut.emit(aten.constant_pad_nd.default, x, flat, fill)
    return cut.emit(aten.pad.default, x, flat, mode)


@rule(
    aten.roll.default, kind="window",
    samples=lambda: [
        Sample((torch.randn(2, 9, 4), [3, -1], [1, 2]), (1,)), Sample((torch.randn(2, 9, 4), [-4], [1]), (1,)),
    ],
)  # fmt: skip
def roll(cut: Cutter, x: Value, shifts: Sequence[int], dims: Sequence[int] = ()) -> Value:
    if not dims:
        raise Refused("roll over the flattened tensor")
    for shift, d in zip(shifts, dims, strict=True):
        d = positive(d, x.ndim)
        if d != x.cut_dim:
            x = cut.call(aten.roll.default, x, [shift], [d], layout=x.layout)
            continue
        _, bounds, size = rows_of(x)
        shift %= size
        want = [(a - shift, b - shift) for a, b in itertools.pairwise(bounds)]
        x = cut.value(cut.fetch(x, want, edge="circular"), x.layout)
    return x


@rule(
    aten.flip.default,
    kind="window",
    samples=lambda: [Sample((torch.randn(2, 9, 4), [1, 2]), (1,)), Sample((torch.randn(2, 9, 4), [2]), (1,))],
)
def flip(cut: Cutter, x: Value, dims: Sequence[int]) -> Value:
    dims = [positive(d, x.ndim) for d in dims]
    if x.cut_dim not in dims:
        return cut.call(aten.flip.default, x, dims, layout=x.layout)
    _, bounds, size = rows_of(x)  # a merged dim is flipped as a whole, which turns all its factors round
    node = cut.fetch(x, [(size - b, size - a) for a, b in itertools.pairwise(bounds)])
    return cut.value(cut.emit(aten.flip.default, node, dims), x.layout)


@rule(
    aten.rot90.default, kind="window",
    samples=lambda: [Sample((torch.randn(2, 9, 4), k, [1, 2]), (1,)) for k in (1, 2, 3)],
)  # fmt: skip
def rot90(cut: Cutter, x: Value, times: int = 1, dims: Sequence[int] = (0, 1)) -> Value:
    """Flips, and for a quarter turn the two dims exchanged."""
    a, b = (positive(d, x.ndim) for d in dims)
    turns = times % 4
    turned = {0: [], 1: [b], 2: [a, b], 3: [a]}[turns]
    if turned:
        x = flip(cut, x, turned)
    if turns % 2 == 0:
        return x
    order = list(range(x.ndim))
    order[a], order[b] = b, a
    return cut.call(aten.permute.default, x, order, layout=x.layout.permuted(order))
