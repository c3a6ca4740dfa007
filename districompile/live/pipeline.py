# SPDX-License-Identifier: Apache-2.0
"""``districompile.load_pipeline``: a diffusers pipeline around a bundle, without the original network's weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from districompile.bundle.bundle import Bundle
from districompile.errors import BundleError
from districompile.ir.spec import dtype_of
from districompile.live.autoencoder import load_vae
from districompile.live.text_encoders import graph_text_encoders
from districompile.models import sources
from districompile.models.networks import network_name
from districompile.shapes import load


def load_pipeline(
    bundle: str | os.PathLike[str], model: str | None = None, vae: str | os.PathLike[str] | None = None, **loading: Any
) -> Any:
    """Return the diffusers pipeline of a bundle, in each rank's process, on the bundle's device.

    The original UNet's weights are not read. Its ControlNets, if it was converted with any, have a stand-in that passes
    pictures and scales on to it. On a GPU, calls of text encoders are replayed as CUDA graphs from their third on, or
    with ``warm_up=True`` from their second.

    Args:
        bundle: the folder of the bundle.
        model: the folder or hub id of the pipeline; by default where the bundle was converted from.
        vae: the folder of its VAE's bundle, or of both parts' bundles (:func:`districompile.load_vae`); by default the
            original VAE.
        loading: options of :func:`districompile.load`.

    Raises :class:`BundleError` for a bundle that does not say where its model came from, and
    :class:`~districompile.models.inputs.ModelError` if there is no whole pipeline.
    """
    opened = Bundle.open(Path(bundle), verify=False)
    model = model or opened.manifest.get("source")
    if not model:
        raise BundleError(f"{bundle} does not say where its model came from: pass model='FOLDER'")
    sources.pipeline_location(model)
    compiled = load(bundle, **loading)
    pipe = sources.load_pipeline(model, dtype_of(opened.plan.options.dtype or "float32"))
    for name, part in pipe.components.items():
        if name != network_name(pipe) and isinstance(part, nn.Module):
            part.to(compiled.device)
    if loading.get("cuda_graph", True):
        graph_text_encoders(pipe, on_first_call=bool(loading.get("warm_up")))
    setattr(pipe, network_name(pipe), compiled)
    if vae is not None:
        pipe.vae = load_vae(vae, **loading)
    return pipe
