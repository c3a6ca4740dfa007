# SPDX-License-Identifier: Apache-2.0
"""The parts of an autoencoder: the decoder, which pipelines call after the last step, and the encoder of pictures."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from districompile.models.configs import shortened
from districompile.models.controlled import MARK
from districompile.models.files import DEMO, find_variant, read_json
from districompile.models.inputs import ModelError
from districompile.models.origin import Origin

PARTS = DECODER, ENCODER = "decoder", "encoder"
Part = Literal["auto", "decoder", "encoder", "both"]
CLASS = "AutoencoderKL"


class VaeDecoder(nn.Module):
    """The decoder of an ``AutoencoderKL``: latents (B, C, H, W) in, pixels (B, 3, H * factor, W * factor) out."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.config = vae.config
        self.post_quant_conv: nn.Module = vae.post_quant_conv or nn.Identity()
        self.decoder: nn.Module = vae.decoder

    def forward(self, z: Tensor) -> Tensor:
        pixels: Tensor = self.decoder(self.post_quant_conv(z))
        return pixels


class VaeEncoder(nn.Module):
    """The encoder of an ``AutoencoderKL``: pixels (B, 3, H, W) in, means and log variances of the latents out.

    The output is (B, 2 * C, H / factor, W / factor).
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.config = vae.config
        self.encoder: nn.Module = vae.encoder
        self.quant_conv: nn.Module = vae.quant_conv or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        moments: Tensor = self.quant_conv(self.encoder(x))
        return moments


def wanted_parts(model: str, asked: Part) -> tuple[str, ...]:
    """Return the parts of the autoencoder at ``model`` to convert; none where it is no folder of an autoencoder.

    ``auto`` is the decoder, and the encoder as well if the pipeline around the folder encodes pictures. Raises
    :class:`ModelError` for a part of what has none.
    """
    given = Origin.of(model)
    folder = Path((given.config if given.file is not None else given.path) or "").expanduser()
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if config.get("_class_name") != CLASS:
        if asked != "auto":
            raise ModelError(f"--part {asked}: {model} is not the folder of an {CLASS}")
        return ()
    if asked == "both":
        return PARTS
    if asked != "auto":
        return (asked,)
    index = folder.resolve().parent / "model_index.json"
    return PARTS if index.is_file() and encodes_pictures(read_json(index)) else (DECODER,)


def autoencoder_of(model: str) -> str | None:
    """Return the VAE of a pipeline, as a model of its own. None where ``model`` is no local pipeline that has one.

    Raises :class:`ModelError` for a VAE that cannot be converted.
    """
    given = Origin.of(model.partition(MARK)[0])
    place = given.config if given.file is not None else given.path
    if place is None:  # the configuration of a single file is on the hub
        return None
    folder = DEMO if model == "demo" else Path(place).expanduser()
    if not (folder / "model_index.json").is_file() or not (folder / "vae" / "config.json").is_file():
        return None
    if read_json(folder / "model_index.json").get("vae") in (None, [None, None]):
        return None
    kind = read_json(folder / "vae" / "config.json").get("_class_name")
    if kind != CLASS:
        raise ModelError(f"the VAE of {model} is of the class {shortened(kind)}, and only an {CLASS} can be converted")
    vae = str(folder / "vae")
    if given.file is not None:
        return str(Origin(given.path, vae))
    try:
        variant = find_variant(folder / "vae", given.variant)
    except ModelError:  # of the network alone: diffusers takes the plain weights then
        variant = None
    return str(Origin(vae, None, variant if given.variant is not None else None))


def overflows_in_float16(model: str) -> bool:
    """Return whether the autoencoder at ``model`` is to be computed in float32 instead of float16.

    Its configuration says so (``force_upcast``). Without a word there, diffusers' default counts, which is yes, for
    pipelines that look at it.
    """
    given = Origin.of(model)
    folder = Path((given.config if given.file is not None else given.path) or "").expanduser()
    said = read_json(folder / "config.json").get("force_upcast")
    index = folder.resolve().parent / "model_index.json"
    if said is None and index.is_file():
        return _in_code(read_json(index), r"\bforce_upcast\b")
    return said is True


def encodes_pictures(index: Mapping[str, Any]) -> bool:
    """Return whether the pipeline of a ``model_index.json`` encodes pictures with its VAE, by its own code."""
    return _in_code(index, r"\bvae\.encode\(")


def _in_code(index: Mapping[str, Any], pattern: str) -> bool:
    """Return whether the code of a pipeline's class has ``pattern``."""
    try:
        cls = getattr(importlib.import_module("diffusers"), str(index.get("_class_name")))
        return re.search(pattern, inspect.getsource(cls)) is not None
    except (ImportError, AttributeError, OSError, TypeError):  # a class that is not diffusers' own, or without source
        return False
