"""Every rule has samples, and cut -> local operator -> join equals the operator, at random uneven cut points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from districompile.sharding.propagate import Propagated
from districompile.sharding.registry import Rule, Sample, all_rules
from districompile.testing import RuleCase

# Operators whose whole point is their dtype, or that return their argument: nothing to sample
WITHOUT_SAMPLES = {"identity", "factory", "pointwise"}


def cases() -> list[Any]:
    found = []
    for rule in all_rules():
        for i, _ in enumerate(rule.samples() if rule.samples else ()):
            found.append(pytest.param(rule, i, id=f"{rule.op}-{i}"))
    return found


def run_cut(op: Any, sample: Sample, cut_points: Sequence[float]) -> tuple[Propagated, list[Tensor], list[Tensor]]:
    """The propagated graph, what the ranks compute (joined), and what the operator computes."""
    case = RuleCase(op, sample)
    return *case.cut(cut_points), case.want


@pytest.mark.parametrize("rule", [pytest.param(r, id=str(r.op)) for r in all_rules()])
def test_every_rule_has_samples(rule: Rule) -> None:
    assert rule.function.__name__ in WITHOUT_SAMPLES or (rule.samples and list(rule.samples()))


@st.composite
def cut_points(draw: st.DrawFn) -> tuple[float, ...]:
    ranks = draw(st.integers(1, 4))
    shares = draw(st.lists(st.integers(2, 5), min_size=ranks, max_size=ranks))
    total = sum(shares)
    return tuple(sum(shares[:i]) / total for i in range(ranks + 1))


@pytest.mark.parametrize(("rule", "index"), cases())
def test_cut_equals_whole(rule: Rule, index: int, fresh_seed: int | None) -> None:
    torch.manual_seed(fresh_seed or 0)
    sample = list(rule.samples())[index]  # type: ignore[misc]
    case = RuleCase(torch.ops.aten.mul.Tensor if rule.op == "pointwise" else rule.op, sample)

    @settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(cut_points=cut_points())
    def check(cut_points: tuple[float, ...]) -> None:
        case.check(cut_points)

    (check if fresh_seed is None else seed(fresh_seed)(check))()
