# SPDX-License-Identifier: Apache-2.0
"""Draw cut points and sizes for the property tests of rules, and compare a rule's result with its operator's."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from districompile.sharding.registry import Sample
from districompile.testing import assert_close
from tests.passes.test_rules import run_cut

MANY = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FEW = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def places(draw: st.DrawFn) -> tuple[float, ...]:
    """Cut points, even or not, of 1 to 5 ranks."""
    ranks = draw(st.integers(1, 5))
    shares = draw(st.lists(st.integers(1, 4), min_size=ranks, max_size=ranks))
    return (0.0, *(s / sum(shares) for s in itertools.accumulate(shares)))


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def check(op: Any, sample: Sample, cut_points: tuple[float, ...], may_fall_back: tuple[str, ...] = ()) -> None:
    """The rule's result equals the operator's; it may refuse only for the reasons given, or for too few rows."""
    found, got, want = run_cut(op, sample, cut_points)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w)
    for f in found.fallbacks:
        assert any(reason in f.reason for reason in ("too few", *may_fall_back)), f


@st.composite
def spatial(draw: st.DrawFn) -> tuple[int, list[int], int]:
    """Number of spatial dims, their sizes, and which of them is cut."""
    n = draw(st.integers(1, 3))
    at = draw(st.integers(0, n - 1))
    sizes = [draw(st.integers(8, 19)) if i == at else draw(st.integers(4, 6)) for i in range(n)]
    return n, sizes, at
