"""Measure a family on N ranks: exactness, the sharded part, fallbacks, and convergence of the displaced phase."""

from __future__ import annotations

import collections
import copy
import dataclasses
import importlib
import importlib.util
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import districompile as dc
from tests.families.base import FAMILIES, Call, Family, error_of

MODULES = (
    "condition", "attached", "unconditional", "video", "autoencoders", "dit", "joint", "monai", "science", "lucid",
    "attentions", "blocks", "holdouts",
)  # fmt: skip
STEPS = 40  # displaced calls with constant inputs, at most
Given = tuple[
    tuple[Any, ...], dict[str, Any]
]  # args and kwargs; copied for each call, as a network may pop from a list


@dataclasses.dataclass(frozen=True)
class Measured:
    """The results of one family on one number of ranks.

    Errors are relative: the norm of the difference over the norm. ``share`` is the part of the FLOPs that is divided
    among the ranks, and ``required`` its lower limit. ``replicated`` counts operators on maps with fewer rows than
    ranks. ``fallbacks`` counts operators that are computed on gathered inputs, by operator and reason. ``steps`` is how
    many displaced calls were made.
    """

    family: str
    group: str
    size: tuple[int, int]
    ranks: int
    exact: float
    share: float
    required: float
    fallbacks: dict[str, int]
    replicated: int
    displaced: float | None = None
    steps: int | None = None
    seconds: float = 0.0


def load_families() -> dict[str, Family]:
    """Return all families whose packages are installed, by name."""
    for name in MODULES:
        importlib.import_module(f"tests.families.{name}")
    return {n: f for n, f in FAMILIES.items() if f.needs is None or importlib.util.find_spec(f.needs) is not None}


def measure(
    family: Family, size: tuple[int, int], ranks: Sequence[int], displaced: Sequence[int] = ()
) -> Iterator[Measured]:
    """Capture a family once, then convert it for each number of ranks and yield the results.

    ``displaced`` lists the numbers of ranks for which the displaced phase runs, too.
    """
    started = time.perf_counter()
    call = _make(family, size)
    with torch.no_grad():
        want = call.module(*call.args, **call.kwargs)
    call = _make(family, size)  # a forward may change the network, or pop from a list that it was given
    given = copy.deepcopy((call.args, call.kwargs))
    captured = dc.capture(call.module, call.args, call.kwargs)
    for r in ranks:
        program = dc.convert(captured, ranks=r, rows=call.rows)
        exact = error_of(_run(program, given), want)
        report = program.report()
        reasons = collections.Counter(f"{f['op']}: {f['reason']}" for f in report.fallbacks())
        result = Measured(
            family.name,
            family.group,
            size,
            r,
            exact,
            report.cut_share() or 0.0,
            family.share,
            dict(reasons),
            len(program.plan.report.replicated),
        )
        if r in displaced:
            result = dataclasses.replace(result, **_converge(program, given, want))
        yield dataclasses.replace(result, seconds=time.perf_counter() - started)
        started = time.perf_counter()


def _make(family: Family, size: tuple[int, int]) -> Call:
    """Build the same network at every call: some draw random buffers."""
    torch.manual_seed(0)
    return family.make(*size)


def _run(program: Any, given: Given, phase: Any = "exact") -> Any:
    args, kwargs = copy.deepcopy(given)
    return program.simulate(*args, phase=phase, **kwargs)


def _converge(program: Any, given: Given, want: Any) -> dict[str, Any]:
    """Run an exact call with other inputs, then displaced calls until the output converges, at most ``STEPS``."""

    def other(x: Any) -> Any:
        return x * 0.9 if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 2 else x

    program.reset()
    _run(program, pytree.tree_map(other, given))
    error, steps = float("inf"), 0
    while error > 1e-5 and steps < STEPS:
        error = error_of(_run(program, given, "displaced"), want)
        steps += 1
    return {"displaced": error, "steps": steps}
