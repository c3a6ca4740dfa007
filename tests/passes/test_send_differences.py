# SPDX-License-Identifier: Apache-2.0
"""Differences of 8 bits: both sides hold the same, errors do not add up, exact steps stay exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers_net import Net
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import relative_error
from torch import Tensor

import districompile as dc
from districompile.backends.eager import EagerBackend
from districompile.errors import BackendError
from districompile.ir.differences import add_difference, encode_difference

FEW = settings(max_examples=25, deadline=None)


@FEW
@given(
    rows=st.integers(1, 4), row=st.sampled_from([1, 5, 64, 130]), moved=st.floats(1e-6, 1e4), seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)  # fmt: skip
def test_the_error_stays_bounded_over_100_steps(
    rows: int, row: int, moved: float, seed: int, dtype: torch.dtype
) -> None:
    """At each step it is at most a 127th of the largest change and error before, so that it never grows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, row, generator=generator, dtype=torch.float64)
    scale = min(moved, 100.0) if dtype == torch.float16 else moved
    sent = x.to(dtype)
    for _ in range(100):
        x = (x + scale * (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1)).to(dtype).double()
        largest = (x - sent.double()).abs().max()
        code = encode_difference(x.to(dtype), sent)
        assert code.dtype == torch.uint8 and code.shape == (rows, row + -(-row // 64))
        sent = add_difference(sent, code)
        error = (x - sent.double()).abs().max()
        rounding = torch.finfo(dtype).eps * max(1.0, float(x.abs().max())) + 1e-30
        assert error <= largest / 127 + rounding
        assert error <= scale / 100 + 2 * rounding


@FEW
@given(value=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 127.0, 128.0, 6e4, 1e30]), sign=st.sampled_from([-1.0, 1.0]))
def test_one_difference(value: float, sign: float) -> None:
    x, zero = torch.full((2, 3), sign * value), torch.zeros(2, 3)
    got = add_difference(zero, encode_difference(x, zero))
    assert (got - x).abs().max() <= value / 127
    assert torch.equal(add_difference(x, torch.zeros(2, 4, dtype=torch.uint8)), x)  # bytes of zeros are no difference


def test_what_is_not_finite_stays_visible() -> None:
    zero = torch.zeros(1, 3)
    assert add_difference(zero, encode_difference(torch.full((1, 3), torch.inf), zero)).abs().max() > 1e30


class Inside(EagerBackend):
    """A backend whose engines could hold collectives."""

    collectives_inside = None


@pytest.fixture(scope="module")
def made() -> tuple[Net, dict[str, Tensor], dc.Program, dc.Program]:
    torch.manual_seed(0)
    net = Net().eval()
    kwargs = {"sample": torch.randn(1, 4, 24, 8), "timestep": torch.tensor(9.0)}
    captured = dc.capture(net, kwargs=kwargs)
    options: dict[str, Any] = {"ranks": 3, "groupnorm": "stale", "optimise": "all"}
    plain = dc.convert(captured, **options)
    return net, kwargs, plain, dc.convert(captured, **options, transfer_bits=8, reuse="deep=2")


def test_differences_settle_and_exact_steps_reset_both_sides(
    made: tuple[Net, dict[str, Tensor], dc.Program, dc.Program],
) -> None:
    """Both sides have to hold the same bits: else a difference of nothing would keep their distance."""
    net, kwargs, plain, program = made
    other = {**kwargs, "sample": kwargs["sample"] + torch.randn(kwargs["sample"].shape)}
    with torch.no_grad():
        want, before = net(**kwargs), net(**other)
    assert torch.equal(program.simulate(**other), plain.simulate(**other))
    errors = [
        [relative_error(p.simulate(phase="displaced", **kwargs), want) for p in (plain, program)] for _ in range(12)
    ]
    assert errors[0][0] > 1e-2 and all(b <= 1.1 * a + 1e-5 for a, b in errors), errors
    assert max(errors[-1]) <= 1e-5, errors
    assert relative_error(program.simulate(phase="reused", **kwargs), want) <= 1e-5
    assert relative_error(program.simulate(**other), before) <= 1e-5  # exact: nothing of the differences is left
    for phase in ("displaced", "reused", "displaced"):
        assert relative_error(program.simulate(phase=phase, **other), before) <= 1e-5  # type: ignore[arg-type]


def test_fewer_bytes(made: tuple[Net, dict[str, Tensor], dc.Program, dc.Program]) -> None:
    _, _, plain, program = made
    report, full = program.report(), plain.report()
    assert report.sent("exact") == full.sent("exact")
    assert report.sent_in_full("displaced") == full.sent("displaced")
    sent, by_name = program.plan.report.differences, program.plan.collectives
    for rank in range(3):
        assert sum(by_name[n].sent_bytes(rank) for n in sent) < 0.27 * sum(
            by_name[n].sent_bytes(rank) for n in sent.values()
        )
    assert {program.plan.collectives[n].purpose for n in sent} >= {"conv", "attention"}
    norms = [c for c in program.plan.collectives.values() if c.purpose == "norm"]
    assert norms and all(c.name not in sent and c.displaced for c in norms)
    assert "differences of 8 bits: a displaced step sends" in str(report)


def test_refusals(made: tuple[Net, dict[str, Tensor], dc.Program, dc.Program]) -> None:
    net, kwargs, _, program = made
    with pytest.raises(dc.ConvertError, match="transfer_bits must be 8, or left out"):
        dc.convert(net, kwargs=kwargs, ranks=2, transfer_bits=4)
    with pytest.raises(BackendError, match="leave out transfer_bits"):
        program.layout(Inside(), "inside")
