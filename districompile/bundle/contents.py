# SPDX-License-Identifier: Apache-2.0
"""What lies in the folder of a bundle, and whether another bundle may take its place.

``vae`` in a bundle's folder holds bundles of the autoencoder of its pipeline: one, or one for each part. The manifest
around it has the hashes of their manifests, so that it covers their files too, and its signature signs them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from districompile.bundle.manifest import MANIFEST, PLAN, WEIGHTS
from districompile.common.outputs import OutputError, check_folder, other_file
from districompile.errors import BundleError

VAE = "vae"
_PLACES = (VAE, f"{VAE}/decoder", f"{VAE}/encoder")


def check_contents(path: Path) -> dict[str, Any]:
    """Return the files of the bundle at ``path``, those of its VAE included; none if nothing is there.

    Raises :class:`BundleError` if the folder holds other files, or cannot be written at all."""
    try:
        check_folder(path)
    except OutputError as e:
        reason = f"{path} exists and is not a bundle: choose another place" if os.path.isfile(path) else str(e)
        raise BundleError(reason) from e
    if not path.exists() or not any(path.iterdir()):
        return {}
    if manifest_of(path) is None:
        raise BundleError(f"{path} exists and is not a bundle: choose another place, or remove it")
    files = dict.fromkeys([*_files_of(path), *(f"{p}/{n}" for p in vae_places(path) for n in _files_of(path / p))])
    other = other_file(Path(os.path.realpath(path)), files)
    if other is not None:
        raise BundleError(f"{path} holds {other}, which is not a file of the bundle: move it, or choose another place")
    return files


def vae_places(folder: Path) -> list[str]:
    """Return where bundles of a VAE are in the folder of a bundle: ``vae``, or the parts ``vae/decoder`` and so on."""
    return [place for place in _PLACES if (folder / place / MANIFEST).is_file()]


def vae_hashes(folder: Path) -> dict[str, Any]:
    """Return the hash that the manifest of each of the VAE's bundles in ``folder`` holds, by place."""
    return {place: (manifest_of(folder / place) or {}).get("sha256") for place in vae_places(folder)}


def listed_files(folder: Path) -> list[str]:
    """Return the files of the bundle in ``folder`` that are there: its manifest and those that this lists."""
    home = folder.resolve()
    listed = [*((manifest_of(folder) or {}).get("files") or ()), MANIFEST]
    return [n for n in listed if (folder / n).is_file() and (folder / n).resolve().is_relative_to(home)]


def _files_of(folder: Path) -> list[str]:
    """Return the files that a bundle in ``folder`` may have: the listed ones, and what is made when it is loaded."""
    caches = [p.relative_to(folder).as_posix() for p in folder.glob("cache/tensorrt*.cache")]
    return [*((manifest_of(folder) or {}).get("files") or ()), MANIFEST, *caches]


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a folder that is a bundle of any version, complete or not; None for any other folder."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
        whole = isinstance(manifest["format_version"], int) and PLAN in files and WEIGHTS in files
        whole = whole and all({"size", "sha256"} <= entry.keys() for entry in files.values())
        whole = whole and not any(".." in PurePosixPath(n).parts or PurePosixPath(n).is_absolute() for n in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if whole else None


def check_replaceable(
    path: Path, made_with: Mapping[str, Any], force: bool, refits: Sequence[Mapping[str, Any]] = (),
    added: Sequence[str] = (),
) -> None:  # fmt: skip
    """Check, before any work, that a bundle can be written to ``path``.

    ``made_with`` is compared with the manifest there, ``refits`` with the weights that were put into that bundle
    since, and ``added`` with the shapes that were added. Raises :class:`BundleError` if ``path`` cannot be written.
    Unless ``force`` is given, also if the bundle there was made from another model or with other options, or has a
    VAE that was not made with it."""
    if not check_contents(path) or force:
        return
    there = manifest_of(path) or {}

    def notes(refits: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in note.items() if k != "weights_sha256"} for note in refits]

    wanted = {"made_with": made_with, "refits": notes(refits), "added": list(added)}
    found = {
        "made_with": there.get("made_with"), "refits": notes(there.get("refits") or ()),
        "added": list(there.get("added") or ()),
    }  # fmt: skip
    way_out = "give --force (force=True) to replace it, or choose another place"
    if found != json.loads(json.dumps(wanted, default=str)):
        raise BundleError(f"{path} is a bundle of another model, or made with other options: {way_out}")
    own = there.get(VAE)
    if not vae_hashes(path).items() <= (own if isinstance(own, dict) else {}).items():
        raise BundleError(f"{path / VAE} was not made with the bundle around it: {way_out}")
