# SPDX-License-Identifier: Apache-2.0
"""The memory of one rank, which the executors of its shapes use in turn.

Only one image is under way at a time, in one shape. So a bundle of many shapes needs the memory of the largest one.
"""

from __future__ import annotations

import torch

from districompile.plan.plan import ExecutionPlan, Reduction
from districompile.runtime.executor.arena import allocate
from districompile.runtime.executor.memory import MemoryPlan
from districompile.runtime.transports.base import Channel, ReceiveBuffer


class Workspace:
    """Memory of this rank on ``device``, and its receive buffers on ``channel``.

    :meth:`expect` is called with the memory plan of every shape that is known, before the first executor is made.
    All ranks then ask alike. ``user`` is the executor whose values the memory holds.
    """

    def __init__(self, channel: Channel, device: torch.device) -> None:
        self.channel, self._device = channel, device
        self.user: object | None = None
        self._least = {"arena": 0, "shared": 0, "stream": 0, "signals": 0, "kept": 0, "scratch": 0}
        self._blocks: dict[str, torch.Tensor] = {}
        self._buffers: dict[str, tuple[ReceiveBuffer, int]] = {}  # with the bytes that were asked for

    def expect(self, memory: MemoryPlan, scratch_bytes: int) -> None:
        """Make what is allocated from here on large enough for ``memory``, and for the scratch memory of engines."""
        wanted = {
            "arena": memory.arena_bytes,
            "shared": memory.shared_bytes,
            "stream": memory.stream_bytes,
            "signals": memory.signals,
            "kept": 2 * memory.kept_stride,
            "scratch": scratch_bytes,
        }
        self._least = {name: max(least, wanted[name]) for name, least in self._least.items()}

    def arena(self, nbytes: int) -> torch.Tensor:
        """Return the memory of the values of a call."""
        return self._block("arena", max(nbytes, self._least["arena"]), nbytes)

    def scratch(self, nbytes: int) -> torch.Tensor:
        """Return the memory that engines use while they run."""
        return self._block("scratch", max(nbytes, self._least["scratch"]), nbytes)

    def kept(self, stream: int, nbytes: int) -> torch.Tensor:
        """Return the memory of the values that a stream of calls keeps."""
        return self._block(f"kept {stream}", max(nbytes, self._least["kept"]), nbytes)

    def shared(self, nbytes: int) -> ReceiveBuffer:
        """Return the receive buffer of all streams of calls."""
        return self._buffer("shared", nbytes, 0, self._least["shared"], 0)

    def stream(self, stream: int, nbytes: int, signals: int) -> ReceiveBuffer:
        """Return the receive buffer of a stream of calls."""
        return self._buffer(f"stream {stream}", nbytes, signals, self._least["stream"], self._least["signals"])

    def _block(self, name: str, wanted: int, needed: int) -> torch.Tensor:
        if name not in self._blocks or self._blocks[name].numel() < needed:
            self._blocks[name] = allocate(wanted, self._device)
        return self._blocks[name]

    def _buffer(self, name: str, nbytes: int, signals: int, least: int, least_signals: int) -> ReceiveBuffer:
        buffer, size = self._buffers.get(name, (None, 0))
        if buffer is None or size < nbytes or buffer.signals < signals:
            size = max(nbytes, least)
            buffer = self.channel.receive_buffer(size, max(signals, least_signals))
            self._buffers[name] = buffer, size
        return buffer


def fill_borders(buffer: ReceiveBuffer, plan: ExecutionPlan, memory: MemoryPlan, rank: int, shared: bool) -> None:
    """Fill a receive buffer with the border's value, which rows that no rank sends keep.

    ``shared``: it is the buffer of all streams of calls, not that of one.
    """
    for c in plan.collectives.values():
        if (c.name in memory.cross_call) != shared and not isinstance(c, Reduction):
            layout = memory.layout(c.name, rank)
            for copy in range(layout.copies):
                layout.inside(buffer.local, c, rank, copy).fill_(c.fill)
