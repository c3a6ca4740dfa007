"""Bundles on disk: written beside their place and renamed, checked when opened, never a pickle.

manifest.json        format and tool versions, the model's class and configuration, backend, mesh, files with sha256
plan.json, plan.txt  what the runtime executes, and the same for people
weights.safetensors  every weight once
engines/             one file for each distinct segment, named by its content, and what those call
graphs/              what the passes saw, on request
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from districompile.errors import BundleError
from districompile.ir.plan import Plan
from districompile.ir.validate import validate
from districompile.manifest import AGAIN as _AGAIN
from districompile.manifest import FORMAT_VERSION as FORMAT_VERSION
from districompile.manifest import MANIFEST as MANIFEST
from districompile.manifest import PLAN as PLAN
from districompile.manifest import WEIGHTS as WEIGHTS
from districompile.manifest import check_places, manifest_text, read_manifest
from districompile.outputs import OutputError, check_folder, foreign, part_name, remove_files, uninterrupted

PLAN_TEXT = "plan.txt"
ENGINES = "engines"

_CHUNK = 1 << 22
_PACKAGES = ("districompile", "torch", "numpy", "onnx", "onnxscript", "onnxruntime", "diffusers", "transformers")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class BundleWriter:
    """Writes a bundle: everything into a folder beside ``path``, which takes its place when ``finish`` was reached.

    A context manager. Leaving it without :meth:`finish`, or by an exception, removes what was written and leaves a
    bundle that was there before as it was. An ``OSError`` inside becomes a one-line :class:`BundleError`. ``path`` may
    be a bundle and nothing else, which is replaced, or an empty folder; anything else is refused at once. A link stays
    a link: what it leads to is replaced.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path_given = Path(path)
        self.target = Path(path).absolute()
        self._hashes: dict[str, str] = {}
        self._made: list[Path] = []
        self._finished = False

    def __enter__(self) -> BundleWriter:
        _check_contents(self.path_given)
        self.target = Path(os.path.realpath(self.path_given))
        self.folder = self.target.parent / part_name()
        missing = [p for p in self.target.parents if not p.exists()]
        try:
            with uninterrupted():
                for parent in reversed(missing):
                    parent.mkdir(exist_ok=True)
                    self._made.insert(0, parent)
                self.folder.mkdir()
        except BaseException as e:
            self._clean()
            if isinstance(e, OSError):
                raise self._error(e) from e
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with uninterrupted():
            try:
                if error is None and self._finished:
                    self._move()
            except OSError as e:
                raise self._error(e) from e
            finally:
                self._clean()
        if isinstance(error, OSError) or (isinstance(error, Exception) and _tells_full_disk(error)):
            raise self._error(error) from error

    def path(self, name: str) -> Path:
        """Where to write the file ``name`` ("weights.safetensors"); its folder exists."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def text(self, name: str, text: str) -> None:
        """Write a text file."""
        data = text.encode()
        self.path(name).write_bytes(data)
        self._hashes[name] = hashlib.sha256(data).hexdigest()

    def copy(self, name: str, source: Path) -> None:
        """Copy a file, hashing it on the way."""
        digest = hashlib.sha256()
        with source.open("rb") as src, self.path(name).open("wb") as dst:
            while block := src.read(_CHUNK):
                digest.update(block)
                dst.write(block)
        self._hashes[name] = digest.hexdigest()

    def known(self, name: str, sha256: str) -> None:
        """Note the hash of a file, where whoever wrote it knows it: it is not read again."""
        self._hashes[name] = sha256

    def hash_of(self, name: str) -> str:
        """The hash of a file that was written or noted."""
        return self._hashes[name]

    def share(self, name: str, bundle: Bundle) -> None:
        """Take a file of another bundle over: the same bytes, linked where the file system can."""
        source, target = bundle.path / name, self.path(name)
        try:
            os.link(source, target)
        except OSError:
            self.copy(name, source)
        self._hashes[name] = bundle.manifest["files"][name]["sha256"]

    def finish_like(self, bundle: Bundle, **changes: Any) -> None:
        """Write the manifest of ``bundle``, with ``changes`` and the files that are here now."""
        created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        manifest = {**bundle.manifest, **changes, "created": created, "files": self._files(None)}
        self.path(MANIFEST).write_text(manifest_text(manifest))
        self._finished = True

    def finish(
        self,
        plan: Plan,
        plan_text: str,
        *,
        backend: str,
        device: str = "cpu",
        source: str | None = None,
        model_class: str | None = None,
        config: Mapping[str, Any] | None = None,
        graphs: Mapping[str, str] | None = None,
        engines: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        made_with: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the plan and the manifest, when weights and engines are there.

        ``source`` is where the model came from (a folder or hub id), ``config`` its configuration, of which what JSON
        cannot hold is kept as text. ``graphs`` are dumps by file name. ``engines`` says what built the engines, and for
        which devices, where that matters. ``made_with`` is what it was made from, and with which options.
        """
        text = plan.to_json()
        validate(Plan.from_json(text))  # what could not be opened is not written
        self.text(PLAN, text)
        self.text(PLAN_TEXT, plan_text)
        for name, text in (graphs or {}).items():
            self.text(f"graphs/{name}", text)
        manifest = {
            "format_version": FORMAT_VERSION,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "versions": _versions(),
            "source": source,
            "class": model_class,
            "backend": backend,
            "device": device,
            "engines": None if engines is None else dict(engines),
            "mesh": _mesh(plan),
            "config": None if config is None else dict(config),
            "made_with": None if made_with is None else dict(made_with),
            "files": self._files(progress),
        }
        self.path(MANIFEST).write_text(manifest_text(manifest))
        self._finished = True

    def _files(self, progress: Progress | None) -> dict[str, dict[str, Any]]:
        """Size and sha256 of every file, hashing those whose hash is not known yet."""
        files = {p.relative_to(self.folder).as_posix(): p for p in sorted(self.folder.rglob("*")) if p.is_file()}
        unknown = {name: path for name, path in files.items() if name not in self._hashes}
        self._hashes |= hash_files(unknown, progress)
        return {name: {"size": path.stat().st_size, "sha256": self._hashes[name]} for name, path in files.items()}

    def _move(self) -> None:
        """Put the new folder in place; the old one, if any, goes only when the new one is there."""
        if not self.target.exists():
            self.folder.rename(self.target)
            return
        replaced = _check_contents(self.path_given)  # once more: somebody may have come meanwhile
        old = self.folder.with_suffix(".old")
        self.target.rename(old)
        try:
            self.folder.rename(self.target)
        except OSError:
            old.rename(self.target)
            raise
        remove_files(old, replaced)

    def _clean(self) -> None:
        """Remove what is not finished, and folders that were made for it and hold nothing else."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in self._made:
            with contextlib.suppress(OSError):
                parent.rmdir()

    def _error(self, error: BaseException) -> BundleError:
        reason = (isinstance(error, OSError) and error.strerror) or str(error).splitlines()[0]
        way_out = "free some space, or choose another place" if _tells_full_disk(error) else "choose another place"
        return BundleError(f"cannot write the bundle {self.target}: {reason}: {way_out}; nothing was left behind")


class Bundle:
    """A bundle opened for reading."""

    def __init__(self, path: Path, manifest: dict[str, Any], plan: Plan) -> None:
        self.path = path
        self.manifest = manifest
        self.plan = plan

    @staticmethod
    def open(
        path: str | os.PathLike[str], verify: bool | Literal["quick"] = True, progress: Progress | None = None
    ) -> Bundle:
        """Open and check a bundle: format version, files, sizes and hashes (``"quick"``: no hashes; False: neither).

        Raises :class:`BundleError`, one line that names the file and the way out.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        files = manifest["files"]
        check_places(folder, files, ENGINES)
        if verify:
            for name in files:
                _check_size(folder, name, folder / name, files[name]["size"])
        if verify is True:
            check_hashes(folder, {name: entry["sha256"] for name, entry in files.items()}, progress)
        try:
            plan = Plan.from_json((folder / PLAN).read_text(encoding="utf-8"))
            validate(plan)
        except OSError as e:
            raise BundleError(f"{folder / PLAN} cannot be read: {e.strerror}{_AGAIN}") from e
        except UnicodeDecodeError as e:
            raise BundleError(f"{folder / PLAN} cannot be read: {e}{_AGAIN}") from e
        except BundleError as e:
            raise BundleError(f"{folder}: {e}{_AGAIN}") from e
        if manifest["mesh"] != _mesh(plan):
            raise BundleError(f"{folder}: its plan is for {_mesh(plan)}, its manifest for {manifest['mesh']}{_AGAIN}")
        return Bundle(folder, manifest, plan)

    @property
    def weights_path(self) -> Path:
        return self.path / WEIGHTS

    def engine_path(self, engine: str, suffix: str = "") -> Path:
        """The file of an engine as the plan names it. ``suffix`` is the backend's: the plan may leave it out, and what
        another backend built its engine from lies beside that engine, with another ending."""
        own = f"{ENGINES}/{engine.partition('.')[0]}{suffix}"
        for name in (own, f"{ENGINES}/{engine}"):
            if name in self.manifest["files"] and (self.path / name).is_file():
                return self.path / name
        raise BundleError(f"{self.path / ENGINES / engine} is missing{_AGAIN}")


