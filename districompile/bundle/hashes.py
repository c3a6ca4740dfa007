# SPDX-License-Identifier: Apache-2.0
"""Sizes and hashes of a bundle's files."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from districompile.bundle.manifest import AGAIN, MANIFEST
from districompile.errors import BundleError

CHUNK = 1 << 22  # bytes read at once
Progress = Callable[[int, int], None]  # bytes done, bytes in all


def hash_files(paths: Mapping[str, Path], progress: Progress | None = None) -> dict[str, str]:
    """Return the sha256 of each file in hex. ``progress`` gets the bytes done and in all."""
    total = sum(found[1] for p in paths.values() if (found := state_of(p)) is not None)
    done = 0
    hashes = {}
    buffer = memoryview(bytearray(CHUNK))
    for name, path in paths.items():
        digest = hashlib.sha256()
        try:
            with path.open("rb", buffering=0) as file:
                while n := file.readinto(buffer):
                    digest.update(buffer[:n])
                    done += n
                    if progress is not None:
                        progress(done, total)
        except OSError as e:
            raise BundleError(f"{path} cannot be read: {e.strerror}{AGAIN}") from e
        hashes[name] = digest.hexdigest()
    return hashes


def check_hashes(folder: Path, expected: Mapping[str, str], progress: Progress | None = None) -> None:
    """Check the sha256 of a bundle's files. Raises :class:`BundleError` for one that differs from the expected one.

    What :func:`hash_ahead` computes for the folder is used, once."""
    ahead = _AHEAD.pop(folder.resolve(), None)
    known = {} if ahead is None else ahead.result()
    hashes = {name: known[name][1] for name in expected if name in known and known[name][0] == state_of(folder / name)}
    hashes |= hash_files({name: folder / name for name in expected if name not in hashes}, progress)
    for name in expected:
        if hashes[name] != expected[name]:
            raise BundleError(f"{folder / name} was changed: its hash is not the one in {MANIFEST}{AGAIN}")


State = tuple[int, int, int]
_AHEAD: dict[Path, _Ahead] = {}


def hash_ahead(folder: Path, names: Iterable[str]) -> None:
    """Begin to hash files of a bundle in a thread, for the next :func:`check_hashes` of the folder.

    A process has other work before it loads a bundle, such as imports. Nothing is raised here."""
    _AHEAD[folder.resolve()] = _Ahead({name: folder / name for name in names})


class _Ahead(threading.Thread):
    """Hashes of files, each with the state of the file before it was read. A file that cannot be read has none."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        super().__init__(daemon=True)  # a process that is refused does not wait for it
        self._paths = dict(paths)
        self._found: dict[str, tuple[State, str]] = {}
        self.start()

    def run(self) -> None:
        for name, path in self._paths.items():
            state = state_of(path)
            with contextlib.suppress(BundleError, OSError):
                found = hash_files({name: path})[name]
                if state is not None:
                    self._found[name] = state, found

    def result(self) -> dict[str, tuple[State, str]]:
        self.join()
        return self._found


def state_of(path: Path) -> State | None:
    """Return what changes with a file: its inode, size and time of modification; None without the file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def check_size(folder: Path, name: str, size: int) -> None:
    """Check that a bundle's file exists and has ``size`` bytes. Raises :class:`BundleError`."""
    file = folder / name
    if not file.is_file():
        raise BundleError(f"{file} is missing{AGAIN}")
    if file.stat().st_size != size:
        raise BundleError(f"{file} has {file.stat().st_size} bytes instead of {size}{AGAIN}")
