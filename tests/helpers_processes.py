"""The work of a rank, in a module of its own, so that a starting process does not import the networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import districompile as dc


def worker(bundle: str, inputs: str, steps: int) -> list[bytes]:
    """Run one rank: an exact call, then the calls of one image with falling timesteps. Return the outputs' bytes."""
    kwargs = torch.load(inputs)
    unet = dc.load(bundle)
    outputs: list[Tensor] = []
    with unet.exact():
        outputs.append(_first(unet(**kwargs)))
    unet.reset()
    for i in range(steps):
        outputs.append(_first(unet(**call(kwargs, i))))
    unet.close()
    return [t.numpy().tobytes() for t in outputs]


def call(kwargs: dict[str, Any], i: int) -> dict[str, Any]:
    """Return the arguments of the i-th call of an image: a slightly changed sample, a falling timestep."""
    return {**kwargs, "sample": kwargs["sample"] * (1 - 0.02 * i), "timestep": torch.tensor(900.0 - 20 * i)}


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
