# SPDX-License-Identifier: Apache-2.0
"""Sizes and hashes of a bundle's files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from districompile.bundle.manifest import AGAIN, MANIFEST
from districompile.errors import BundleError

CHUNK = 1 << 22  # bytes read at once
Progress = Callable[[int, int], None]  # bytes done, bytes in all


def hash_files(paths: Mapping[str, Path], progress: Progress | None = None) -> dict[str, str]:
    """Return the sha256 of each file in hex. ``progress`` gets the bytes done and in all."""
    total = sum(p.stat().st_size for p in paths.values())
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
    """Check the sha256 of a bundle's files. Raises :class:`BundleError` for one that differs from the expected one."""
    for name, sha256 in hash_files({name: folder / name for name in expected}, progress).items():
        if sha256 != expected[name]:
            raise BundleError(f"{folder / name} was changed: its hash is not the one in {MANIFEST}{AGAIN}")


def check_size(folder: Path, name: str, size: int) -> None:
    """Check that a bundle's file exists and has ``size`` bytes. Raises :class:`BundleError`."""
    file = folder / name
    if not file.is_file():
        raise BundleError(f"{file} is missing{AGAIN}")
    if file.stat().st_size != size:
        raise BundleError(f"{file} has {file.stat().st_size} bytes instead of {size}{AGAIN}")
