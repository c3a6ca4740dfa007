# SPDX-License-Identifier: Apache-2.0
"""Tensors from one process to another of this machine, through memory that both have mapped.

The sender writes all tensors of a call into one mapped file, and sends a description of a few numbers. The file grows
by need. It is data: the receiver checks that each tensor lies within the file.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from districompile.errors import LaunchError
from districompile.ir.spec import dtype_name, dtype_of

_ALIGN = 64  # bytes
_LEAST = 1 << 20  # bytes of a file

Described = dict[str, Any]


class TensorSender:
    """Write tensors where another process reads them. ``folder`` is private, and in memory where there is such a one.

    What is sent is overwritten by the next :meth:`put`: the receivers have to be done with it.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._file: Path | None = None
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._number = 0

    def put(self, tensors: Sequence[Tensor]) -> Described:
        """Copy ``tensors`` from whatever device, and return their description for :meth:`TensorReceiver.get`."""
        items, end = [], 0
        for tensor in tensors:
            items.append({"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "at": end})
            end += -(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN
        if end > self._memory.numel() or self._file is None:
            self._grow(max(end, _LEAST, 2 * self._memory.numel()))
        for tensor, item in zip(tensors, items, strict=True):
            _part(self._memory, item).copy_(tensor.detach())
        return {"file": str(self._file), "size": self._memory.numel(), "tensors": items}

    def close(self) -> None:
        """Remove the file. Receivers keep what they have mapped."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.unlink()
            self._file = None

    def _grow(self, size: int) -> None:
        self.close()
        self._number += 1
        for folder in (self._folder, Path(tempfile.gettempdir())):  # memory may be short of room for large tensors
            number, path = tempfile.mkstemp(prefix=f"{self._name}-{self._number}-", dir=folder)
            try:
                os.posix_fallocate(number, 0, size)
                self._file, self._memory = Path(path), _mapped(number, size)
                return
            except OSError as e:
                os.unlink(path)
                problem = e
            finally:
                os.close(number)
        raise LaunchError(f"there is no room for {size} bytes that are sent to other processes: {problem.strerror}")


class TensorReceiver:
    """Read tensors that a :class:`TensorSender` has written in another process. ``last``: it is the only reader, and
    removes each file when it has mapped it."""

    def __init__(self, last: bool = False) -> None:
        self._last = last
        self._file = ""
        self._memory = torch.empty(0, dtype=torch.uint8)

    def get(self, described: Mapping[str, Any]) -> list[Tensor]:
        """Return views of the tensors, on the CPU. They hold until the sender's next :meth:`TensorSender.put`."""
        if described["file"] != self._file:
            path, size = str(described["file"]), int(described["size"])
            number = os.open(path, os.O_RDWR)
            try:
                if os.fstat(number).st_size < size:
                    raise LaunchError("memory that is shared with another process is shorter than it says")
                self._file, self._memory = path, _mapped(number, size)
            finally:
                os.close(number)
            if self._last:
                os.unlink(path)
        return [_part(self._memory, item) for item in described["tensors"]]


def _mapped(number: int, size: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(number, size), dtype=torch.uint8)


def _part(memory: Tensor, item: Mapping[str, Any]) -> Tensor:
    """Return the part of ``memory`` (uint8) that an item describes, in its shape and dtype."""
    dtype, shape, at = dtype_of(item["dtype"]), [int(n) for n in item["shape"]], int(item["at"])
    count = math.prod(shape) * dtype.itemsize
    if at < 0 or at + count > memory.numel():
        raise LaunchError("a tensor that another process describes does not lie in the memory that is shared")
    return memory[at : at + count].view(dtype).view(shape)
