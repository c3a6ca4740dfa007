# SPDX-License-Identifier: Apache-2.0
"""Keep compiled packages, and what was chosen by timing, for later conversions.

An entry's name is a hash of all that its content depends on: the graph, the options, the version of PyTorch, the
processor, and the source of this backend. An entry begins with a hash of its content. An entry that does not fit it is
deleted, and made again. Packages are machine code, so a folder that others may write to is not used.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

_R = TypeVar("_R")
_LIMIT = 4 << 30  # bytes of all packages; the least recently used go first
_TIMINGS = "timings.jsonl"
_SUFFIX = ".package"
_DIGEST = 64  # hex digits of sha256


def default_folder() -> Path | None:
    """Return the folder of this backend in the user's cache, or None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "districompile" / "inductor"
    except RuntimeError:
        return None


def folder_of(given: str | None) -> Path | None:
    """Return the folder that the option ``cache`` names: the default if it is None, and None if it is ``none``."""
    return default_folder() if given is None else None if given == "none" else Path(given).expanduser()


class CompileCache:
    """Packages and timings of earlier conversions in ``folder``. With None, nothing is kept.

    A folder that cannot be used, or a full disk, is as good as an empty cache: no method raises an error for it.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._timings: dict[str, object] | None = None

    def fetch(self, key: str, target: Path) -> bool:
        """Write the package ``key`` to ``target``, and return whether there is one."""
        folder = self._usable()
        if folder is None:
            return False
        entry = folder / (_name(key) + _SUFFIX)
        with contextlib.suppress(OSError):
            digest, content = _split(entry.read_bytes())
            if digest != hashlib.sha256(content).hexdigest().encode():
                entry.unlink()
                return False
            target.write_bytes(content)
            os.utime(entry)
            return True
        return False

    def store(self, key: str, source: Path) -> None:
        """Keep the package ``source`` as ``key``."""
        folder = self._usable()
        if folder is None:
            return
        with contextlib.suppress(OSError):
            content = source.read_bytes()
            handle, temporary = tempfile.mkstemp(dir=folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
                os.replace(temporary, folder / (_name(key) + _SUFFIX))
            except BaseException:
                os.unlink(temporary)
                raise
            prune(folder, _LIMIT)

    @contextlib.contextmanager
    def remembering(self) -> Iterator[None]:
        """Let functions that are :func:`remembered` use this cache in the context."""
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def timed(self, key: str) -> tuple[bool, object]:
        """Return whether a choice is known, and the choice."""
        if self._timings is None:
            self._timings = dict(self._read_timings())
        return key in self._timings, self._timings.get(key)

    def keep_timed(self, key: str, value: object) -> None:
        """Keep a choice."""
        self.timed(key)
        assert self._timings is not None
        self._timings[key] = value
        folder = self._usable()
        if folder is not None:
            text = json.dumps([key, value])
            with contextlib.suppress(OSError), (folder / _TIMINGS).open("a") as file:
                file.write(f"{hashlib.sha256(text.encode()).hexdigest()} {text}\n")

    def _read_timings(self) -> Iterator[tuple[str, object]]:
        folder = self._usable()
        lines: list[str] = []
        if folder is not None:
            with contextlib.suppress(OSError, UnicodeError):
                lines = (folder / _TIMINGS).read_text().splitlines()
        for line in lines:
            digest, _, text = line.partition(" ")
            if digest == hashlib.sha256(text.encode()).hexdigest():
                key, value = json.loads(text)
                yield str(key), _tuples(value)

    def _usable(self) -> Path | None:
        """Return the folder, if nobody else may write to it."""
        return None if self._folder is None else private_folder(self._folder)


def private_folder(folder: Path) -> Path | None:
    """Make ``folder`` where it is missing. Return it, or None where others may write to it or it cannot be made."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError:
        return None
    if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        return None
    return folder


_ACTIVE: ContextVar[CompileCache | None] = ContextVar("active", default=None)


def remembered(function: Callable[..., _R]) -> Callable[..., _R]:
    """Keep the results of a function that times computations on the current GPU, by its arguments.

    Results are None, whole numbers, or tuples of them. They are kept in this process, and in the cache that is active.
    """

    @functools.cache
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        cache = _ACTIVE.get()
        if cache is None or not torch.cuda.is_available():
            return cast(Any, function)(*args, **kwargs)
        machine = torch.cuda.get_device_name(), versions(), source_hash()
        key = repr((function.__module__, function.__name__, args, sorted(kwargs.items()), machine))
        known, value = cache.timed(key)
        if not known:
            value = cast(Any, function)(*args, **kwargs)
            cache.keep_timed(key, value)
        return value

    return cast(Callable[..., _R], call)


@functools.cache
def source_hash() -> str:
    """Hash the source of this backend and of the operators that it lowers."""
    here = Path(__file__).resolve().parent
    files = sorted([*here.rglob("*.py"), *here.rglob("*.cu"), *(here.parents[1] / "ir").glob("*.py")])
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


@functools.cache
def versions() -> tuple[str, ...]:
    """Name the versions that compiled code depends on, besides PyTorch's minor version."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return torch.__version__, str(torch.version.cuda), triton


@functools.cache
def processor() -> str:
    """Describe the CPU: code for it may use any of its instructions."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.processor()


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _split(data: bytes) -> tuple[bytes, bytes]:
    return data[:_DIGEST], data[_DIGEST + 1 :]


def _tuples(value: object) -> object:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def prune(folder: Path, limit: int) -> None:
    """Delete the least recently used packages in ``folder`` beyond ``limit`` bytes."""
    entries = sorted(((p.stat(), p) for p in folder.glob(f"*{_SUFFIX}")), key=lambda e: -e[0].st_mtime)
    total = 0
    for found, path in entries:
        total += found.st_size
        if total > limit:
            path.unlink(missing_ok=True)
