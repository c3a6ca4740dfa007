# SPDX-License-Identifier: Apache-2.0
"""Rules of norms, products and attention at random sizes and uneven rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from districompile.ir.layout import scale_bounds
from districompile.sharding.registry import Sample
from tests.helpers_cut import Cutting, Function, layouts_of
from tests.helpers_properties import FEW, MANY, check, places, randn, spatial

aten = torch.ops.aten


@MANY
@given(st.data(), places())
def test_norms(data: st.DataObject, cut_points: tuple[float, ...]) -> None:
    _, sizes, at = data.draw(spatial())
    x = randn(2, 6, *sizes) * data.draw(st.sampled_from([1.0, 3.0])) + data.draw(st.sampled_from([0.0, 5.0]))
    groups = data.draw(st.sampled_from([1, 2, 3, 6]))
    check(aten.group_norm.default, Sample((x, groups, randn(6), randn(6), 1e-3), (2 + at, None, None)), cut_points)
    y = randn(2, data.draw(st.integers(7, 12)), 3, 6)
    check(aten.layer_norm.default, Sample((y, [6], randn(6), randn(6)), (1, None, None)), cut_points)
    check(aten.layer_norm.default, Sample((y, [3, 6]), (1,)), cut_points)
    rest = list(x.shape[1:])
    check(aten.layer_norm.default, Sample((x, rest, randn(*rest), randn(*rest)), (2 + at, None, None)), cut_points)
    check(aten.rms_norm.default, Sample((x, rest, randn(*rest), 1e-3), (2 + at, None)), cut_points)
    batch = (x, randn(6), randn(6), True, 0.1, 1e-3)
    check(aten._native_batch_norm_legit.no_stats, Sample(batch, (2 + at, None, None)), cut_points)
    check(aten.prelu.default, Sample((x, randn(6)), (2 + at, None)), cut_points)


@st.composite
def equations(draw: st.DrawFn) -> tuple[str, list[Tensor], list[int | None]]:
    """A contraction of two or three operands; ``r`` and ``s`` are long enough to be cut."""
    size = {"a": 2, "b": 3, "c": 4, "r": draw(st.integers(7, 11)), "s": draw(st.integers(7, 11))}
    terms, rows = [], []
    for _ in range(draw(st.integers(2, 3))):
        term = draw(st.permutations(sorted(size)).map(lambda p: p[: draw(st.integers(1, 4))]))
        terms.append("".join(term))
        long = [term.index(c) for c in "rs" if c in term]
        rows.append(draw(st.sampled_from([None, *long])))
    letters = sorted(set("".join(terms)))
    out = draw(st.permutations(letters).map(lambda p: p[: draw(st.integers(1, len(letters)))]))
    tensors = [randn(*(size[c] for c in term)) for term in terms]
    return ",".join(terms) + "->" + "".join(out), tensors, rows


@settings(MANY, max_examples=80)
@given(equations(), places())
def test_contractions(drawn: tuple[str, list[Tensor], list[int | None]], cut_points: tuple[float, ...]) -> None:
    equation, tensors, rows = drawn
    assume(any(r is not None for r in rows))
    check(aten.einsum.default, Sample((equation, tensors), tuple(rows)), cut_points)


@MANY
@given(st.data(), places())
def test_products(data: st.DataObject, cut_points: tuple[float, ...]) -> None:
    batch_a = data.draw(st.sampled_from([(), (2,), (1,), (2, 3), (2, 1)]))
    batch_b = data.draw(st.sampled_from([(), (2,), (1,), (2, 3), (1, 3)]))
    try:
        torch.broadcast_shapes(batch_a, batch_b)
    except RuntimeError:
        assume(False)
    n, m = data.draw(st.integers(7, 11)), data.draw(st.integers(7, 11))
    a, b = randn(*batch_a, n, m), randn(*batch_b, m, n)
    rows = (data.draw(st.sampled_from([None, -1, -2])), data.draw(st.sampled_from([None, -1, -2])))
    assume(rows != (None, None))
    at = tuple(None if r is None else t.ndim + r for r, t in zip(rows, (a, b), strict=True))
    check(aten.matmul.default, Sample((a, b), at), cut_points)


@MANY
@given(st.data(), places())
def test_attention(data: st.DataObject, cut_points: tuple[float, ...]) -> None:
    n, m = data.draw(st.integers(7, 12)), data.draw(st.integers(7, 12))
    q, k, v = randn(2, 2, n, 4), randn(2, 2, m, 4), randn(2, 2, m, 3)
    rows: list[int | None] = [data.draw(st.sampled_from([None, 2])) for _ in range(3)]
    assume(any(rows))
    mask = data.draw(st.sampled_from([None, (n, m), (1, m), (2, 1, n, m), (2, 1, 1, m), (n, 1)]))
    if mask is None:
        check(aten.scaled_dot_product_attention.default, Sample((q, k, v), tuple(rows)), cut_points)
    else:
        at = data.draw(st.sampled_from([None, *([len(mask) - 2] if mask[-2] == n else [])]))
        sample = Sample((q, k, v, randn(*mask)), (*rows, at))
        check(aten.scaled_dot_product_attention.default, sample, cut_points)


def _beside(front: int, back: int) -> Callable[[Tensor], Tensor]:
    def join(x: Tensor) -> Tensor:
        t = x.flatten(2).transpose(1, 2)
        return torch.cat([t[:, :1].expand(-1, front, -1) * 0 + 1, t, t[:, :1].expand(-1, back, -1) * 0 - 1], 1)

    return join


_ON_MIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "pointwise": lambda t: t * 2 + t.sin(),
    "norm": lambda t: F.layer_norm(t, (t.shape[-1],)),
    "rms": lambda t: t * (t.pow(2).mean(-1, keepdim=True) + 1e-3).rsqrt(),  # a flipped sum may be zero
    "mean": lambda t: t - t.mean(1, keepdim=True),
    "softmax": lambda t: t.softmax(1),
    "maximum": lambda t: t - t.amax(1, keepdim=True),
    "heads": lambda t: (
        F.scaled_dot_product_attention(*(u.unflatten(-1, (2, -1)).transpose(1, 2) for u in (t, t, t)))
        .transpose(1, 2)
        .flatten(2)
    ),
    "scores": lambda t: (t @ t.transpose(1, 2)).softmax(-1) @ t,
    "linear": lambda t: t.softmax(-1) @ (t.softmax(1).transpose(1, 2) @ t),
    "conv": lambda t: F.conv1d(t.transpose(1, 2), torch.ones(4, 4, 3) / 9, padding=1).transpose(1, 2),
    "roll": lambda t: t.roll(2, 1) + t,
    "flip": lambda t: t.flip(1) + t,
    "tail": lambda t: torch.cat([t, t[:, -1:]], 1)[:, :-1],
    "swap": lambda t: torch.cat([t[:, 3:], t[:, :3]], 1),
    "var": lambda t: t / (t.var(1, keepdim=True) + 1),
    "position": lambda t: t + torch.linspace(0, 1, t.shape[1])[None, :, None],
    "pool": lambda t: t + F.avg_pool1d(t.transpose(1, 2), 3, 1, 1).transpose(1, 2),
    "norm2": lambda t: F.normalize(t, dim=1),
    "group": lambda t: F.group_norm(t.transpose(1, 2), 2).transpose(1, 2),
}


@pytest.mark.slow
@settings(FEW, max_examples=40)
@given(st.data(), places())
def test_mixed_dims(data: st.DataObject, cut_points: tuple[float, ...]) -> None:
    """Tokens beside an image's, through random operators, and off again."""
    h, w = data.draw(st.integers(6, 11)), data.draw(st.integers(3, 4))
    front, back = data.draw(st.sampled_from([(2, 0), (0, 3), (1, 2), (3, 1)]))
    names = data.draw(st.lists(st.sampled_from(sorted(_ON_MIXED)), min_size=1, max_size=3))

    def run(x: Tensor) -> Tensor:
        t = _beside(front, back)(x)
        for name in names:
            t = _ON_MIXED[name](t)
        rest = t[:, :front].sum(1, keepdim=True) + t[:, front + h * w :].sum(1, keepdim=True)
        return (t[:, front : front + h * w] + rest).transpose(1, 2).reshape(x.shape)

    error, found = Cutting(Function(run), {"x": randn(2, 4, h, w)}, {"x": 2}).at(cut_points)
    assert error <= 1e-5, (names, front, back)
    assert not [f for f in found.fallbacks if "too few" not in f.reason], found.fallbacks
    partially_replicated = any(
        layout.sharded_axis is not None and layout.sharded_axis.partially_replicated for layout in layouts_of(found)
    )
    assert partially_replicated or len(cut_points) == 2 or scale_bounds(cut_points, h) is None
