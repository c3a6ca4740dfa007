# SPDX-License-Identifier: Apache-2.0
"""Falling timesteps, as of a sampler, for calls that do not belong to an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from districompile.ir.spec import TensorSpec
from districompile.plan.plan import ExecutionPlan

_TRAINED = 1000  # steps of a training schedule, where nothing else is known
_FINE = 1024  # values of a range that is too short for whole numbers
_WHOLE = 32  # a range as long as this counts in whole numbers


def timestep_range(plan: ExecutionPlan, config: Mapping[str, Any] | None = None) -> tuple[float, float]:
    """Return the smallest and the largest timestep that the model accepts.

    The configuration gives the range of training. Without it, the range is from zero to the timestep of the example
    that the model was converted with.
    """
    trained = (config or {}).get("num_train_timesteps")
    if isinstance(trained, int) and not isinstance(trained, bool) and trained > 0:
        return 0.0, float(trained - 1)
    example = plan.options.example_timestep
    if example:
        return min(0.0, float(example)), max(0.0, float(example))
    return 0.0, float(_TRAINED - 1)


def falling_timesteps(spec: TensorSpec, low: float, high: float) -> list[Tensor]:
    """Return distinct timesteps with the shape and dtype of ``spec``, from ``high`` down to ``low``, on the CPU.

    They are whole numbers, unless the dtype has fractions and the range is short.
    """
    if spec.dtype.is_floating_point and high - low < _WHOLE:
        values = torch.linspace(high, low, _FINE, dtype=torch.float64)
    else:
        values = torch.arange(int(high // 1), int(-(-low // 1)) - 1, -1, dtype=torch.float64)
    # Half precision merges some of them, and may round beyond the range
    rounded = values.to(spec.dtype)
    distinct = torch.unique_consecutive(rounded[(rounded.double() <= high) & (rounded.double() >= low)])
    return [value.expand(spec.shape).contiguous() for value in distinct]
