# SPDX-License-Identifier: Apache-2.0
"""The connection of one resident rank with the owner of the ranks. Nothing here imports PyTorch."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from districompile.errors import LaunchError
from districompile.runtime.processes.frames import FrameError, receive, send

BEAT = 0.5  # seconds between two signs of life


class Control:
    """The connection of one rank with its owner. Its loss ends this process: nobody waits for what it computes.

    ``take`` is called with each message, in a thread of its own, and returns False after the last one. A sign of life
    is sent twice a second while :attr:`beats` is set.
    """

    def __init__(
        self, address: str, secret: str, rank: int, take: Callable[[dict[str, Any]], bool], beats: bool = True
    ) -> None:  # fmt: skip
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._lock = threading.Lock()
        self._take = take
        self.beats = threading.Event()
        if beats:
            self.beats.set()
        try:
            self._socket.connect(address)
        except OSError as e:
            raise LaunchError(f"the owner of the ranks cannot be reached: {e.strerror or e}") from e
        self.send({"type": "hello", "rank": rank, "pid": os.getpid(), "secret": secret})
        for target in (self._listen, self._beat):
            threading.Thread(target=target, name=f"districompile-{target.__name__}", daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        """Send a message."""
        try:
            with self._lock:
                send(self._socket, message)
        except OSError:
            os._exit(1)

    def _listen(self) -> None:
        with contextlib.suppress(OSError, FrameError, ValueError):
            while (message := receive(self._socket)) is not None:
                if not self._take(message):
                    return
        os._exit(1)

    def _beat(self) -> None:
        wait = threading.Event()
        while True:
            self.beats.wait()
            self.send({"type": "beat", "memory": resident_bytes()})
            wait.wait(BEAT)


def resident_bytes() -> int:
    """Return the memory of this process in bytes; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
