# SPDX-License-Identifier: Apache-2.0
"""Dims of several sharded segments: the algebra of their factors, and operators on them."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from districompile.ir.interpret import join
from districompile.ir.layout import Factor, Layout, scale_bounds
from districompile.sharding.builder import ShardedValue
from tests.helpers_cut import Cutting, Function, layouts_of
from tests.helpers_properties import FEW, MANY, places
from tests.passes.test_contraction_properties import _ON_MIXED


@st.composite
def factors(draw: st.DrawFn) -> Factor:
    """A factor of parts on two or three ranks; replicated ones at the ends alone."""
    ranks = draw(st.integers(2, 3))
    lengths, bounds = [], []
    for _ in range(draw(st.integers(1, 3))):
        rows = draw(st.lists(st.integers(0, 4), min_size=ranks, max_size=ranks).filter(any))
        bounds.append((0, *itertools.accumulate(rows)))
        lengths.append(sum(rows))
    front, back = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    factor = Factor.of_parts([front, *lengths, back], [None, *bounds, None])
    assert factor is not None
    return factor


def held_by(factor: Factor, rank: int) -> list[int]:
    """The elements of a factor that a rank holds, by the definition of its parts."""
    found: list[int] = []
    for p in factor.parts:
        lo, hi = (0, p.stop - p.start) if p.bounds is None else p.bounds[rank : rank + 2]
        found += range(p.start + lo, p.start + hi)
    return found


@MANY
@given(factors(), st.integers(1, 3))
def test_what_a_rank_holds_follows_from_the_parts(factor: Factor, inner: int) -> None:
    assert factor.bounds is not None
    ranks = len(factor.bounds) - 1
    held = [held_by(factor, r) for r in range(ranks)]
    assert [factor.local(r) for r in range(ranks)] == [len(h) for h in held]
    again = Factor.of_parts([p.stop - p.start for p in factor.parts], [p.bounds for p in factor.parts])
    assert again == factor
    assert Factor.of_parts([1, factor.size, 1], [factor.bounds, None, factor.bounds]) is None
    x = torch.arange(2 * factor.size * inner).reshape(2, factor.size, inner)
    layout = Layout(((Factor(2),), (factor,), (Factor(inner),)))
    parts = [x[:, h] for h in held]
    assert torch.equal(join(parts, layout), x)
    assert all(t.shape == layout.local_shape(r) for r, t in enumerate(parts))
    # Merged with an inner dim, and split again
    merged = Layout(((Factor(2),), (factor.scaled(inner),)))
    assert torch.equal(join([t.flatten(1) for t in parts], merged), x.flatten(1))
    assert merged.regrouped((2, factor.size, inner)) == layout
    alone = factor.drop_replicas
    kept = [held_by(alone, r) for r in range(ranks)]
    assert sorted(i for k in kept for i in k) == list(range(factor.size)), "each element on one rank"
    assert all(set(k) <= set(h) for k, h in zip(kept, held, strict=True)), "nothing is sent"


@MANY
@given(factors(), factors())
def test_a_factor_is_divided_anew_part_by_part(a: Factor, b: Factor) -> None:
    assert a.bounds is not None
    ranks = len(a.bounds) - 1

    def even(n: int) -> tuple[int, ...]:
        return tuple(n * r // ranks for r in range(ranks + 1))

    again = a.resharded(even)
    assert [(p.start, p.stop) for p in again.parts] == [(p.start, p.stop) for p in a.parts]
    assert all(p.bounds is None or p.bounds == even(p.stop - p.start) for p in again.parts)


def test_a_layout_shows_its_segments() -> None:
    factor = Factor.of_parts([77, 4096], [(0, 38, 77), (0, 2048, 4096)])
    assert repr(Layout(((Factor(2),), (factor,)))) == "[2, 77*+4096*]"  # type: ignore[arg-type]


def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of an image, and those of every other row of it."""
    return x.flatten(2).transpose(1, 2), x[:, :, ::2].flatten(2).transpose(1, 2)


@FEW
@given(st.data(), places())
def test_operators_on_segments(data: st.DataObject, cut_points: tuple[float, ...]) -> None:
    """Two sharded sequences are joined, beside replicated tokens or not, go through random operators, and part."""
    h, w = data.draw(st.integers(10, 14)), data.draw(st.integers(3, 4))
    front, back = data.draw(st.sampled_from([(0, 0), (2, 0), (0, 3), (1, 2)]))
    names = data.draw(st.lists(st.sampled_from(sorted(_ON_MIXED)), min_size=1, max_size=2))

    def run(x: torch.Tensor) -> torch.Tensor:
        a, b = both(x)
        ends = a[:, :1].expand(-1, front, -1) * 0 + 1, a[:, :1].expand(-1, back, -1) * 0 - 1
        t = torch.cat([ends[0], a, b, ends[1]], 1)
        for name in names:
            t = _ON_MIXED[name](t)
        n = front + h * w
        rest = t[:, n:].sum(1, keepdim=True) + t[:, :front].sum(1, keepdim=True) + t[:, n + 1 : n + 5].amax(1, True)
        return (t[:, front:n] + rest).transpose(1, 2).reshape(x.shape)

    x = torch.randn(2, 4, h, w, generator=torch.Generator().manual_seed(h * w))
    error, found = Cutting(Function(run), {"x": x}, {"x": 2}).at(cut_points)
    assert error <= 1e-5, (names, front, back)
    assert not [f for f in found.fallbacks if "too few" not in f.reason], found.fallbacks
    segmented = [lay for lay in layouts_of(found) if lay.sharded_axis is not None and lay.sharded_axis.segments]
    assert segmented or scale_bounds(cut_points, (h + 1) // 2) is None


def test_masked_attention_moves_the_columns_of_the_mask_and_no_keys() -> None:
    mask = torch.rand(1, 1, 1, 12 * 3 + 6 * 3) > 0.3

    def run(x: torch.Tensor) -> torch.Tensor:
        a, b = both(x)
        t = torch.cat([a, b], 1).unsqueeze(1)
        for _ in range(2):
            t = t + torch.nn.functional.scaled_dot_product_attention(t, t * 2, t.sin(), mask)
        return t[:, 0, : a.shape[1]].transpose(1, 2).reshape(x.shape)

    error, found = Cutting(Function(run), {"x": torch.randn(1, 4, 12, 3)}, {"x": 2}).at((0.0, 0.4, 0.7, 1.0))
    assert error <= 1e-5
    joined = [n for n in found.graph.nodes if str(n.target) == "aten.cat.default"]
    # The tokens, and the mask once for both attentions
    assert sum(n.meta["local"][0].dtype == torch.bool for n in joined) == 1
    assert sum(n.meta["local"][0].dtype != torch.bool for n in joined) == 1
    assert all(isinstance(v, ShardedValue | tuple) for v in found.values.values())
