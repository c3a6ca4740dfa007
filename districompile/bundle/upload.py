# SPDX-License-Identifier: Apache-2.0
"""Read parts of a file into the memory of a device, in the background and by several threads.

Copying from a mapping of the file takes a page at a time from the disk, in one thread, and CUDA copies it once more
before it sends it. Here threads read large pieces into pinned memory, which the copy engines send while the next
pieces are read. Meanwhile the caller loads engines.
"""

from __future__ import annotations

import collections
import dataclasses
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

THREADS = 4
_PIECE = 8 << 20  # bytes: each thread has two pinned buffers of this size


class _Part:
    """A part of the file, and how many pieces of it are still to come."""

    def __init__(self, target: Tensor, pieces: int) -> None:
        self.target: Tensor | None = target
        self._left = pieces
        self._lock, self._done = threading.Lock(), threading.Event()
        self._error: Exception | None = None

    def piece_done(self) -> None:
        with self._lock:
            self._left -= 1
            if not self._left:
                self._done.set()

    def fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._done.set()

    def hand_over(self) -> Tensor:
        """Wait, and give the memory away. It is not held here any longer."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        target, self.target = self.target, None
        assert target is not None
        return target


@dataclasses.dataclass(frozen=True)
class _Piece:
    part: _Part
    offset: int  # in the file
    start: int  # in the target
    size: int


class Upload:
    """Read ``parts`` of the file ``path``, given as offset: length in bytes, into memory of ``device``.

    It starts at once, and reads them in the given order. The memory of all parts is allocated before, by the calling
    thread.
    """

    def __init__(self, path: Path, parts: Mapping[int, int], device: torch.device, threads: int = THREADS) -> None:
        self._path, self._device = path, device
        self._parts: dict[int, _Part] = {}  # that nobody took
        self._pieces: queue.SimpleQueue[_Piece] = queue.SimpleQueue()
        for offset, length in parts.items():
            starts = range(0, length, _PIECE)
            target = torch.empty(length, dtype=torch.uint8, device=device)
            part = self._parts[offset] = _Part(target, len(starts))
            for start in starts:
                self._pieces.put(_Piece(part, offset + start, start, min(_PIECE, length - start)))
        if device.type == "cuda":  # the allocator may give memory that earlier work of this stream still uses
            torch.cuda.current_stream(device).synchronize()
        self._all = list(self._parts.values())
        for _ in range(min(threads, max(1, self._pieces.qsize()))):
            threading.Thread(target=self._work, daemon=True).start()

    def take(self, offset: int) -> Tensor | None:
        """Wait for the part at ``offset``, and hand its memory over, as bytes. None if there is none, or no more.

        Raises ``OSError`` if the file could not be read, and what CUDA raises.
        """
        part = self._parts.pop(offset, None)
        return None if part is None else part.hand_over()

    def end(self) -> None:
        """Wait for the parts that nobody took, and free their memory."""
        while self._parts:
            self.take(next(iter(self._parts)))

    def _work(self) -> None:
        try:
            with self._path.open("rb", buffering=0) as file:
                if self._device.type == "cuda":
                    with torch.cuda.device(self._device), torch.cuda.stream(_new_stream(self._device)):
                        self._read(file, pinned=True)
                else:
                    self._read(file, pinned=False)
        except Exception as e:  # else the caller would wait for ever
            for part in self._all:
                part.fail(e)

    def _read(self, file: BinaryIO, pinned: bool) -> None:
        buffers = [torch.empty(_PIECE, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        sending: collections.deque[tuple[Any, _Piece]] = collections.deque()
        number = 0
        while True:
            try:
                piece = self._pieces.get_nowait()
            except queue.Empty:
                break
            if (target := piece.part.target) is None:  # it failed, and the caller knows
                continue
            if len(sending) == len(buffers):
                _finish(*sending.popleft())
            buffer = buffers[number % len(buffers)][: piece.size]
            number += 1
            _read_all(file, buffer, piece.offset)
            target[piece.start : piece.start + piece.size].copy_(buffer, non_blocking=pinned)
            sent = torch.cuda.current_stream(self._device).record_event() if pinned else None
            sending.append((sent, piece))
        while sending:
            _finish(*sending.popleft())


def _new_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _finish(sent: Any, piece: _Piece) -> None:
    if sent is not None:
        sent.synchronize()
    piece.part.piece_done()


def _read_all(file: BinaryIO, buffer: Tensor, offset: int) -> None:
    view = buffer.numpy().data
    file.seek(offset)
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise OSError(f"the file ends at byte {offset + done}")
        done += count
