# SPDX-License-Identifier: Apache-2.0
"""Record calls that a pipeline makes of its network: what a conversion in 8 bits measures its layers by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from districompile.frontend.call_tree import flatten_call
from districompile.frontend.capture import bind_call
from districompile.ir.spec import names_timestep
from districompile.progress import Task
from districompile.quality.cases import Case
from districompile.quality.draw import Setting, draw

Call = tuple[tuple[Any, ...], dict[str, Any]]

_PARTS = (1.0, 0.6, 0.3, 0.1)  # of the largest timestep of a call without a pipeline


def recorded_calls(
    pipe: Any, module: torch.nn.Module, cases: Sequence[Case], setting: Setting, most: int, task: Task
) -> list[Call]:
    """Draw ``cases`` with the original, and return at most ``most`` of its calls, from all parts of the sampling."""
    calls: list[Call] = []

    def record(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(
            pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, torch.Tensor) else v, (args, kwargs))
        )

    hook = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        draw(pipe, module, cases, setting, task)
    finally:
        hook.remove()
    count = min(most, len(calls))
    return [calls[(2 * i + 1) * len(calls) // (2 * count)] for i in range(count)]


def like_example(module: torch.nn.Module, example: Call, calls: Sequence[Call]) -> list[Call]:
    """Return the calls whose tensors have the names, shapes and dtypes of those of ``example``."""
    wanted = _specs(module, *example)
    return [call for call in calls if _specs(module, *call) == wanted]


def _specs(module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    leaves = flatten_call(*bind_call(module, args, dict(kwargs)))
    return {p: (tuple(v.shape), v.dtype) for p, v in leaves.items() if isinstance(v, torch.Tensor)}


def at_several_times(module: torch.nn.Module, example: Call, timestep: str | None = None) -> list[Call]:
    """Return ``example`` at several timesteps, from its own to a tenth of it; the example alone where it has none.

    ``timestep`` is the input that is the time of a step; by default one with a usual name.

    The inputs of an example are random, of unit variance. So are those of a sampler at any time, but for their content.
    """
    names, args, kwargs = bind_call(module, example[0], dict(example[1]), timestep)
    leaves = flatten_call(names, args, kwargs)
    timed = [p for p, v in leaves.items() if names_timestep(p, timestep) and isinstance(v, torch.Tensor)]
    if not timed:
        return [example]
    times = {id(leaves[p]): leaves[p] for p in timed}

    def at(part: float) -> Call:
        return pytree.tree_map(lambda v: (v * part).to(v.dtype) if id(v) in times else v, (tuple(args), dict(kwargs)))  # type: ignore[no-any-return]

    return [at(part) for part in _PARTS]
