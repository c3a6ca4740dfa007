"""One family on N ranks: how exact it is, what is cut, what falls back, and how the steady phase converges."""

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
    "condition", "attached", "unconditional", "video", "autoencoders", "dit", "packages", "attentions", "blocks",
    "holdouts",
)  # fmt: skip
STEPS = 40  # steady calls on unchanging inputs, at most
Given = tuple[tuple[Any, ...], dict[str, Any]]  # what a call is given; copied for each, which may pop from a list


@dataclasses.dataclass(frozen=True)
class Measured:
    """Errors are relative: the norm of the difference over the norm. ``replicated`` operators work on maps with fewer
    rows than ranks; ``fallbacks`` are operators on gathered inputs, with reason and number."""

    family: str
    group: str
    size: tuple[int, int]
    ranks: int
    exact: float
    share: float
    required: float
    fallbacks: dict[str, int]
    replicated: int
    steady: float | None = None
    steps: int | None = None
    seconds: float = 0.0


def load_families() -> dict[str, Family]:
    """All families whose packages are installed."""
    for name in MODULES:
        importlib.import_module(f"tests.families.{name}")
    return {n: f for n, f in FAMILIES.items() if f.needs is None or importlib.util.find_spec(f.needs) is not None}


def measure(
    family: Family, size: tuple[int, int], ranks: Sequence[int], steady: Sequence[int] = ()
) -> Iterator[Measured]:
    """Capture once, then cut for each number of ranks. ``steady``: for which of them to run the displaced phase too."""
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
            len(program.plan.report["replicated"]),
        )
        if r in steady:
            result = dataclasses.replace(result, **_converge(program, given, want))
        yield dataclasses.replace(result, seconds=time.perf_counter() - started)
        started = time.perf_counter()


def _make(family: Family, size: tuple[int, int]) -> Call:
    """The same network every time: some draw their buffers."""
    torch.manual_seed(0)
    return family.make(*size)


def _run(program: Any, given: Given, phase: Any = "warmup") -> Any:
    args, kwargs = copy.deepcopy(given)
    return program.simulate(*args, phase=phase, **kwargs)


def _converge(program: Any, given: Given, want: Any) -> dict[str, Any]:
    """Start from other inputs, then call the steady phase with the right ones until it is where it stays."""

    def other(x: Any) -> Any:
        return x * 0.9 if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 2 else x

    program.reset()
    _run(program, pytree.tree_map(other, given))
    error, steps = float("inf"), 0
    while error > 1e-5 and steps < STEPS:
        error = error_of(_run(program, given, "steady"), want)
        steps += 1
    return {"steady": error, "steps": steps}
