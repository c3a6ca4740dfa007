# SPDX-License-Identifier: Apache-2.0
"""Compute group norm as the paper's code does, as a baseline. No bundle for users computes this.

That code sends the mean of ``x`` and of ``x`` squared in the network's own type. It takes the variance as their
difference, and multiplies it by n / (n - 1) with the n of one patch (mit-han-lab/distrifuser,
modules/pp/groupnorm.py). In half precision the difference cancels where a mean is large beside its spread, and a
picture may turn black.

The graph is that of ``corrected_async``. The backend of this module replaces the arithmetic of four operators.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from districompile.backends.eager import EagerBackend, EagerEngine
from districompile.bundle.weights import WeightFile
from districompile.ir.ops import ops

_LIB: Any = torch.library.Library("districompile_reference", "DEF")  # type: ignore[no-untyped-call]
_LIB.define("moments(Tensor x, int groups) -> Tensor")
_LIB.define("merge_moments(Tensor parts, float[] counts) -> Tensor")
_LIB.define("correct_moments(Tensor merged, Tensor stale, Tensor fresh) -> Tensor")
_LIB.define("normalize(Tensor x, Tensor stats, int groups, Tensor? weight, Tensor? bias, float eps) -> Tensor")


def moments(x: Tensor, groups: int) -> Tensor:
    """Compute E[x] and E[x^2] of this patch in the type of ``x``, (1, 2, B, G), in float32 or wider."""
    y = x.reshape(x.shape[0], groups, -1)
    both = torch.stack([y.mean(-1), (y**2).mean(-1)]).unsqueeze(0)
    return both.to(torch.promote_types(x.dtype, torch.float32))


def merge_moments(parts: Tensor, counts: list[float]) -> Tensor:
    """Average over the ranks; their heights are ignored."""
    return parts.mean(0)


def correct_moments(merged: Tensor, stale: Tensor, fresh: Tensor) -> Tensor:
    """Add this rank's whole change to the stale average. A negative variance is replaced by this rank's own."""
    full = merged + (fresh - stale)[0]
    own = fresh[0, 1] - fresh[0, 0] ** 2
    square = torch.where(full[1] - full[0] ** 2 < 0, own + full[0] ** 2, full[1])
    return torch.stack([full[0], square])


def normalize(x: Tensor, stats: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalize by the averages, in the type of ``x``. The variance is corrected for the count of one patch."""
    y = x.reshape(x.shape[0], groups, -1)
    mean, square = stats[0].to(x.dtype).unsqueeze(-1), stats[1].to(x.dtype).unsqueeze(-1)
    count = math.prod(y.shape[2:])
    var = (square - mean**2) * (count / max(1, count - 1))
    y = ((y - mean) / (var + eps).sqrt()).reshape(x.shape)
    shape = [1, x.shape[1]] + [1] * (x.ndim - 2)
    if weight is not None:
        y = y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


for _function in (moments, merge_moments, correct_moments, normalize):
    _LIB.impl(_function.__name__, _function, "CompositeImplicitAutograd")
_reference = torch.ops.districompile_reference
_INSTEAD: dict[Any, Any] = {
    ops.moments.default: _reference.moments.default,
    ops.merge_moments.default: _reference.merge_moments.default,
    ops.correct_moments.default: _reference.correct_moments.default,
    ops.normalize.default: _reference.normalize.default,
}


class ReferenceBackend(EagerBackend):
    """Run engines operator by operator, with the formulas of this module.

    Programs must be converted with ``groupnorm="corrected_async"``. The formulas are replaced when an engine is loaded.
    """

    def load(self, path: Path, segment: tuple[str, ...], weights: WeightFile, device: torch.device) -> EagerEngine:
        engine = super().load(path, segment, weights, device)
        for node in engine.module.graph.nodes:
            if node.op == "call_function":
                node.target = _INSTEAD.get(node.target, node.target)
        engine.module.recompile()
        return engine
