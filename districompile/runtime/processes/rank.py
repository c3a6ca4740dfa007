# SPDX-License-Identifier: Apache-2.0
"""The process of one rank: run the worker, and report its result or its error to the launcher."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from districompile.errors import Error, LaunchError, TransportError
from districompile.runtime.processes.loopback import give_listener

_FOLLOWER_WAITS = 3.0  # seconds
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_LOST_STORE = ("DistNetworkError", "DistStoreError", "DistBackendError")  # PyTorch's errors when rank 0 is gone


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a rank runs: its environment variables, the launcher's process, and its files for output and errors."""

    environment: Mapping[str, str]
    launcher: int
    logs: tuple[Path, Path] | None


@dataclasses.dataclass(frozen=True)
class Result:
    """What the worker returned."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Failure:
    """The error of a rank, and when it happened. ``names_ranks``: the message says which rank is at fault."""

    message: str
    time: float
    names_ranks: bool


_launcher: Connection | None = None


def run_rank(
    worker: Callable[..., Any], args: tuple[Any, ...], place: Place, launcher: Connection,
    listener: socket.socket | None,
) -> None:  # fmt: skip
    """Run ``worker(*args)`` in this process, and report to ``launcher``. The process ends when the worker fails."""
    global _launcher
    _launcher = launcher
    _end_with(place.launcher)
    # A rank that waits inside gloo never reaches Python's handlers: let signals end it immediately.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if place.logs is not None:
        _redirect(*place.logs)
    os.environ.update(place.environment)
    if listener is not None:
        give_listener(listener)
    done = _Done(launcher, listener is not None)
    atexit.register(done.leave)  # before the worker's own handlers, which are therefore called first
    try:
        value = worker(*args)
    except SystemExit as e:
        if e.code not in (None, 0):
            fail_process(LaunchError(f"the worker exited with {e.code!r}"))
        value = None
    except Exception as e:
        fail_process(e)
    done.report(value)


class _Done:
    """The end of a rank whose worker has succeeded."""

    def __init__(self, launcher: Connection, holds_store: bool) -> None:
        self._launcher, self._holds_store = launcher, holds_store
        self._reported = False

    def report(self, value: Any) -> None:
        """Send the result."""
        try:
            self._launcher.send(Result(value))
        except OSError:  # the launcher is gone
            os._exit(1)
        except Exception as e:  # of the value's own methods
            fail_process(LaunchError(f"the result of the work cannot be sent: {e}"))
        self._reported = True

    def leave(self) -> None:
        """End without tearing down libraries, if the worker has succeeded.

        Their threads may still run. In one case, a finished process aborted in the destructor of a library. The rank
        with the store waits until the others have finished.
        """
        if self._reported:
            _flush()
            if self._holds_store:
                with contextlib.suppress(EOFError, OSError):
                    self._launcher.recv()
            os._exit(0)


def is_reported() -> bool:
    """Return whether a launcher reports the error of this process."""
    return _launcher is not None or "TORCHELASTIC_ERROR_FILE" in os.environ


def fail_process(error: Exception) -> None:
    """Record ``error`` and end this process at once, whatever threads and transfers are still alive in it."""
    followed = _followed(error)
    text = str(error) if isinstance(error, Error) else f"{type(error).__name__}: {error}"
    if _launcher is not None:
        with contextlib.suppress(OSError):
            _launcher.send(Failure(text, time.time(), isinstance(error, TransportError)))
    elif "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun's
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
    if not isinstance(error, Error):
        traceback.print_exception(error)
    _flush()
    if followed:
        # A follower waits: the launcher must find the rank that failed first, and then ends this one.
        time.sleep(_FOLLOWER_WAITS)
    os._exit(1)


def _followed(error: BaseException | None) -> bool:
    """Return whether another rank's end caused ``error``, also if the worker's own code wrapped it."""
    while error is not None:
        if isinstance(error, TransportError):
            return not error.silent
        if type(error).__name__ in _LOST_STORE and os.environ.get("RANK") != "0":
            return True
        error = error.__cause__ or error.__context__
    return False


def _end_with(launcher: int) -> None:
    """End this process when the launcher's process ends, however that happens."""
    with contextlib.suppress(OSError, AttributeError):  # Linux alone has it; elsewhere the transfers fail
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != launcher:
        os._exit(1)


def _redirect(out: Path, err: Path) -> None:
    for path, number in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
