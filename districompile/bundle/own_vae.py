# SPDX-License-Identifier: Apache-2.0
"""The VAE in the folder of a bundle: put it there, find it, and take it along where the bundle is written anew."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from districompile.bundle.bundle import Bundle, BundleWriter
from districompile.bundle.contents import VAE, listed_files, vae_hashes, vae_places
from districompile.bundle.manifest import read_manifest
from districompile.common.locks import held
from districompile.common.outputs import part_name, uninterrupted
from districompile.errors import BundleError


def own_vae(bundle: Bundle) -> tuple[Path | None, str | None]:
    """Return the folder of a bundle's VAE, or why the one there is not to be used. Neither where there is none.

    Its files are not checked: those who load it do that.
    """
    said = bundle.manifest.get(VAE) or {}
    folder, places = bundle.path / VAE, vae_places(bundle.path)
    if not said and not places:
        return None, None
    if not places:
        return None, f"{folder} is missing: copy the bundle again"
    try:
        there = {place: read_manifest(bundle.path / place)["sha256"] for place in places}
    except BundleError as e:
        return None, str(e)
    if there != said:
        return None, f"{folder} was not made with the bundle, or was changed since (--vae {folder} takes it as it is)"
    return folder, None


def keep_vae(bundle: Bundle, writer: BundleWriter) -> None:
    """Add what the folder of a bundle has of a VAE to the bundle that is written in its place, or beside it."""
    _add(writer, bundle.path)


def put_vae(path: Path, made: Path) -> None:
    """Put a VAE into the bundle at ``path``: the folder ``made/vae``. One that is there is replaced.

    The bundle is replaced at once, by one of the same files: it has all of the VAE or none. Raises
    :class:`BundleError`."""
    with held(path):
        bundle = Bundle.open(path, verify="quick")
        with BundleWriter(path) as writer:
            for name in bundle.manifest["files"]:
                writer.share(name, bundle)
            _add(writer, made)
            writer.finish_like(bundle, vae=vae_hashes(made))


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Make a folder beside the bundle at ``path``, in which a VAE for it is made. It is removed in the end."""
    folder = Path(os.path.realpath(path)).parent / part_name()
    try:
        with uninterrupted():
            folder.mkdir()
    except OSError as e:
        raise BundleError(f"{folder} cannot be written: {e.strerror or e}; choose another place") from e
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def copy_vae(bundle: Bundle, folder: Path) -> list[Path]:
    """Copy the VAE of a bundle to ``folder/vae``, by hard links where there are any. Return its bundles there."""
    places = vae_places(bundle.path)
    for place in places:
        for name in listed_files(bundle.path / place):
            source, target = bundle.path / place / name, folder / place / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target)
            except OSError:
                shutil.copyfile(source, target)
    return [folder / place for place in places]


def _add(writer: BundleWriter, home: Path) -> None:
    for place in vae_places(home):
        for name in listed_files(home / place):
            writer.place(f"{place}/{name}", home / place / name)