def _mesh(plan: Plan) -> dict[str, int]:
    return {"cfg": 2 if plan.options.get("cfg") == "split" else 1, "patch": plan.ranks}


def hash_files(paths: Mapping[str, Path], progress: Progress | None = None) -> dict[str, str]:
    """sha256 in hex of each file; ``progress`` is told the bytes done and in all."""
    total = sum(p.stat().st_size for p in paths.values())
    done = 0
    hashes = {}
    buffer = memoryview(bytearray(_CHUNK))
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
            raise BundleError(f"{path} cannot be read: {e.strerror}{_AGAIN}") from e
        hashes[name] = digest.hexdigest()
    return hashes


def check_hashes(folder: Path, expected: Mapping[str, str], progress: Progress | None = None) -> None:
    """Raise :class:`BundleError` for a file of a bundle whose sha256 is not the one that is expected."""
    for name, sha256 in hash_files({name: folder / name for name in expected}, progress).items():
        if sha256 != expected[name]:
            raise BundleError(f"{folder / name} was changed: its hash is not the one in {MANIFEST}{_AGAIN}")


def _check_size(folder: Path, name: str, file: Path, size: int) -> None:
    if not file.is_file():
        raise BundleError(f"{folder / name} is missing{_AGAIN}")
    if file.stat().st_size != size:
        raise BundleError(f"{folder / name} has {file.stat().st_size} bytes instead of {size}{_AGAIN}")


