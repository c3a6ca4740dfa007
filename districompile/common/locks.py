# SPDX-License-Identifier: Apache-2.0
"""Let only one process at a time change a folder."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold ``folder`` against other processes that hold it. Waits for them.

    The folder itself is locked, so that no file is left behind. A folder that was replaced while this process waited is
    locked anew. Without a folder, or where the file system has no locks, nothing is held.
    """
    number = _locked(folder)
    try:
        yield
    finally:
        if number is not None:
            os.close(number)


def _locked(folder: Path) -> int | None:
    locks = _library()
    while locks is not None:
        try:
            number = os.open(folder, os.O_RDONLY)
        except OSError:
            return None
        try:
            locks.flock(number, locks.LOCK_EX)
            if os.path.samestat(os.fstat(number), os.stat(folder)):
                return number
        except OSError:
            os.close(number)
            return None
        except BaseException:
            os.close(number)
            raise
        os.close(number)
    return None


def _library() -> ModuleType | None:
    try:
        return importlib.import_module("fcntl")
    except ImportError:  # not on this system
        return None
