# SPDX-License-Identifier: Apache-2.0
"""Bundles on disk: written beside their final place and renamed, checked when opened, without pickles.

manifest.json        format and tool versions, the model's class and configuration, backend, mesh, files with sha256
plan.json, plan.txt  the plan that the runtime executes, and the same as text for people
plans/               the plans of further shapes
weights.safetensors  every weight once
engines/             one file for each distinct segment, named by its content, and the files that those call
graphs/              the graphs that passes worked on, on request
vae/                 bundles of the pipeline's VAE, which have manifests of their own (:mod:`.contents`)"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import hashlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from districompile.bundle.contents import VAE, check_contents
from districompile.bundle.contents import check_replaceable as check_replaceable
from districompile.bundle.hashes import CHUNK, Progress, check_size, hash_files
from districompile.bundle.hashes import check_hashes as check_hashes
from districompile.bundle.manifest import AGAIN as _AGAIN
from districompile.bundle.manifest import FORMAT_VERSION as FORMAT_VERSION
from districompile.bundle.manifest import MANIFEST as MANIFEST
from districompile.bundle.manifest import PLAN as PLAN
from districompile.bundle.manifest import WEIGHTS as WEIGHTS
from districompile.bundle.manifest import check_places, manifest_text, read_manifest
from districompile.bundle.plans import plan_file, read_plans
from districompile.common.outputs import part_name, remove_files, uninterrupted
from districompile.errors import BundleError
from districompile.ir.operators import Provider
from districompile.ir.report_builder import QuantisedLayer
from districompile.ir.spec import TensorSpec
from districompile.plan.plan import ExecutionPlan
from districompile.plan.validate import validate

ENGINES = "engines"

_PACKAGES = ("districompile", "torch", "numpy", "onnx", "onnxscript", "onnxruntime", "diffusers", "transformers")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BundleWriter:
    """Write a bundle into a folder beside ``path``, which replaces ``path`` after :meth:`finish`.

    A context manager. Leaving it without :meth:`finish`, or by an exception, removes the new files and keeps an earlier
    bundle as it was. An ``OSError`` inside becomes a one-line :class:`BundleError`. ``path`` may be a bundle and
    nothing else, which is replaced, or an empty folder. Anything else is refused at once. A link stays a link: its
    target is replaced."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path_given = Path(path)
        self.target = Path(path).absolute()
        self._hashes: dict[str, str] = {}
        self._made: list[Path] = []
        self._finished = False

    def __enter__(self) -> BundleWriter:
        check_contents(self.path_given)
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
        if isinstance(error, OSError) or (isinstance(error, Exception) and _means_full_disk(error)):
            raise self._error(error) from error

    def path(self, name: str) -> Path:
        """Return where to write the file ``name`` ("weights.safetensors"). Its folder exists."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def text(self, name: str, text: str) -> None:
        """Write a text file."""
        data = text.encode()
        self.path(name).write_bytes(data)
        self._hashes[name] = hashlib.sha256(data).hexdigest()

    def copy(self, name: str, source: Path) -> None:
        """Copy a file, and hash it on the way."""
        digest = hashlib.sha256()
        with source.open("rb") as src, self.path(name).open("wb") as dst:
            while block := src.read(CHUNK):
                digest.update(block)
                dst.write(block)
        self._hashes[name] = digest.hexdigest()

    def known(self, name: str, sha256: str) -> None:
        """Record the hash of a file from its writer, so that the file is not read again."""
        self._hashes[name] = sha256

    def hash_of(self, name: str) -> str:
        """Return the hash of a file that was written or recorded."""
        return self._hashes[name]

    def share(self, name: str, bundle: Bundle) -> None:
        """Add a file of another bundle with the same bytes, as a hard link if the file system supports it."""
        self.place(name, bundle.path / name)
        self._hashes[name] = bundle.manifest["files"][name]["sha256"]

    def place(self, name: str, source: Path) -> None:
        """Add a file as it is, as a hard link if the file system supports it."""
        try:
            os.link(source, self.path(name))
        except OSError:
            self.copy(name, source)

    def plan(self, plan: ExecutionPlan, text: str, shape: str | None = None) -> None:
        """Write the plan of the first shape, or of the further ``shape``, and the same as ``text`` for people."""
        data = plan.to_json()
        validate(ExecutionPlan.from_json(data))  # a bundle that could not be opened is not written
        file = PLAN if shape is None else plan_file(shape)
        self.text(file, data)
        self.text(file.removesuffix(".json") + ".txt", text)

    def finish_like(self, bundle: Bundle, progress: Progress | None = None, **changes: Any) -> None:
        """Write the manifest of ``bundle``, with ``changes`` and the current files."""
        created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        manifest = {**bundle.manifest, **changes, "created": created, "files": self._files(progress)}
        self.path(MANIFEST).write_text(manifest_text(manifest))
        self._finished = True

    def finish(
        self,
        plan: ExecutionPlan,
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
        operators: Mapping[str, Provider] = {},
        shapes: Mapping[str, tuple[ExecutionPlan, str]] = {},
    ) -> None:
        """Write the plan and the manifest. Weights and engines must be written already.

        ``source`` is the folder or hub id of the model. ``config`` is its configuration; values that JSON cannot hold
        are kept as text. ``graphs`` are dumps by file name. ``engines`` says what built the engines, and for which
        devices, if that matters. ``made_with`` records the bundle's origin and options. ``operators`` are those of
        other packages that engines call by name, with the package that declares each. ``shapes`` are the plans of
        further shapes by name, with their texts."""
        self.plan(plan, plan_text)
        for name, (other, text) in shapes.items():
            self.plan(other, text, name)
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
            "operators": {name: dataclasses.asdict(provider) for name, provider in operators.items()},
            "mesh": _mesh(plan),
            "config": None if config is None else dict(config),
            "made_with": None if made_with is None else dict(made_with),
            "files": self._files(progress),
        }
        self.path(MANIFEST).write_text(manifest_text(manifest))
        self._finished = True

    def _files(self, progress: Progress | None) -> dict[str, dict[str, Any]]:
        """Return size and sha256 of every file but the VAE's. Files without a recorded hash are hashed."""
        files = {p.relative_to(self.folder).as_posix(): p for p in sorted(self.folder.rglob("*")) if p.is_file()}
        files = {name: path for name, path in files.items() if not name.startswith(f"{VAE}/")}
        unknown = {name: path for name, path in files.items() if name not in self._hashes}
        self._hashes |= hash_files(unknown, progress)
        return {name: {"size": path.stat().st_size, "sha256": self._hashes[name]} for name, path in files.items()}

    def _move(self) -> None:
        """Put the new folder in place. An old one is removed only once the new one is there."""
        if not self.target.exists():
            self.folder.rename(self.target)
            return
        replaced = check_contents(self.path_given)  # again: another process may have written there since
        old = self.folder.with_suffix(".old")
        self.target.rename(old)
        try:
            self.folder.rename(self.target)
        except OSError:
            old.rename(self.target)
            raise
        remove_files(old, replaced)

    def _clean(self) -> None:
        """Remove unfinished files, and folders that were made for them and hold nothing else."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in self._made:
            with contextlib.suppress(OSError):
                parent.rmdir()

    def _error(self, error: BaseException) -> BundleError:
        reason = (isinstance(error, OSError) and error.strerror) or str(error).splitlines()[0]
        way_out = "free some space, or choose another place" if _means_full_disk(error) else "choose another place"
        return BundleError(f"cannot write the bundle {self.target}: {reason}: {way_out}; nothing was left behind")


class Bundle:
    """A bundle opened for reading.

    ``plans`` has the plan of each shape by its name, and ``plan`` is the first of them."""

    def __init__(self, path: Path, manifest: dict[str, Any], plans: Mapping[str, ExecutionPlan]) -> None:
        self.path = path
        self.manifest = manifest
        self.plans = dict(plans)
        self.plan = next(iter(self.plans.values()))

    @staticmethod
    def open(
        path: str | os.PathLike[str], verify: bool | Literal["quick"] = True, progress: Progress | None = None
    ) -> Bundle:
        """Open and check a bundle: format version, files, sizes and hashes (``"quick"``: no hashes; False: neither).

        Raises :class:`BundleError`, one line that names the file and what to do."""
        folder = Path(path)
        manifest = read_manifest(folder)
        files = manifest["files"]
        check_places(folder, files, ENGINES)
        if verify:
            for name in files:
                check_size(folder, name, files[name]["size"])
        if verify is True:
            check_hashes(folder, {name: entry["sha256"] for name, entry in files.items()}, progress)
        plans = read_plans(folder, files)
        plan = next(iter(plans.values()))
        if manifest["mesh"] != _mesh(plan):
            raise BundleError(f"{folder}: its plan is for {_mesh(plan)}, its manifest for {manifest['mesh']}{_AGAIN}")
        return Bundle(folder, manifest, plans)

    @property
    def operators(self) -> list[tuple[str, Provider]]:
        """The operators of other packages that engines call by name, with who declared them at conversion."""
        return [(name, Provider(**entry)) for name, entry in (self.manifest.get("operators") or {}).items()]

    @property
    def weights(self) -> dict[str, TensorSpec]:
        """The weights of all shapes."""
        return {name: spec for plan in self.plans.values() for name, spec in plan.weights.items()}

    @property
    def joined(self) -> dict[str, tuple[tuple[str, int], ...]]:
        """The weights that passes joined of several: their names and rows (:class:`PlanReport`)."""
        return {name: parts for plan in self.plans.values() for name, parts in plan.report.joined.items()}

    @property
    def quantised(self) -> dict[str, QuantisedLayer]:
        """The layers in 8 bits, by the names of their 8-bit weights and of the scales."""
        layers = [x for plan in self.plans.values() for x in plan.report.quantised if x.reason is None]
        return {name: x for x in layers for name in (x.values_name, x.scale_name, x.input_scale_name)}

    @property
    def weights_path(self) -> Path:
        return self.path / WEIGHTS

    def engine_path(self, engine: str, suffix: str = "") -> Path:
        """Return the file of an engine as the plan names it.

        The plan may leave out ``suffix``, which is the backend's. The file from which another backend built its engine
        lies beside that engine, with another ending."""
        own = f"{ENGINES}/{engine.partition('.')[0]}{suffix}"
        for name in (own, f"{ENGINES}/{engine}"):
            if name in self.manifest["files"] and (self.path / name).is_file():
                return self.path / name
        raise BundleError(f"{self.path / ENGINES / engine} is missing{_AGAIN}")


def _mesh(plan: ExecutionPlan) -> dict[str, int]:
    return {"cfg": plan.guidance_halves, "patch": plan.ranks}


def _means_full_disk(error: BaseException) -> bool:
    """Return whether the disk is full, also for libraries that write files and report errors in their own way."""
    return (isinstance(error, OSError) and error.errno in _FULL) or "No space left on device" in str(error)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
