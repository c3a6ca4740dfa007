# SPDX-License-Identifier: Apache-2.0
"""Long phases are divided, exact ones only where they are long and wait for nothing."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import districompile as dc
from districompile.plan import cuts
from districompile.plan.cuts import Cuts, divided_like

DEPTH = 20


class Deep(nn.Module):
    """Layers of one row each, which need no exchange; with ``rounds`` of these, a convolution that needs one."""

    def __init__(self, rounds: int = 1) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(rounds))
        self.points = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(DEPTH))

    def forward(self, sample: Tensor) -> Tensor:
        """Return a map of the same size."""
        for first in self.first:
            sample = first(sample)
            for layer in self.points:
                upper, lower = layer(sample).relu().chunk(2, 1)
                sample = torch.cat([upper + 0.1, lower], 1)
        return sample


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuts, "_LONG", 10)


def converted(rounds: int, ranks: int, segments: int) -> tuple[Any, Any, Tensor, Tensor]:
    torch.manual_seed(0)
    module, sample = Deep(rounds).eval(), torch.randn(1, 4, 12, 5)
    program = dc.convert(module, (sample,), ranks=ranks, segments=segments, phases="exact")
    with torch.no_grad():
        return program, program.plan.phases["exact"], program.simulate(sample), module(sample)


@pytest.mark.parametrize(("segments", "ranks"), [(1, 1), (4, 1), (7, 1), (4, 2), (4, 3)])
def test_a_phase_without_waits_is_divided(short: None, segments: int, ranks: int) -> None:
    _, exact, got, want = converted(1, ranks, segments)
    # Each part has its share of the work at least; what is before the one exchange is short
    assert 0.7 * segments <= len(exact.segments) <= segments + (ranks > 1)
    assert torch.allclose(got, want, atol=1e-6)
    values = [v for s in exact.segments.values() for v in s.outputs]
    assert len(values) <= 3 * segments + ranks  # between parts only what the next one reads


def test_a_phase_of_many_waits_stays_as_it_is(short: None) -> None:
    _, exact, got, want = converted(6, 2, 4)
    _, undivided, *_ = converted(6, 2, 1)
    assert len(exact.segments) == len(undivided.segments) and torch.allclose(got, want, atol=1e-6)


def test_short_phases_are_not_divided() -> None:
    assert len(converted(1, 1, 8)[1].segments) == 1


def test_no_tuple_leaves_a_segment() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    pair = graph.call_function(torch.ops.aten.split.Tensor, (x, 1))
    work = graph.call_function(torch.ops.aten.relu.default, (x,))
    first = graph.call_function(torch.ops.aten.relu.default, (x,))
    late = graph.call_function(types.SimpleNamespace, (pair,))
    for node in (x, work, first, late):
        node.meta["local"] = [torch.empty(2, device="meta")]
    pair.meta["local"] = [(torch.empty(1, device="meta"),) * 2]
    flops = {pair: 0.0, work: 5.0, first: 5.0, late: 5.0}
    for nodes, expected in (([pair, work], False), ([work], True)):
        chosen = Cuts("displaced", flops, (), 3)
        chosen._last = None
        assert chosen.after(work, nodes, 5.0, 0, False) is expected


class Conditioned(nn.Module):
    """Layers of one row that a text and a timestep change."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.time = nn.Linear(3, 8), nn.Linear(1, 4)
        self.points = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(DEPTH))

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Return a map of the same size."""
        shift, scale = self.text(encoder_hidden_states).mean(1)[:, :, None, None].chunk(2, 1)
        sample = sample + self.time(timestep.reshape(1, 1).to(sample.dtype))[:, :, None, None]
        for layer in self.points:
            sample = layer(sample).relu() * scale + shift
        return sample


def test_the_phases_of_one_rank_share_their_segments() -> None:
    torch.manual_seed(0)
    inputs = {
        "sample": torch.randn(1, 4, 6, 5), "timestep": torch.tensor(7.0), "encoder_hidden_states": torch.randn(1, 2, 3)
    }  # fmt: skip
    module = Conditioned().eval()
    program = dc.convert(module, kwargs=inputs, ranks=1, segments=4, optimise="cache-conditioning")
    exact, displaced = (list(program.plan.phases[p].segments.values()) for p in ("exact", "displaced"))
    assert len(displaced) == 4 and len(exact) == 5  # the first makes what is kept of the text
    for a, b in zip(exact[1:], displaced, strict=True):
        assert a.inputs == tuple(name.removesuffix(".last_step") for name in b.inputs)
        assert (a.outputs, a.weights) == (b.outputs, b.weights)
    with torch.no_grad():
        want = module(**inputs)
    for phase in ("exact", "displaced"):
        assert torch.allclose(program.simulate(**inputs, phase=phase), want, atol=1e-6)  # type: ignore[arg-type]


def test_phases_that_cannot_be_divided_alike() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(torch.ops.aten.relu.default, (x,))
    other = graph.call_function(torch.ops.aten.neg.default, (first,))
    last = graph.call_function(torch.ops.aten.add.Tensor, (first, other))
    nodes = [first, other, last]
    for node in (x, *nodes):
        node.meta["local"] = [torch.empty(2, device="meta")]
    assert divided_like(nodes, [{"relu_default"}, {"neg_default", "add_tensor"}]) == [[first], [other, last]]
    assert divided_like(nodes, [{"relu_default", "add_tensor"}]) is None  # what the other phase lacks reads its values
