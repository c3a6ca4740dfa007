# SPDX-License-Identifier: Apache-2.0
"""A process between an owner and its resident ranks: it launches them, and ends them when the owner is gone.

The owner is a server, or a process that calls a bundle whose ranks are elsewhere. It is no rank, may have any
``__main__``, and may end in any way. So it runs ``python -m`` with a module that calls :func:`supervise`. That process
reads its orders from standard input, and ends the ranks when standard input is closed. On standard output it writes one
line of JSON with the error that ended the ranks. Nothing here imports PyTorch.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from districompile.errors import Error

SILENCE = 6.0  # seconds without a sign of life after which a loaded rank counts as lost
REASON = 3.5  # seconds in which the launcher says why a rank ended
_SHORTLY = 0.2  # seconds
_LONGEST_FOLDER = 100  # bytes: addresses have 107 at most


def supervise(launch: Callable[[str], None]) -> int:
    """Run as the supervisor, and return its exit code.

    ``launch`` takes the orders, one line of JSON, and returns after the ranks have ended. Their field ``address`` is
    the socket at which the owner listens, in a folder that is removed if the owner was killed.
    """
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what ranks print belongs to the log
    owner = os.getppid()
    orders = sys.stdin.readline()
    try:
        folder = Path(json.loads(orders)["address"]).parent
    except (ValueError, KeyError, TypeError):
        return 2  # the owner ended before it gave any
    gone = threading.Event()
    threading.Thread(target=_follow, args=(owner, folder, gone), name="districompile-owner", daemon=True).start()
    try:
        launch(orders)
    except KeyboardInterrupt:
        return 130
    except Error as e:
        with contextlib.suppress(OSError):  # the owner is gone
            answer.write(json.dumps({"error": " ".join(str(e).split()), "kind": type(e).__name__}) + "\n")
            answer.flush()
        if gone.wait(_SHORTLY):  # ranks end by themselves when the owner is gone, and may be seen first
            _clear(owner, folder)
        os._exit(2)  # no rank is left
    return 0


def _follow(owner: int, folder: Path, gone: threading.Event) -> None:
    # Not sys.stdin: its lock would be held while the interpreter shuts down.
    while os.read(0, 4096):
        pass
    gone.set()
    _clear(owner, folder)
    os.kill(os.getpid(), signal.SIGTERM)


def _clear(owner: int, folder: Path) -> None:
    """Remove the folder of an owner that was killed, so that it could not do so itself."""
    time.sleep(_SHORTLY)  # a process closes its files shortly before it is gone
    if os.getppid() != owner:
        shutil.rmtree(folder, ignore_errors=True)


def reason_in(said: bytes) -> str | None:
    """Return the error in the line that a supervisor has written; None if there is none."""
    try:
        return str(json.loads(said)["error"])
    except (ValueError, KeyError, TypeError):
        return None


def private_folder(name: str, roots: tuple[str, ...] = ()) -> Path:
    """Make a folder that no other user can open, whose path is short enough for the address of a socket.

    It is made in the first of ``roots`` that allows it, else in the folder for temporary files.
    """
    for root in roots:
        with contextlib.suppress(OSError):
            return Path(tempfile.mkdtemp(prefix=f"districompile-{name}-", dir=root))
    found = Path(tempfile.mkdtemp(prefix=f"districompile-{name}-"))
    if len(os.fsencode(found)) > _LONGEST_FOLDER:
        found.rmdir()
        found = Path(tempfile.mkdtemp(prefix=f"districompile-{name}-", dir="/tmp"))
    return found


class Handles:
    """The processes of ranks. A number may be used again for another process, a handle is not."""

    def __init__(self) -> None:
        self._handles: list[int] = []

    def add(self, pid: int) -> None:
        """Add a process."""
        with contextlib.suppress(OSError, AttributeError):  # where the system has no handles
            self._handles.append(os.pidfd_open(pid))

    def kill(self, group: int | None) -> None:
        """End every process that is still there, and the process group ``group``."""
        if group is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        while self._handles:
            handle = self._handles.pop()
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            os.close(handle)
