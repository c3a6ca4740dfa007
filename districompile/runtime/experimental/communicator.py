# SPDX-License-Identifier: Apache-2.0
"""A separate NCCL communicator, for engines that contain collectives.

Not every version of PyTorch exposes the communicators of its process groups, and an engine's communicator must outlive
all of its contexts. So NCCL itself makes this one, from the same library that PyTorch has loaded.
"""

from __future__ import annotations

import ctypes

import torch

from districompile.errors import LaunchError
from districompile.runtime.transports.gloo import GlooGroup

_ID_BYTES = 128  # NCCL_UNIQUE_ID_BYTES
_OLDEST = 21900  # as ncclGetVersion says 2.19


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * _ID_BYTES),)


class Communicator:
    """The communicator of ``host``'s ranks, each on its own GPU. All of them construct it together.

    ``pointer`` is its ``ncclComm_t``. It is never destroyed: that would have to happen after every context that uses it
    is gone, and both end with the process. Raises :class:`LaunchError` if NCCL cannot be loaded, is too old, or fails.
    """

    def __init__(self, host: GlooGroup, device: torch.device) -> None:
        try:
            self._nccl = ctypes.CDLL("libnccl.so.2")
        except OSError as e:
            raise LaunchError(f"collectives inside engines need NCCL, which cannot be loaded: {e}") from e
        self._nccl.ncclGetErrorString.restype = ctypes.c_char_p
        version = ctypes.c_int()
        self._check("ncclGetVersion", self._nccl.ncclGetVersion(ctypes.byref(version)))
        if version.value < _OLDEST:
            found = f"{version.value // 10000}.{version.value // 100 % 100}.{version.value % 100}"
            raise LaunchError(f"NCCL {found} is too old for collectives inside engines: install 2.19 or later")
        self._nccl.ncclCommInitRank.argtypes = [
            ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, _UniqueId, ctypes.c_int,
        ]  # fmt: skip
        identity = _UniqueId()
        if host.rank == 0:
            self._check("ncclGetUniqueId", self._nccl.ncclGetUniqueId(ctypes.byref(identity)))
        sent = torch.frombuffer(bytearray(bytes(identity)), dtype=torch.uint8)
        identity = _UniqueId.from_buffer_copy(bytes(host.broadcast(sent).tolist()))
        made = ctypes.c_void_p()
        with torch.cuda.device(device):
            status = self._nccl.ncclCommInitRank(ctypes.byref(made), host.ranks, identity, host.rank)
        self._check("ncclCommInitRank", status)
        self.pointer: int = made.value or 0

    def count(self) -> int:
        """Return the number of ranks according to NCCL."""
        ranks = ctypes.c_int()
        self._check("ncclCommCount", self._nccl.ncclCommCount(ctypes.c_void_p(self.pointer), ctypes.byref(ranks)))
        return ranks.value

    def _check(self, call: str, status: int) -> None:
        if status:
            reason = self._nccl.ncclGetErrorString(status)
            raise LaunchError(f"NCCL failed ({call}): {reason.decode() if reason else status}")
