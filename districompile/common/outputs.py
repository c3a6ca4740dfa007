# SPDX-License-Identifier: Apache-2.0
"""Output files and folders: checks before the work, and atomic replacement."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from districompile.errors import Error

_HANDLED = (signal.SIGINT, signal.SIGTERM)


class OutputError(Error):
    """A path that cannot be written, or that holds something else. The message names the path and the reason."""


def check_file(path: Path, name: str = "") -> None:
    """Check that a file can be written at ``path``, which option ``name`` gave. Raises :class:`OutputError`."""
    label = f"{name} {path}".strip()
    found = _status(path, label)
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise OutputError(f"{label} is a folder: give the name of a file")
    if found is not None and not os.access(path, os.W_OK):
        raise OutputError(f"{label} cannot be written: permission denied; choose another place")
    if found is None or stat.S_ISREG(found.st_mode):  # a pipe or a device is written as it is
        _check_parent(_target(path, label), label)


def check_folder(path: Path, name: str = "") -> None:
    """Check that a folder can be made at ``path``, and a file written into it. Raises :class:`OutputError`."""
    label = f"{name} {path}".strip()
    found = _status(path, label)
    if found is None:
        _check_parent(_target(path, label), label)
    elif not stat.S_ISDIR(found.st_mode):
        raise OutputError(f"{label} is a file: give a folder")
    else:
        _probe(path, label)


def write_file(path: Path, data: bytes | str) -> None:
    """Write a file atomically. A link stays a link. A missing folder is made. Raises :class:`OutputError`."""
    label = str(path)
    data = data.encode() if isinstance(data, str) else data
    target = _target(path, label)
    partial = target.parent / part_name()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_file():
            target.write_bytes(data)
            return
        try:
            partial.write_bytes(data)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as e:
        raise OutputError(f"{label} cannot be written: {e.strerror or e}") from e


def part_name() -> str:
    """Return a short, unique name for an unfinished file."""
    return f".districompile-{uuid.uuid4().hex[:12]}.part"


def other_file(folder: Path, files: Mapping[str, Any]) -> str | None:
    """Return the first path in ``folder`` that is neither one of ``files`` nor one of their folders, or None."""
    known = set(files)
    parents = {parent.as_posix() for name in known for parent in Path(name).parents}
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(root, name)
            relative = path.relative_to(folder).as_posix()
            plain = not path.is_symlink()
            if not plain or relative not in (parents if path.is_dir() else known):
                return relative
    return None


def remove_files(folder: Path, files: Mapping[str, Any]) -> None:
    """Remove ``files`` from ``folder``, then all folders that are empty."""
    for name in files:
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    for root, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(root)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay SIGINT and SIGTERM until the block ends. In threads other than the main one, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    handlers = {number: signal.getsignal(number) for number in _HANDLED}
    changed = {number: handler for number, handler in handlers.items() if handler is not None}
    for number in changed:
        signal.signal(number, lambda number, _: arrived.append(number))
    try:
        yield
    finally:
        for number, handler in changed.items():
            signal.signal(number, handler)
        for first in arrived[:1]:
            signal.raise_signal(first)


def _status(path: Path, label: str) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise OutputError(f"{label} cannot be written: {getattr(e, 'strerror', None) or e}") from e


def _target(path: Path, label: str) -> Path:
    """Return the target of a link, or the path itself."""
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as e:
        raise OutputError(f"{label} cannot be written: {e}") from e


def _check_parent(path: Path, label: str) -> None:
    """Check that ``path`` can be made, with a file in the innermost existing folder. Raises :class:`OutputError`."""
    below = path
    while _status(below.parent, label) is None:
        below = below.parent
        _fits(below.name, path, label)
    _fits(path.name, path, label)
    if not below.parent.is_dir():
        raise OutputError(f"{label} cannot be written: {below.parent} is not a folder")
    _probe(below.parent, label)


def _fits(name: str, path: Path, label: str) -> None:
    if len(os.fsencode(name)) > 255 or len(os.fsencode(str(path))) > 4000:
        raise OutputError(f"{label[:100]}... cannot be written: File name too long")


def _probe(folder: Path, label: str) -> None:
    probe = folder / part_name()
    try:
        with uninterrupted():
            probe.touch(exist_ok=False)
            probe.unlink()
    except OSError as e:
        raise OutputError(f"{label} cannot be written: {e.strerror or e}; choose another place") from e
