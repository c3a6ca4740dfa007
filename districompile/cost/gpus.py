# SPDX-License-Identifier: Apache-2.0
"""What GPUs can do: published figures by model, and how much of them kernels reach."""

from __future__ import annotations

import dataclasses
import difflib

from districompile.errors import Error


class UnknownGpuError(Error):
    """A GPU that is not in the table."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU of a machine.

    ``tensor_tflops``: matrix products in 16 bits with sums in 32 bits, dense, in 1e12 operations a second.
    ``float32_tflops``: the same in float32. ``bandwidth``: its memory, in GB/s. ``memory_gib``: its size.
    ``link``: what one GPU sends to the others of its machine together, in GB/s, in one direction.
    """

    name: str
    multiprocessors: int
    tensor_tflops: float
    float32_tflops: float
    bandwidth: float
    memory_gib: float
    link: float


@dataclasses.dataclass(frozen=True)
class Network:
    """What connects machines of ``gpus`` GPUs each, as NCCL uses it.

    ``rate``: what one machine sends to the others together, in GB/s, in one direction. ``wait_us``: an exchange that
    crosses it, besides its bytes.
    """

    gpus: int
    rate: float
    wait_us: float = 30.0


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """How much of the published figures kernels reach, and what each kernel and transfer costs beside.

    ``matmul``, ``conv``, ``attention`` and ``memory`` are shares (0 to 1) of the peak at large sizes. ``kernel_us``:
    the start and the end of one kernel in a CUDA graph. ``wait_us``: one exchange that a rank waits for, besides its
    bytes. ``link``: the share of the link's figure that copies reach. ``overlap``: by how much of their time transfers
    in the background slow a call.
    """

    matmul: float
    conv: float
    attention: float
    memory: float
    kernel_us: float
    wait_us: float
    link: float
    overlap: float


# Data sheets of the vendor: dense 16-bit products with sums in 32 bits, float32 outside of tensor cores (TF32 is off by
# default in PyTorch), memory, and the link's one direction (NVLink, else PCIe).
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 132, 989.0, 67.0, 3350.0, 79.6, 450.0),
        Gpu("h100-pcie", 114, 756.0, 51.0, 2000.0, 79.6, 64.0),
        Gpu("h200", 132, 989.0, 67.0, 4800.0, 139.8, 450.0),
        Gpu("b200", 148, 2250.0, 75.0, 8000.0, 178.0, 900.0),
        Gpu("a100", 108, 312.0, 19.5, 2039.0, 79.3, 300.0),
        Gpu("a100-40gb", 108, 312.0, 19.5, 1555.0, 39.4, 300.0),
        Gpu("l40s", 142, 362.0, 91.6, 864.0, 44.5, 32.0),
        Gpu("l4", 58, 121.0, 30.3, 300.0, 22.2, 32.0),
        Gpu("a10g", 80, 70.0, 35.0, 600.0, 22.2, 32.0),
        Gpu("rtx-5090", 170, 209.5, 104.8, 1792.0, 31.4, 64.0),
        Gpu("rtx-4090", 128, 165.2, 82.6, 1008.0, 23.5, 32.0),
        Gpu("rtx-3090", 82, 71.0, 35.6, 936.0, 23.7, 32.0),
    )
}


def find_gpu(name: str) -> Gpu:
    """Return the GPU called ``name``. Raises :class:`UnknownGpuError`, which lists those there are."""
    if (gpu := GPUS.get(name.lower())) is not None:
        return gpu
    close = difflib.get_close_matches(name.lower(), GPUS, 1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise UnknownGpuError(f"no GPU {name!r} in the table{hint}: it has {', '.join(GPUS)}")


def gpu_of_device(name: str, memory_bytes: int) -> Gpu | None:
    """Return the entry for a device as CUDA names it, such as ``NVIDIA H100 80GB HBM3``, or None.

    Entries of one chip are distinguished by their words (``pcie``), then by their memory.
    """
    words = set(name.lower().replace("-", " ").split())
    size = memory_bytes / 2**30
    found = [g for g in GPUS.values() if set(g.name.removesuffix("-40gb").split("-")) <= words]
    fitting = [g for g in found if abs(g.memory_gib - size) <= 0.15 * size]
    return max(fitting, key=lambda g: len(g.name.split("-")), default=None)
