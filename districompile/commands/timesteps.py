"""Timesteps for calls that are not part of an image: those a sampler could give, falling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from districompile.ir.plan import Plan, TensorSpec

_TRAINED = 1000  # steps of a training schedule, where nothing else is known
_FINE = 1024  # values of a range that is too short for whole numbers
_WHOLE = 32  # a range as long as this counts in whole numbers


def timestep_range(plan: Plan, config: Mapping[str, Any] | None = None) -> tuple[float, float]:
    """The smallest and the largest timestep that the model is known to take.

    These are those it was trained with, by its configuration; else from zero to the example's that it was converted
    with.
    """
    trained = (config or {}).get("num_train_timesteps")
    if isinstance(trained, int) and not isinstance(trained, bool) and trained > 0:
        return 0.0, float(trained - 1)
    example = plan.options.get("example_timestep")
    if isinstance(example, int | float) and example:
        return min(0.0, float(example)), max(0.0, float(example))
    return 0.0, float(_TRAINED - 1)


def falling_timesteps(spec: TensorSpec, low: float, high: float) -> list[Tensor]:
    """Distinct timesteps of the shape and dtype ``spec`` from ``high`` down to ``low``, on the CPU.

    Whole numbers, unless the dtype has fractions and the range is short.
    """
    if spec.dtype.is_floating_point and high - low < _WHOLE:
        values = torch.linspace(high, low, _FINE, dtype=torch.float64)
    else:
        values = torch.arange(int(high // 1), int(-(-low // 1)) - 1, -1, dtype=torch.float64)
    # Half precision does not tell all of them apart, and may round beyond the range
    rounded = values.to(spec.dtype)
    distinct = torch.unique_consecutive(rounded[(rounded.double() <= high) & (rounded.double() >= low)])
    return [value.expand(spec.shape).contiguous() for value in distinct]
