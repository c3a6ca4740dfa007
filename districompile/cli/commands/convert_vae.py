# SPDX-License-Identifier: Apache-2.0
"""Convert the VAE of a pipeline into the folder of its network's bundle, so that all GPUs decode.

It is the default for GPUs. The bundle of the network is whole before the VAE is converted, and stays as it is where
that fails. The VAE is made beside it, and put into it at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from districompile.backends.base import Backend
from districompile.bundle.bundle import Bundle
from districompile.bundle.contents import VAE
from districompile.bundle.own_vae import beside, put_vae
from districompile.cli.common import UsageError, console, folder_bytes
from districompile.cli.convert import Settings
from districompile.cli.options import DEFAULT_DTYPE, Dtype
from districompile.errors import BackendError, Error
from districompile.models.autoencoder import autoencoder_of, overflows_in_float16
from districompile.models.inputs import ModelError
from districompile.plan.plan import ExecutionPlan
from districompile.plan.report import size


def wanted_vae(settings: Settings, backend: Backend) -> str | None:
    """Return the VAE to convert behind the network, as a model of its own; None for no VAE.

    Raises :class:`UsageError` where ``--vae`` asks for one and there is none that can be converted.
    """
    asked, on_gpus = settings.vae, backend.device.startswith("cuda") and settings.ranks > 1
    if asked is False or not (asked or on_gpus):
        return None
    reason = None
    if settings.stop_after is not None:
        reason = "not with --stop-after, which makes no bundle"
    elif settings.input:
        reason = "not with --input: a VAE is converted for sizes of the picture"
    try:
        found = None if reason is not None else autoencoder_of(settings.model)
    except ModelError as e:
        if not asked:
            note(e)
            return None
        raise UsageError(f"--vae: {e}") from e
    if found is None and asked:
        raise UsageError(f"--vae: {reason or f'{settings.model} is not the folder of a pipeline with a VAE'}")
    return found


def convert_into(
    path: Path, model: str, settings: Settings, convert: Callable[[Settings], Sequence[Any]]
) -> Path | None:
    """Convert the VAE ``model`` like the bundle at ``path``, and put it there. Return its folder.

    ``settings`` are those of the bundle. ``convert`` converts by settings, and returns something for each part. Where
    nobody asked for a VAE, one that cannot be converted is a note.
    """
    started = time.perf_counter()
    try:
        with beside(path) as folder:
            parts = convert(_settings(Bundle.open(path, verify=False), model, settings, folder / VAE))
            put_vae(path, folder)
    except torch.OutOfMemoryError as e:
        raise_or_note(settings, BackendError(f"the GPU has too little memory: {str(e).splitlines()[0]}"))
        return None
    except Error as e:
        raise_or_note(settings, e)
        return None
    seconds = round(time.perf_counter() - started, 2)
    if not settings.as_json:
        names = " and encoder" if len(parts) > 1 else ""
        console().print(
            f"{path / VAE}: {size(folder_bytes(path / VAE))}, decoder{names} of the VAE, made in {seconds} s",
            markup=False,
            highlight=False,
        )
    return path / VAE


def raise_or_note(settings: Settings, error: Error) -> None:
    """Raise the error if a VAE was asked for, else say why there is none."""
    if settings.vae:
        raise error
    note(error)


def note(error: Error) -> None:
    """Say why a bundle has no VAE."""
    print(f"note: the VAE is not converted, so that the first process decodes alone: {error}", file=sys.stderr)


def sizes_of(plans: Sequence[ExecutionPlan]) -> tuple[str, ...]:
    """Return the sizes of pictures that plans draw, as ``--size`` takes them. Raises :class:`UsageError` for none."""
    known = [(p.options.width, p.options.height) for p in plans]
    if any(width is None or height is None for width, height in known):
        raise UsageError("the network does not say for which size of the picture it is: give --size")
    return tuple(dict.fromkeys(f"{width}x{height}" for width, height in known))


def _settings(bundle: Bundle, model: str, settings: Settings, out: Path) -> Settings:
    """Return the settings of ``convert`` for the VAE: those of the network that have a meaning for it."""
    backend = str(bundle.manifest["backend"])
    dtype: Dtype = settings.dtype or DEFAULT_DTYPE
    if dtype == "float16" and overflows_in_float16(model):
        dtype = "float32"
        print("chosen for the VAE: float32, because its force_upcast says that float16 overflows", file=sys.stderr)
    kept = ("rules", "extension", "strict", "optimise", "segments", "batch")
    return Settings(
        model=model, gpus=bundle.plan.world_size, size=sizes_of(list(bundle.plans.values())), backend=backend,
        backend_option=settings.backend_option if backend == settings.backend_name else (), dtype=dtype, vae=False,
        dump=None if settings.dump is None else settings.dump / VAE, out=out, as_json=True,
        **{name: getattr(settings, name) for name in kept},
    )  # fmt: skip
