# SPDX-License-Identifier: Apache-2.0
"""The manifest of a bundle: its fields, its own hash, and the files that it may list.

Hashes reveal damage and files that do not belong together. They do not reveal who made a bundle: whoever changes a file
can change its hash as well. ``manifest.json`` covers every other file, so a signature of it signs the bundle. Of a VAE
in the bundle's folder it has the hashes of the manifests (``vae``), which cover that one's files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from districompile.errors import BundleError

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
PLAN = "plan.json"
PLANS = "plans"  # the folder of further shapes' plans
WEIGHTS = "weights.safetensors"
AGAIN = ": copy the bundle again, or convert again"

_FACTORY = re.compile(r"[A-Za-z_][\w.-]*:.*")
_NAME = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*){0,3}", re.ASCII)
_Key = Annotated[str, Field(pattern=r"^([^_]|_[^_]|_?$)")]  # no Python-internal attribute


_Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+!<>-]{1,200}$")]  # part of an error message of one line
_Place = Annotated[str, Field(pattern=r"^vae(/decoder|/encoder)?$")]
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Operator = Annotated[str, Field(pattern=r"^(functional:)?[A-Za-z0-9_]+[.][A-Za-z0-9_]+[.][A-Za-z0-9_]+$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _File(_Strict):
    size: int = Field(ge=0)
    sha256: _Hash


class _Mesh(_Strict):
    cfg: int = Field(ge=1, le=2)
    patch: int = Field(ge=1)


class _Refit(_Strict):
    weights: str | None = None
    loras: tuple[str, ...] = ()


class _Provider(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    module: _Word
    package: _Word | None = None
    version: _Word | None = None


class _Manifest(_Strict):
    created: str
    versions: dict[str, str]
    source: str | None
    class_: str | None = Field(alias="class")
    backend: str
    device: str = Field(pattern=r"^(cpu|cuda)($|:)")
    engines: dict[str, Any] | None
    mesh: _Mesh
    config: dict[_Key, Any] | None
    made_with: dict[str, Any] | None = None
    files: dict[str, _File]
    operators: dict[_Operator, _Provider] = {}
    refits: tuple[_Refit, ...] = ()
    added: tuple[str, ...] = ()
    vae: dict[_Place, _Hash] = {}


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """Return the manifest as it is stored, with its own hash."""
    plain = json.loads(json.dumps(manifest, default=str))
    return json.dumps({**plain, "sha256": _own_hash(plain)}, indent=1)


def _own_hash(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 of the manifest without its hash, in a form that does not depend on white space or order."""
    rest = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest in ``folder``. Raises :class:`BundleError`, one line, for anything invalid."""
    if not folder.is_dir():
        raise BundleError(f"{folder}: there is no such bundle; make one with `districompile convert`")
    path = folder / MANIFEST
    if not path.is_file():
        inside = sorted(p.parent.name for p in folder.glob(f"*/{MANIFEST}"))
        more = f"; it holds the bundles {', '.join(inside)}: name one, such as {folder / inside[0]}" if inside else ""
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}{more}")
    try:
        text = path.read_text()
        manifest = json.loads(text)
        version = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise BundleError(f"{path} cannot be read ({type(e).__name__}: {e}){AGAIN}") from e
    if version != FORMAT_VERSION:
        versions = manifest.get("versions")
        writer = versions.get("districompile", "unknown") if isinstance(versions, dict) else "unknown"
        raise BundleError(
            f"{folder} has format version {version}, and this districompile reads version {FORMAT_VERSION}: "
            f"use the districompile that wrote it ({writer}), or convert again"
        )
    _check_files(path, manifest.get("files"))
    if manifest.get("sha256") != _own_hash(manifest):
        raise BundleError(f"{path} was changed: its hash is not the one it holds{AGAIN}")
    try:
        _Manifest.model_validate_json(text)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{path} cannot be used: {where}: {first['msg']}{AGAIN}") from None
    return dict(manifest)


def _check_files(path: Path, files: Any) -> None:
    if not isinstance(files, dict) or not {PLAN, WEIGHTS} <= files.keys():
        raise BundleError(f"{path} does not list the bundle's files{AGAIN}")
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or PurePosixPath(name).is_absolute():
            raise BundleError(f"{path} lists the file {name!r} outside of the bundle: do not use this bundle")
        if _NAME.fullmatch(name) is None:
            raise BundleError(f"{path} lists the file {name!r}, which no bundle holds: do not use this bundle")
        if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            raise BundleError(f"{path} lists {name!r} without size and hash{AGAIN}")


def check_places(folder: Path, files: Mapping[str, Any], covered: str) -> None:
    """Check that the files of a bundle are in its folder, and that the manifest lists all in the folder ``covered``.

    Raises :class:`BundleError` for a link to elsewhere, and for an unlisted file: no hash covers it, and an engine may
    load it.
    """
    home = folder.resolve()
    for name in files:
        if not (folder / name).resolve().is_relative_to(home):
            raise BundleError(f"{folder / name} is a link to outside of the bundle: copy the file itself to its place")
    for path in sorted((folder / covered).rglob("*")):
        if not path.is_dir() and path.relative_to(folder).as_posix() not in files:
            raise BundleError(f"{path} is not listed in {MANIFEST}: remove it, or copy the bundle again")


def names_factory(source: str) -> bool:
    """Return whether a model's source is a function to call, not a folder or a hub id.

    Such a source is ``package.module:function``, or the ``source:argument`` of an installed package.
    """
    return _FACTORY.fullmatch(source) is not None and not Path(source).expanduser().is_dir()
