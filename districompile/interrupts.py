"""Ctrl-C while the program starts: most of that time goes into importing PyTorch, before the command line is read."""

from __future__ import annotations

import os
import signal
import sys
from types import TracebackType

INTERRUPTED = 130  # the exit code


def end_quietly() -> None:
    """In the program ``districompile``, end by Ctrl-C with one line. Whoever imports the package is not affected."""
    if sys.orig_argv[1:3] == ["-m", "districompile"] or os.path.basename(sys.argv[0]) == "districompile":
        sys.excepthook = _hook


def end_undisturbed() -> None:
    """In the program ``districompile``, ignore Ctrl-C from here on: only clearing up is left."""
    if sys.excepthook is _hook:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)
