# SPDX-License-Identifier: Apache-2.0
"""The CUDA driver library, for what PyTorch does not offer: called through ctypes, loaded when it is first needed."""

from __future__ import annotations

import ctypes
import functools
from typing import Any


class DriverError(RuntimeError):
    """A function of the driver is missing, or failed."""


@functools.cache
def function(name: str) -> Any:
    """``name`` of the driver library; calling it raises nothing and returns a CUresult."""
    try:
        found = getattr(ctypes.CDLL("libcuda.so.1"), name)
    except (OSError, AttributeError) as e:
        raise DriverError(f"this NVIDIA driver has no {name}") from e
    found.restype = ctypes.c_int
    return found


def call(name: str, *args: Any) -> None:
    """Raises :class:`DriverError` where it fails. Addresses and handles are to be ``c_void_p`` or ``c_uint64``."""
    code = function(name)(*args)
    if code != 0:
        raise DriverError(f"{name} failed with CUDA error {code}")


class MemoryOperation(ctypes.Structure):
    """CUstreamBatchMemOpParams, as far as waits and writes of 32 bits go."""

    _fields_ = (
        ("operation", ctypes.c_int), ("address", ctypes.c_uint64), ("value", ctypes.c_uint32), ("_", ctypes.c_uint32),
        ("flags", ctypes.c_uint), ("alias", ctypes.c_uint64), ("_pad", ctypes.c_uint64),
    )  # fmt: skip


class KernelNode(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2."""

    _fields_ = (
        ("function", ctypes.c_void_p), ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint), ("params", ctypes.POINTER(ctypes.c_void_p)), ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p), ("context", ctypes.c_void_p),
    )  # fmt: skip


class MemsetNode(ctypes.Structure):
    """CUDA_MEMSET_NODE_PARAMS."""

    _fields_ = (
        ("target", ctypes.c_uint64), ("pitch", ctypes.c_size_t), ("value", ctypes.c_uint),
        ("element_bytes", ctypes.c_uint), ("width", ctypes.c_size_t), ("height", ctypes.c_size_t),
    )  # fmt: skip
