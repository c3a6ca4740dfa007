"""How a kernel is called: on tensors at once, and in what Inductor compiles, which takes the kernel into its program.

``torch.library.wrap_triton`` does the same, but for kernels that read through descriptors (the GPU's tensor memory
accelerator), which it cannot trace: so what it ends in is called here.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def unusable() -> str | None:
    """Why kernels of our own cannot be used here; None if they can."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.cuda.get_device_capability()[0] != 9:  # older ones have no descriptors; newer ones were not tried
        return f"they are for Hopper GPUs, and this is an {torch.cuda.get_device_name()}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec("triton.tools.tensor_descriptor") is None:
        return "this triton has no descriptors of tensors"
    return None


def launch(
    kernel: str, grid: Sequence[int], tensors: Mapping[str, Tensor], constants: Mapping[str, Any], *, warps: int,
    stages: int, blocks: Mapping[str, Sequence[int]] | None = None,
) -> None:  # fmt: skip
    """Call the kernel of this name of :mod:`districompile.backends.gpu.kernels`. ``blocks``: which tensors it reads
    through descriptors, and in blocks of what shape."""
    from torch._higher_order_ops import triton_kernel_wrap as torch_triton

    table: Any = torch_triton.kernel_side_table
    torch_triton.triton_kernel_wrapper_mutation(
        kernel_idx=table.add_kernel(_configured(kernel, warps, stages)),
        constant_args_idx=table.add_constant_args(dict(constants)),
        grid=[tuple(grid) + (1,) * (3 - len(grid))],
        tma_descriptor_metadata={
            name: torch_triton.create_tma_stable_metadata(list(block)) for name, block in (blocks or {}).items()
        },
        kwargs=dict(tensors),
    )


@functools.cache
def _configured(kernel: str, warps: int, stages: int) -> Any:
    import triton

    from districompile.backends.gpu import kernels

    config = triton.Config({}, num_warps=warps, num_stages=stages)
    return triton.autotune(configs=[config], key=[])(getattr(kernels, kernel))


def blocks_of(size: int, block: int) -> int:
    return math.ceil(size / block)


def power_of_two(size: int, least: int = 16) -> int:
    """The next power of 2 from ``size`` on, and no less than ``least``."""
    return max(least, 1 << max(0, size - 1).bit_length())
