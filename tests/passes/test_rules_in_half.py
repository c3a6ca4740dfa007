"""Every rule's samples in half precision: the error of the ranks is of the order of the operator's own.

Both are compared with the operator in float32 on the same (rounded) arguments. The ranks may be as wrong as the
operator itself in half precision, and a few roundings of the result's dtype more: they sum in another order, and round
what they send.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from districompile.sharding.registry import Rule, Sample, all_rules
from districompile.testing import RuleCase, used_results

CUT_POINTS = (0.0, 0.3, 0.6, 1.0)
ROUNDINGS = 4  # of partial results, of what is sent, of the sum, and of the result
# Statistics besides the result: the rule gives what a GPU does, a CPU rounds them
STATISTICS = {"aten._native_batch_norm_legit.no_stats": torch.float32}
RULES = [r for r in all_rules() if r.samples is not None]


def mapped(x: Any, f: Any) -> Any:
    if isinstance(x, Tensor):
        return f(x)
    return type(x)(mapped(v, f) for v in x) if isinstance(x, list | tuple) else x


def cast(sample: Sample, dtype: torch.dtype, keep: torch.dtype | None = None) -> Sample:
    """The sample with its float32 tensors in ``dtype``; with ``keep`` rounded to that first."""

    def one(x: Tensor) -> Tensor:
        return x.to(keep or dtype).to(dtype) if x.dtype == torch.float32 else x

    return Sample(mapped(sample.args, one), sample.rows, sample.kwargs, sample.used)


def results(op: Any, sample: Sample) -> list[Tensor]:
    found = op(*sample.args, **sample.kwargs)
    many = isinstance(found, list | tuple)
    return [found[i] for i in used_results(found, sample)] if many else [found]


def norm(x: Tensor) -> float:
    return float(x.double().norm())


@functools.cache
def supported(op: Any, dtype: torch.dtype) -> bool:
    """Whether PyTorch computes the operator in a dtype on a CPU at all: its first sample shows."""
    sample = next(iter(next(r for r in RULES if r.op == op).samples()))  # type: ignore[misc]
    try:
        results(op, cast(sample, dtype))
    except (NotImplementedError, RuntimeError, ValueError) as e:
        known = ("not implemented for", "Unsupported dtype", "only supported for", "Invalid scaling configuration")
        if any(text in str(e) for text in known):
            return False
        raise
    return True


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("rule", [pytest.param(r, id=str(r.op)) for r in RULES])
def test_half_precision(rule: Rule, dtype: torch.dtype) -> None:
    op = torch.ops.aten.mul.Tensor if rule.op == "pointwise" else rule.op
    if not supported(op, dtype):
        pytest.skip(f"PyTorch has no {rule.op} in {dtype} on a CPU")
    torch.manual_seed(0)
    for i, sample in enumerate(rule.samples()):  # type: ignore[misc]
        half = cast(sample, dtype)
        case = RuleCase(op, half)
        _, got = case.cut(CUT_POINTS)
        exact = results(op, cast(sample, torch.float32, keep=dtype))
        for g, own, want in zip(got, case.want, exact, strict=True):
            assert g.dtype in (own.dtype, STATISTICS.get(str(op))) and g.shape == own.shape
            if not want.is_floating_point() or not own.is_floating_point():
                continue  # indices and comparisons may fall on the other side of a rounding
            eps = torch.finfo(own.dtype).eps if own.dtype in (torch.float16, torch.bfloat16) else 1e-5
            finite = torch.isfinite(own) & torch.isfinite(want.to(own.dtype))
            error, own_error = norm((g.double() - want)[finite]), norm((own.double() - want)[finite])
            assert torch.equal(torch.isfinite(g), torch.isfinite(own)), (i, "another value is infinite")
            assert error <= own_error + ROUNDINGS * eps * norm(want[finite]) + 1e-12, (i, error, own_error)
