"""Every rule has samples, and cut -> local operator -> join equals the operator, at random uneven cut points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from districompile.cutter import Value
from districompile.ir.interpret import interpret, join
from districompile.propagate import Propagated, propagate
from districompile.registry import Rule, Sample, all_rules

# Operators whose whole point is their dtype, or that return their argument: nothing to sample
WITHOUT_SAMPLES = {"identity", "factory", "pointwise"}


def cases() -> list[Any]:
    found = []
    for rule in all_rules():
        for i, _ in enumerate(rule.samples() if rule.samples else ()):
            found.append(pytest.param(rule, i, id=f"{rule.op}-{i}"))
    return found


def graph_of(op: Any, sample: Sample, mode: FakeTensorMode) -> tuple[fx.Graph, dict[str, Tensor], dict[str, int]]:
    """A graph of one operator, its inputs by name, and the cut dim of those that are cut."""
    graph = fx.Graph()
    inputs: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def leaf(x: Any) -> Any:
        if isinstance(x, Tensor):
            node = graph.placeholder(f"x{len(inputs)}")
            node.meta["val"] = mode.from_tensor(x)
            cut = sample.rows[len(inputs)]
            if cut is not None:
                rows[node.name] = cut
            inputs[node.name] = x
            return node
        return [leaf(v) for v in x] if isinstance(x, list) else x

    args = tuple(leaf(a) for a in sample.args)
    node = graph.call_function(op, args, sample.kwargs)
    fake_args = fx.map_arg(args, lambda n: n.meta["val"])
    with mode:
        node.meta["val"] = op(*fake_args, **sample.kwargs)
    many = isinstance(node.meta["val"], list | tuple)
    outputs = []
    for i in used_results(node.meta["val"], sample):
        item = graph.call_function(__import__("operator").getitem, (node, i)) if many else node
        item.meta["val"] = node.meta["val"][i] if many else node.meta["val"]
        outputs.append(item)
    graph.output(tuple(outputs))
    return graph, inputs, rows


def used_results(result: Any, sample: Sample) -> Sequence[int]:
    """Which results of an operator are compared: those that the sample says are used."""
    return sample.used or range(len(result) if isinstance(result, list | tuple) else 1)


class Case:
    """An operator on a sample: its graph, made once for all places it is cut at, and what the operator computes."""

    def __init__(self, op: Any, sample: Sample) -> None:
        self.mode = FakeTensorMode()
        self.graph, self.inputs, self.rows = graph_of(op, sample, self.mode)
        self.annotation = propagate(self.graph, self.rows, (0.0, 1.0), self.mode).values
        whole = op(*sample.args, **sample.kwargs)
        many = isinstance(whole, list | tuple)
        self.want: list[Tensor] = [whole[i] for i in used_results(whole, sample)] if many else [whole]

    def cut(self, fractions: Sequence[float]) -> tuple[Propagated, list[Tensor]]:
        """The propagated graph, and what the ranks compute (joined)."""
        found = propagate(self.graph, self.rows, fractions, self.mode, self.annotation)
        seen: dict[str, list[Any]] = {}
        ranks = len(fractions) - 1
        interpret(found.graph, self.inputs, self.inputs.__getitem__, ranks, lambda n, v: seen.__setitem__(n.name, v))
        got = []
        for node in self.graph.output_node().args[0]:  # type: ignore[union-attr]
            value = found.values[node.name]
            assert isinstance(value, Value)
            got.append(join(seen[value.node.name], value.layout))
        return found, got


def run_cut(op: Any, sample: Sample, fractions: Sequence[float]) -> tuple[Propagated, list[Tensor], list[Tensor]]:
    """The propagated graph, what the ranks compute (joined), and what the operator computes."""
    case = Case(op, sample)
    return *case.cut(fractions), case.want


def assert_close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if want.is_floating_point():
        scale = want.double().norm().clamp_min(1e-12)
        assert float((got.double() - want.double()).norm() / scale) <= 1e-5
    else:
        assert torch.equal(got, want)


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
def test_cut_equals_whole(rule: Rule, index: int) -> None:
    torch.manual_seed(0)
    sample = list(rule.samples())[index]  # type: ignore[misc]
    case = Case(torch.ops.aten.mul.Tensor if rule.op == "pointwise" else rule.op, sample)

    @settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(fractions=cut_points())
    def check(fractions: tuple[float, ...]) -> None:
        found, got = case.cut(fractions)
        for g, w in zip(got, case.want, strict=True):
            assert_close(g, w)
        # A sample shows what the rule can do: falling back would show nothing
        assert not [f for f in found.fallbacks if "too few" not in f.reason], found.fallbacks

    check()
