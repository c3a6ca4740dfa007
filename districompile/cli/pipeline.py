# SPDX-License-Identifier: Apache-2.0
"""Open the pipeline of a model, and put a bundle into it, in the process of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from districompile.bundle.bundle import Bundle
from districompile.cli.common import UsageError
from districompile.cli.generate import place
from districompile.ir.spec import dtype_of
from districompile.live.autoencoder import load_vae, parts_at
from districompile.models.autoencoder import ENCODER
from districompile.models.sources import load_pipeline, network_name
from districompile.plan.options import PlanOptions
from districompile.runtime.load import load
from districompile.runtime.module import DistributedModule
from districompile.runtime.opening import check_device, check_native_code

_OF_LATENTS = ("latent_channels", "scaling_factor", "shift_factor")  # what a VAE's configuration says about latents
MEETING = 10  # times the timeout: until all ranks have loaded the pipeline, and one has checked the hashes


def open_pipeline(model: str, options: PlanOptions) -> Any:
    """Return the unmodified pipeline of ``model``, without its network, in the dtype of a plan's ``options``.

    Raises :class:`~districompile.models.inputs.ModelError` if there is no whole pipeline.
    """
    return load_pipeline(model, dtype_of(options.dtype or "float32"))


def attach(pipe: Any, bundle: Path, vae: Path | None = None, **loading: Any) -> DistributedModule:
    """Load a bundle together with the other ranks, put it into ``pipe`` as its network, and return it.

    The other networks move to its device. ``vae`` holds bundles of its VAE: all ranks have to decode then.
    ``loading`` are options of :func:`districompile.load`.
    """
    compiled = load(bundle, **loading)
    place(pipe, compiled.device)
    setattr(pipe, network_name(pipe), compiled)
    if vae is not None:
        pipe.vae = load_vae(vae, **{name: value for name, value in loading.items() if name != "shapes"})
    return compiled


def check_vae(
    vae: Path, ranks: int, pipe: Any = None, *, device: str | None = None, native_code: bool = True,
    encodes: bool = False,
) -> None:  # fmt: skip
    """Check that ``vae`` holds bundles of an autoencoder that ``ranks`` processes and the pipeline can use.

    ``encodes``: the pipeline starts from a picture. Raises :class:`UsageError`.
    """
    found = parts_at(vae)
    held = dict(getattr(getattr(pipe, "vae", None), "config", {}))
    for part, folder in found.items():
        opened = Bundle.open(folder, verify="quick")
        check_device(opened, device)
        check_native_code(opened, native_code)
        if opened.plan.world_size != ranks:
            raise UsageError(
                f"--vae {vae}: its {part} is for {opened.plan.world_size} processes, and the network for {ranks}: "
                f"convert it with --gpus {ranks}"
            )
        given = opened.manifest.get("config") or {}
        other = next((k for k in _OF_LATENTS if held and held.get(k) != given.get(k)), None)
        if other is not None:
            raise UsageError(
                f"--vae {vae} is of another VAE than the pipeline has: its {other} is {given.get(other)}, not "
                f"{held.get(other)}"
            )
    if encodes and ENCODER not in found:
        raise UsageError(f"--vae {vae} has no encoder, which --image needs: convert the VAE with --part both")
