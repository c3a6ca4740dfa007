"""The inductor backend on the CPU: every case of the other backends, in one package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from districompile.backends.eager import EagerBackend
from districompile.backends.inductor import InductorBackend
from tests.helpers_segments import error, make_segment, run_segment
from tests.test_backends import CASES, COMPOSITES

_REASON = InductorBackend("cpu").cannot_build()
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


def test_agrees_with_eager(tmp_path: Path) -> None:
    torch.manual_seed(0)
    functions: list[tuple[Any, list[str], list[str]]] = []
    inputs: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for i, (function, x, w) in enumerate([*CASES.values(), *((f, x, []) for n, (f, x) in COMPOSITES.items())]):
        names = [f"x{i}.{j}" for j in range(len(x))], [f"w{i}.{j}" for j in range(len(w))]
        inputs |= zip(names[0], x, strict=True)
        weights |= zip(names[1], w, strict=True)
        functions.append((function, *names))

    def everything(*args: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip([*inputs, *weights], args, strict=True))
        out: list[Tensor] = []
        for function, x, w in functions:
            result = function(*(named[n] for n in (*x, *w)))
            out += list(result) if isinstance(result, tuple | list) else [result]
        return tuple(out)

    segment = make_segment(everything, inputs, weights)
    got = run_segment(InductorBackend("cpu"), segment, inputs, weights, tmp_path)
    want = run_segment(EagerBackend(), segment, inputs, weights, tmp_path)
    assert max(error(got[n], want[n]) for n in want) < 1e-5