def _check_contents(path: Path) -> dict[str, Any]:
    """The files of the bundle at ``path``, none where nothing is there. Raises :class:`BundleError` where the folder is
    not wholly a bundle, or cannot be written at all."""
    try:
        check_folder(path)
    except OutputError as e:
        told = f"{path} exists and is not a bundle: choose another place" if os.path.isfile(path) else str(e)
        raise BundleError(told) from e
    if not path.exists() or not any(path.iterdir()):
        return {}
    manifest = _manifest_of(path)
    if manifest is None:
        raise BundleError(f"{path} exists and is not a bundle: choose another place, or remove it")
    caches = [p.relative_to(path).as_posix() for p in path.glob("cache/tensorrt*.cache")]  # made when it is loaded
    files = {**manifest["files"], **dict.fromkeys((MANIFEST, *caches))}
    other = foreign(Path(os.path.realpath(path)), files)
    if other is not None:
        raise BundleError(f"{path} holds {other}, which is not a file of the bundle: move it, or choose another place")
    return files


def _manifest_of(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder that is a bundle of any version, whole or not."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
        ours = isinstance(manifest["format_version"], int) and PLAN in files and WEIGHTS in files
        ours = ours and all({"size", "sha256"} <= entry.keys() for entry in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if ours else None


def check_replaceable(
    path: Path, made_with: Mapping[str, Any], force: bool, refits: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Raise :class:`BundleError`, before any work, where a bundle cannot be written to ``path``, or would replace one
    that was made from another model or with other options, unless ``force`` is given.

    ``made_with`` is compared with what the manifest there records, and ``refits`` with the weights it was given since.
    """
    if not _check_contents(path) or force:
        return
    there = _manifest_of(path) or {}

    def notes(refits: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in note.items() if k != "weights_sha256"} for note in refits]

    wanted = {"made_with": made_with, "refits": notes(refits)}
    found = {"made_with": there.get("made_with"), "refits": notes(there.get("refits") or ())}
    if found != json.loads(json.dumps(wanted, default=str)):
        raise BundleError(
            f"{path} is a bundle of another model, or made with other options: "
            "give --force (force=True) to replace it, or choose another place"
        )


def _tells_full_disk(error: BaseException) -> bool:
    """Also of libraries that write for themselves and report errors in their own way."""
    return (isinstance(error, OSError) and error.errno in _FULL) or "No space left on device" in str(error)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
