"""Layouts: what a rank holds, how reshapes carry the cut, where images are cut."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from districompile.ir.interpret import fetch_all, join
from districompile.ir.layout import Layout, Refused, choose_cut_points, scale_bounds
from districompile.ir.rows import source_row


@given(st.data())
def test_reshape_of_the_parts_is_the_part_of_the_reshape(data: st.DataObject) -> None:
    """Where a layout says a reshape is possible, joining the locally reshaped parts gives the reshaped whole."""
    b, c, h, w = (data.draw(st.sampled_from([1, 2, 3, 4, 6])) for _ in range(4))
    h += 3
    cuts = sorted(data.draw(st.sets(st.integers(1, h - 1), min_size=1, max_size=2)))
    bounds = (0, *cuts, h)
    x = torch.arange(b * c * h * w).reshape(b, c, h, w)
    layout = Layout.sharded_at(x.shape, 2, bounds)
    total = x.numel()
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    first = data.draw(st.sampled_from(divisors))
    second = data.draw(st.sampled_from([d for d in divisors if (total // first) % d == 0]))
    shape = (first, second, total // first // second)
    try:
        after = layout.regrouped(shape)
    except Refused:
        return
    parts = [x[:, :, lo:hi].reshape(after.local_shape(r)) for r, (lo, hi) in enumerate(itertools.pairwise(bounds))]
    assert torch.equal(join(parts, after), x.reshape(shape))


def test_refused_where_the_rows_are_broken_up() -> None:
    layout = Layout.sharded_at((2, 12, 4), 1, (0, 5, 12))
    with pytest.raises(Refused, match="splits the sharded rows inside a rank"):
        layout.regrouped((2, 4, 3, 4))


@given(st.integers(1, 12), st.integers(1, 200), st.lists(st.sampled_from([1, 2, 4, 8]), max_size=4))
def test_cut_points_leave_no_rank_without_rows(ranks: int, rows: int, strides: list[int]) -> None:
    sizes = {rows} | {math.ceil(rows / s) for s in strides}
    if rows < ranks:
        return
    cut_points = choose_cut_points(rows, ranks, sizes)
    bounds = scale_bounds(cut_points, rows)
    assert bounds is not None
    assert (bounds[0], bounds[-1], len(bounds)) == (0, rows, ranks + 1)


def test_cut_points_are_aligned_where_that_costs_nothing() -> None:
    cut_points = choose_cut_points(128, 8, [128, 64, 32])
    assert scale_bounds(cut_points, 32) == tuple(range(0, 33, 4))
    assert scale_bounds(cut_points, 4) is None


def test_balance_beats_alignment_where_it_matters() -> None:
    """64 rows on 5 ranks: multiples of 8 would give some rank 16 rows, and 13 are enough."""
    bounds = scale_bounds(choose_cut_points(64, 5, [64, 32, 16, 8]), 64)
    assert bounds is not None
    assert max(b - a for a, b in itertools.pairwise(bounds)) == 13


@pytest.mark.parametrize("edge", ["zeros", "circular", "reflect", "replicate"])
def test_edges_are_those_of_padding(edge: str) -> None:
    x = torch.randn(1, 1, 6, 2)
    mode = "constant" if edge == "zeros" else edge
    want = torch.nn.functional.pad(x, (0, 0, 2, 3), mode=mode)
    rows = [source_row(i, 6, edge) for i in range(-2, 9)]
    got = torch.cat([x[:, :, r : r + 1] if r >= 0 else torch.zeros(1, 1, 1, 2) for r in rows], 2)
    assert torch.equal(got, want)


def test_own_rows_first_is_a_rotation() -> None:
    parts = list(torch.arange(10.0).reshape(10, 1).split([3, 3, 4]))
    got = fetch_all(parts, 0, (0, 3, 6, 10), [0] * 3, [10] * 3, "zeros", "own_first", 0.0)
    assert [int(t[0]) for t in got] == [0, 3, 6]
    assert all(sorted(t.flatten().tolist()) == list(range(10)) for t in got)
