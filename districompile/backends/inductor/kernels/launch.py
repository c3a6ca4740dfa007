# SPDX-License-Identifier: Apache-2.0
"""Launch the custom Triton kernels, eagerly or while Inductor traces a program.

A traced kernel becomes part of the compiled program.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from districompile.backends.inductor.pytorch_private import TritonKernel, call_triton_kernel


def unavailable_reason() -> str | None:
    """Say why the custom Triton kernels cannot be used on this machine, or None if they can."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.cuda.get_device_capability()[0] != 9:  # older GPUs have no descriptors; newer ones were not tried
        return f"they are for Hopper GPUs, and this is an {torch.cuda.get_device_name()}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec("triton.tools.tensor_descriptor") is None:
        return "this triton has no tensor descriptors"
    return None


def launch(
    kernel: str, grid: Sequence[int], tensors: Mapping[str, Tensor], constants: Mapping[str, object], *, warps: int,
    stages: int, blocks: Mapping[str, Sequence[int]] | None = None,
) -> None:  # fmt: skip
    """Launch the kernel of this name of :mod:`districompile.backends.inductor.kernels.triton_kernels`.

    ``blocks`` gives the shape of a block for each tensor that the kernel reads through a descriptor.
    """
    call_triton_kernel(_configured(kernel, warps, stages), grid, tensors, constants, blocks or {})


@functools.cache
def _configured(kernel: str, warps: int, stages: int) -> TritonKernel:
    import triton

    from districompile.backends.inductor.kernels import triton_kernels

    config = triton.Config({}, num_warps=warps, num_stages=stages)
    configured: TritonKernel = triton.autotune(configs=[config], key=[])(getattr(triton_kernels, kernel))
    return configured


def blocks_of(size: int, block: int) -> int:
    """Return the number of blocks that cover ``size`` elements."""
    return math.ceil(size / block)


def power_of_two(size: int, least: int = 16) -> int:
    """Return the smallest power of 2 that is at least ``size`` and at least ``least``."""
    return max(least, 1 << max(0, size - 1).bit_length())
