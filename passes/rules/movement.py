# SPDX-License-Identifier: Apache-2.0
"""Operators that move rows to other places: padding, roll and flip. All are fetches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from districompile.ir.layout import Factor, Refused
from districompile.passes.rules.common import positive
from districompile.sharding.builder import ShardedValue, ShardingBuilder, rows_of
from districompile.sharding.registry import Sample, rule

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


@rule(aten.pad.default, samples=_pad_samples)
@rule(aten.constant_pad_nd.default,
      samples=lambda: [Sample((torch.randn(2, 3, 12, 4), [2, 1, 3, 0], 0.5), (2,))])  # fmt: skip
def pad(
    builder: ShardingBuilder, x: ShardedValue, pad: Sequence[int], mode: Any = "constant", value: float | None = None
) -> ShardedValue:
    """Shard padding: other dims are padded locally, and the rows by a fetch beyond the border."""
    if not isinstance(mode, str):  # constant_pad_nd(x, pad, value)
        mode, value = "constant", float(mode)
    fill = 0.0 if value is None else float(value)
    sides = {x.ndim - 1 - i: (pad[2 * i], pad[2 * i + 1]) for i in range(len(pad) // 2)}
    dim, _, size = rows_of(x)
    top, bottom = sides.pop(dim, (0, 0))
    node = x.node
    if any(a or b for a, b in sides.values()):
        node = _pad_other_dims(builder, x, sides, len(pad) // 2, mode, fill)
    layout = x.layout
    for d, (a, b) in sides.items():
        layout = layout.with_dim(d, (Factor(x.shape[d] + a + b),))
    inner = builder.value(node, layout)
    if not (top or bottom):
        return inner
    rows = size + top + bottom
    bounds = builder.bounds(rows)
    want = [(a - top, b - top) for a, b in itertools.pairwise(bounds)]
    edge = "zeros" if mode == "constant" else mode
    moved = builder.fetch(inner, want, edge=edge, fill=fill, purpose="conv")
    return builder.value(moved, layout.with_dim(dim, (Factor(rows, bounds),)))


def _pad_other_dims(
    builder: ShardingBuilder, x: ShardedValue, sides: dict[int, tuple[int, int]], count: int, mode: str, fill: float
) -> torch.fx.Node:
    """Pad the replicated dims locally, and the rows by 0.

    The call names as many dims as the original one: torch pads the trailing 1, 2 or 3, depending on the number of dims.
    """
    sides_inner_first = [side for d in range(x.ndim - 1, x.ndim - 1 - count, -1) for side in sides.get(d, (0, 0))]
    if mode == "constant":
        return builder.emit(aten.constant_pad_nd.default, x, sides_inner_first, fill)
    return builder.emit(aten.pad.default, x, sides_inner_first, mode)


@rule(
    aten.roll.default,
    samples=lambda: [
        Sample((torch.randn(2, 9, 4), [3, -1], [1, 2]), (1,)), Sample((torch.randn(2, 9, 4), [-4], [1]), (1,)),
    ],
)  # fmt: skip
def roll(builder: ShardingBuilder, x: ShardedValue, shifts: Sequence[int], dims: Sequence[int] = ()) -> ShardedValue:
    """Shard ``roll``: along the rows it is a circular fetch."""
    if not dims:
        raise Refused("roll over the flattened tensor")
    for shift, d in zip(shifts, dims, strict=True):
        d = positive(d, x.ndim)
        if d != x.sharded_dim:
            x = builder.call(aten.roll.default, x, [shift], [d], layout=x.layout)
            continue
        _, bounds, size = rows_of(x)
        shift %= size
        want = [(a - shift, b - shift) for a, b in itertools.pairwise(bounds)]
        x = builder.value(builder.fetch(x, want, edge="circular"), x.layout)
    return x


@rule(
    aten.flip.default,
    samples=lambda: [Sample((torch.randn(2, 9, 4), [1, 2]), (1,)), Sample((torch.randn(2, 9, 4), [2]), (1,))],
)
def flip(builder: ShardingBuilder, x: ShardedValue, dims: Sequence[int]) -> ShardedValue:
    """Shard ``flip``: along the rows, each rank fetches the mirrored rows and flips them."""
    dims = [positive(d, x.ndim) for d in dims]
    if x.sharded_dim not in dims:
        return builder.call(aten.flip.default, x, dims, layout=x.layout)
    _, bounds, size = rows_of(x)  # a flip of a merged dim reverses all its factors
    node = builder.fetch(x, [(size - b, size - a) for a, b in itertools.pairwise(bounds)])
    return builder.value(builder.emit(aten.flip.default, node, dims), x.layout)


@rule(
    aten.rot90.default,
    samples=lambda: [Sample((torch.randn(2, 9, 4), k, [1, 2]), (1,)) for k in (1, 2, 3)],
)  # fmt: skip
def rot90(builder: ShardingBuilder, x: ShardedValue, times: int = 1, dims: Sequence[int] = (0, 1)) -> ShardedValue:
    """Rotate by flips; for a quarter turn, the two dims are exchanged, too."""
    a, b = (positive(d, x.ndim) for d in dims)
    turns = times % 4
    turned = {0: [], 1: [b], 2: [a, b], 3: [a]}[turns]
    if turned:
        x = flip(builder, x, turned)
    if turns % 2 == 0:
        return x
    order = list(range(x.ndim))
    order[a], order[b] = b, a
    return builder.call(aten.permute.default, x, order, layout=x.layout.permuted(order))
