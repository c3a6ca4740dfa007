# SPDX-License-Identifier: Apache-2.0
"""Handling of Ctrl-C outside a command: while the program starts, and after the work is done."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType

INTERRUPTED = 130  # the exit code


_pressed = False  # whether Ctrl-C was pressed


def end_quietly() -> None:
    """In the program ``districompile``, make Ctrl-C end the process with one line. Other programs are not affected."""
    if sys.orig_argv[1:3] == ["-m", "districompile"] or os.path.basename(sys.argv[0]) == "districompile":
        sys.excepthook = _hook
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    # A library that is interrupted while it is imported may go on half imported, and fail later with another error.
    global _pressed
    _pressed = True
    signal.default_int_handler(number, frame)


def end_undisturbed() -> None:
    """In the program ``districompile``, ignore Ctrl-C from here on. Only clean-up is left."""
    if sys.excepthook is _hook:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt) and not _pressed:
        sys.__excepthook__(kind, error, trace)
        return
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)
