# SPDX-License-Identifier: Apache-2.0
"""Open the pipeline of a model, and put a bundle into it, in the process of one rank."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from districompile.bundle.bundle import Bundle
from districompile.bundle.hashes import hash_ahead
from districompile.bundle.own_vae import own_vae
from districompile.cli.common import UsageError
from districompile.cli.generate import place
from districompile.cli.options import NO_VAE
from districompile.errors import Error
from districompile.ir.spec import dtype_of
from districompile.live.autoencoder import lend_encoder, load_vae, parts_at
from districompile.live.text_encoders import graph_text_encoders
from districompile.models.autoencoder import DECODER
from districompile.models.inputs import vae_factor
from districompile.models.sources import load_pipeline, network_name
from districompile.plan.options import PlanOptions
from districompile.plan.plan import ExecutionPlan
from districompile.runtime.load import load
from districompile.runtime.module import DistributedModule
from districompile.runtime.opening import check_device, check_native_code

_OF_LATENTS = ("latent_channels", "scaling_factor", "shift_factor")  # what a VAE's configuration says about latents
MEETING = 10  # times the timeout: until all ranks have loaded the pipeline, and one has checked the hashes


def open_pipeline(model: str, options: PlanOptions, verified: Bundle | None = None) -> Any:
    """Return the unmodified pipeline of ``model``, without its network, in the dtype of a plan's ``options``.

    Meanwhile the first process of a machine hashes the files of the bundle ``verified``, for when it is loaded. Raises
    :class:`~districompile.models.inputs.ModelError` if there is no whole pipeline.
    """
    if verified is not None and os.environ.get("LOCAL_RANK", "0") == "0":
        hash_ahead(verified.path, verified.manifest["files"])
    return load_pipeline(model, dtype_of(options.dtype or "float32"))


def attach(pipe: Any, bundle: Path, vae: Path | None = None, **loading: Any) -> DistributedModule:
    """Load a bundle together with the other ranks, put it into ``pipe`` as its network, and return it.

    The other networks move to its device, where text encoders are replayed as CUDA graphs too. ``vae`` holds bundles of
    its VAE: all ranks have to decode then. Without a bundle of the encoder, each rank encodes by itself. ``loading``
    are options of :func:`districompile.load`.
    """
    compiled = load(bundle, **loading)
    place(pipe, compiled.device)
    if loading.get("cuda_graph", True):
        graph_text_encoders(pipe, on_first_call=bool(loading.get("warm_up")))
    setattr(pipe, network_name(pipe), compiled)
    if vae is not None:
        made = load_vae(vae, **{name: value for name, value in loading.items() if name != "shapes"})
        lend_encoder(made, pipe.vae)
        pipe.vae = made
    return compiled


def chosen_vae(
    asked: str | None, bundle: Bundle, plans: Iterable[ExecutionPlan], pipe: Any = None, *, device: str | None = None,
    native_code: bool = True,
) -> tuple[Path | None, str | None]:  # fmt: skip
    """Return the folder of the VAE to decode with on all ranks (None: rank 0 decodes alone), and a note for the user.

    ``asked`` is ``--vae``. By default it is the VAE in the folder of ``bundle``, if that can be used for the pictures
    of ``plans``; the note says why it cannot. Raises :class:`UsageError` for a VAE that was named and cannot be used.
    """
    if asked == NO_VAE:
        return None, None
    folder, reason = own_vae(bundle) if asked is None else (Path(asked), None)
    if folder is None:
        return None, reason and f"the first process decodes alone: {reason}"
    try:
        check_vae(folder, bundle.plan.world_size, pipe, plans, device=device, native_code=native_code)
    except Error as e:
        if asked is not None:
            raise UsageError(f"--vae {e}") from e
        way_out = f"; `districompile convert --add {bundle.path} --size ...` adds sizes" if isinstance(e, _Size) else ""
        return None, f"the first process decodes alone: {e}{way_out}"
    return folder, None


class _Size(UsageError):
    """A VAE that does not have the size of a picture."""


def check_vae(
    vae: Path, ranks: int, pipe: Any = None, plans: Iterable[ExecutionPlan] = (), *, device: str | None = None,
    native_code: bool = True,
) -> None:  # fmt: skip
    """Check that ``vae`` holds bundles of an autoencoder that ``ranks`` processes and the pipeline can use.

    It has to decode the pictures of ``plans``. Raises :class:`UsageError` or :class:`BundleError`.
    """
    found = parts_at(vae)
    held = dict(getattr(getattr(pipe, "vae", None), "config", {}))
    for part, folder in found.items():
        opened = Bundle.open(folder, verify="quick")
        check_device(opened, device)
        check_native_code(opened, native_code)
        if opened.plan.world_size != ranks:
            raise UsageError(
                f"{vae}: its {part} is for {opened.plan.world_size} processes, and the network for {ranks}: convert it "
                f"with --gpus {ranks}"
            )
        given = opened.manifest.get("config") or {}
        other = next((k for k in _OF_LATENTS if held and held.get(k) != given.get(k)), None)
        if other is not None:
            raise UsageError(
                f"{vae} is of another VAE than the pipeline has: its {other} is {given.get(other)}, not "
                f"{held.get(other)}"
            )
        _check_sizes(vae, part, opened, plans)
    if DECODER not in found:
        raise UsageError(f"{vae} has no decoder: convert the VAE with --part both")


def _check_sizes(vae: Path, part: str, bundle: Bundle, plans: Iterable[ExecutionPlan]) -> None:
    """Check that a part of a VAE has the sizes of the pictures of ``plans``, as far as these say them."""
    factor = vae_factor(bundle.manifest.get("config") or {}) if part == DECODER else 1
    there: dict[tuple[int, int], set[int]] = {}
    for plan in bundle.plans.values():
        count, _, height, width = next(plan.called_spec(i).shape for i in plan.inputs if i.rows is not None)
        there.setdefault((width * factor, height * factor), set()).add(count)
    one = all(counts == {1} for counts in there.values())  # then several are computed one after the other
    for options in (plan.options for plan in plans):
        if options.width is None or options.height is None:
            continue
        images = there.get((options.width, options.height), set())
        if not images or not (one or options.images in images):
            several = f" for {options.images} images" if options.images > 1 and not one else ""
            sizes = ", ".join(f"{w}x{h}" for w, h in there)
            raise _Size(f"{vae}: its {part} does not have the size {options.width}x{options.height}{several} "
                        f"(it has: {sizes})")  # fmt: skip
