# SPDX-License-Identifier: Apache-2.0
"""Calls of a module with random inputs, and their times."""

from __future__ import annotations

import time
from typing import Any

import torch

from districompile.cli.timesteps import falling_timesteps, timestep_range
from districompile.ir.spec import TensorSpec
from districompile.plan.plan import ExecutionPlan
from districompile.runtime.module import DistributedModule

_WARM = 3  # calls before the clock runs, twice: the first step by step, the others while they are captured


class Calls:
    """Caller of a module with random inputs and falling timesteps, as in sampling."""

    def __init__(self, module: DistributedModule) -> None:
        self._module = module
        self.kwargs = random_call(module.plan, module.device)
        path = module.plan.timestep_path
        spec = next((module.plan.called_spec(i) for i in module.plan.inputs if i.path == path), None)
        self._path = None if spec is None else path
        self._values: list[Any] = [None]
        if spec is not None:
            self._values = falling_timesteps(spec, *timestep_range(module.plan, module.config))
        self.restart()

    def restart(self) -> None:
        """Start a new image with the next call."""
        self._number = 0
        self._module.reset()

    def call(self) -> Any:
        """Call the module with the next timestep."""
        self._continue()
        return self._call()

    def _call(self) -> Any:
        if self._path is not None:
            # On the host, so that the tracker of calls reads it without waiting for the device
            _put(self.kwargs, self._path, self._values[self._number])
            self._number += 1
        return self._module(**self.kwargs)

    def _continue(self) -> bool:
        """Start another image where no timestep is left. Return whether it did."""
        if self._path is None or self._number < len(self._values):
            return False
        self.restart()
        if self._module.phase not in (None, "exact") and len(self._values) > 1:
            with self._module.exact():  # other calls continue from an exact one
                self._call()
        return True

    def timed(self, count: int) -> list[float]:
        """Return the milliseconds between the ends of consecutive calls, ``count`` of them."""
        for _ in range(2 * _WARM):
            self.call()
        synchronize(self._module.device)
        marks = [mark(self._module.device)]
        pairs = []
        for _ in range(count):
            if self._continue():
                marks = [mark(self._module.device)]  # the first call of an image is not timed
            self._call()
            marks.append(mark(self._module.device))
            pairs.append((marks[-2], marks[-1]))
        synchronize(self._module.device)
        return [between(a, b) for a, b in pairs]


def mark(device: torch.device) -> Any:
    """Record a point in time: an event of the current stream on a GPU, the host's clock elsewhere."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def between(a: Any, b: Any) -> float:
    """Return the milliseconds from mark ``a`` to mark ``b``. The device must have finished both."""
    return (b - a) * 1e3 if isinstance(a, float) else float(a.elapsed_time(b))


def random_call(plan: ExecutionPlan, device: torch.device, seed: int = 0) -> dict[str, Any]:
    """Return keyword arguments for a plan: normally distributed floating-point inputs, and zeros for integers."""
    generator = torch.Generator().manual_seed(seed)
    kwargs: dict[str, Any] = {}
    for path, value in plan.constants.items():
        if value is not None and path in plan.signature:
            kwargs[path] = value
    for spec in plan.inputs:
        _put(kwargs, spec.path, _random(plan.called_spec(spec), generator).to(device))
    listed: dict[str, Any] = _listed(kwargs)
    return listed


def _random(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    if not spec.dtype.is_floating_point:
        return torch.zeros(spec.shape, dtype=spec.dtype)
    return torch.randn(spec.shape, generator=generator).to(spec.dtype)


def _put(kwargs: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    at: Any = kwargs
    for name in parents:
        at = at[int(name)] if isinstance(at, list) else at.setdefault(name, {})
    if isinstance(at, list):
        at[int(last)] = value
    else:
        at[last] = value


def _listed(x: Any) -> Any:
    """Turn dictionaries whose keys count from 0 into lists."""
    if not isinstance(x, dict):
        return x
    if x and all(k == str(i) for i, k in enumerate(x)):
        return [_listed(v) for v in x.values()]
    return {k: _listed(v) for k, v in x.items()}


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
