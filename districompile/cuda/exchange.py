# SPDX-License-Identifier: Apache-2.0
"""The kernels of ``exchange.cu`` on one GPU, launched through the driver."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from districompile.cuda.driver import DriverError, call

COPIES, SIGNALS = 96, 64  # that one exchange holds, as in exchange.cu
_BLOCK = 512
_BYTES = 16 * _BLOCK  # of one block at a time


class _Copy(ctypes.Structure):
    _fields_ = (("source", ctypes.c_uint64), ("target", ctypes.c_uint64), ("bytes", ctypes.c_uint64))


class Exchange(ctypes.Structure):
    """The argument of the kernel ``exchange``."""

    _fields_ = (
        ("copies", _Copy * COPIES), ("signals", ctypes.c_uint64 * SIGNALS), ("awaited", ctypes.c_uint64 * SIGNALS),
        ("arrived", ctypes.c_uint64),
        ("n_copies", ctypes.c_int), ("n_signals", ctypes.c_int), ("n_awaited", ctypes.c_int),
    )  # fmt: skip


class Kernels:
    """``exchange`` and ``fill`` on ``device``. Raises :class:`DriverError` where the driver does not take them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        text = Path(__file__).with_name("exchange.ptx").read_bytes()
        self._module, self._exchange, self.fill_words = (ctypes.c_void_p() for _ in range(3))
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # there is a context now
            call("cuModuleLoadData", ctypes.byref(self._module), ctypes.c_char_p(text))
            for name, found in ((b"exchange", self._exchange), (b"fill_words", self.fill_words)):
                call("cuModuleGetFunction", ctypes.byref(found), self._module, ctypes.c_char_p(name))
        self._arrived = torch.zeros(1, dtype=torch.int32, device=device)
        self._blocks = torch.cuda.get_device_properties(device).multi_processor_count

    def exchange(
        self, copies: Sequence[tuple[torch.Tensor, torch.Tensor]], signals: Sequence[int], awaited: Sequence[int]
    ) -> None:
        """On the current stream: copy (source, target) pairs, dense and of equal bytes; set the words at ``signals``
        to 1; wait until those at ``awaited`` are 1, and set them to 0. At most :data:`COPIES` pairs and
        :data:`SIGNALS` words each. Exchanges of a device must follow each other."""
        e = Exchange(arrived=self._arrived.data_ptr())
        e.n_copies, e.n_signals, e.n_awaited = len(copies), len(signals), len(awaited)
        for i, (source, target) in enumerate(copies):
            e.copies[i] = _Copy(source.data_ptr(), target.data_ptr(), source.nbytes)
        e.signals[: len(signals)] = signals
        e.awaited[: len(awaited)] = awaited
        largest = max((source.nbytes for source, _ in copies), default=0)
        blocks = max(1, min(self._blocks, -(-largest // _BYTES)))
        params = (ctypes.c_void_p * 1)(ctypes.addressof(e))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
        call("cuLaunchKernel", self._exchange, blocks, 1, 1, _BLOCK, 1, 1, 0, stream, params, None)


@functools.cache
def kernels(device: torch.device) -> Kernels | None:
    """None where the driver does not take them: everything works without, more slowly."""
    try:
        return Kernels(device)
    except DriverError:
        return None


def fits(copies: Sequence[Any], signals: Sequence[int], awaited: Sequence[int]) -> bool:
    return len(copies) <= COPIES and max(len(signals), len(awaited)) <= SIGNALS
