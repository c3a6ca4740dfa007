# SPDX-License-Identifier: Apache-2.0
"""``districompile.load_vae``: a diffusers autoencoder whose parts are bundles, without the original's weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from districompile.bundle.contents import vae_places
from districompile.bundle.manifest import MANIFEST, read_manifest
from districompile.errors import BundleError, InputError
from districompile.models.autoencoder import CLASS, DECODER, ENCODER, PARTS, VaeEncoder
from districompile.models.pretrained import import_diffusers
from districompile.plan.plan import ExecutionPlan
from districompile.runtime.module import DistributedModule
from districompile.shapes import load


def load_vae(bundle: str | os.PathLike[str], **loading: Any) -> Any:
    """Return an autoencoder for ``pipe.vae``, in each rank's process, whose decoder and encoder are bundles.

    What is around them is diffusers' own: tiles, slices, distributions. Bundles of one image a call have slicing
    enabled, for any number of images. A part that was not converted is refused when it is called.

    Args:
        bundle: the folder that ``convert FOLDER/vae`` made: a bundle, or one with the bundles ``decoder`` and
            ``encoder``. Or the folder of a pipeline's bundle with such a folder in it (``vae``).
        loading: options of :func:`districompile.load`, for each of them.

    Raises :class:`BundleError` for a folder that is neither, or for bundles of two autoencoders.
    """
    found = parts_at(Path(bundle))
    configs = [read_manifest(folder).get("config") or {} for folder in found.values()]
    if any(config != configs[0] for config in configs):
        raise BundleError(f"{bundle} has the parts of two autoencoders: convert both from one folder")
    with torch.device("meta"):
        vae = getattr(import_diffusers(), CLASS).from_config(configs[0])
    vae.eval().requires_grad_(False)
    vae.quant_conv = vae.post_quant_conv = None  # inside of the bundles
    vae.register_to_config(force_upcast=False)  # pipelines need not change its dtype: that of a bundle is fixed
    loaded = {part: load(folder, **loading) for part, folder in found.items()}
    for part in PARTS:
        setattr(vae, part, _Part(loaded[part]) if part in loaded else _Absent(part, str(bundle)))
    if all(_images(plan) == 1 for module in loaded.values() for plan in module.plans.values()):
        vae.enable_slicing()  # several images are computed one after the other
    return vae


def _images(plan: ExecutionPlan) -> int:
    return next(plan.called_spec(i).shape[0] for i in plan.inputs if i.rows is not None)


def parts_at(folder: Path) -> Mapping[str, Path]:
    """Return the bundles of an autoencoder's parts in ``folder``, by part. Raises :class:`BundleError` for none."""
    places = vae_places(folder)
    if places:  # in the folder of a network's bundle
        found = [folder / place for place in places]
    elif (folder / MANIFEST).is_file():
        found = [folder]
    else:
        found = [folder / part for part in PARTS if (folder / part / MANIFEST).is_file()]
    if not found:
        raise BundleError(f"{folder} has no bundle of an autoencoder: make one with `districompile convert FOLDER/vae`")
    known = {"VaeDecoder": DECODER, "VaeEncoder": ENCODER}
    parts = {known.get(str(read_manifest(path).get("class"))): path for path in found}
    if None in parts:
        raise BundleError(f"{parts[None]} is no bundle of an autoencoder: convert the folder of a VAE")
    return {str(part): path for part, path in parts.items()}


class _Part(nn.Module):
    """A part by its bundle, in the dtype of the caller: latents of half precision, say, and a decoder of single."""

    def __init__(self, module: DistributedModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Return moments for pixels, or pixels for latents. All ranks call it."""
        result: Tensor = self.module(x.to(self.module.dtype))
        return result.to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> _Part:
        """Stay as converted where a pipeline moves its networks."""
        return self


def lend_encoder(vae: Any, original: Any) -> None:
    """Let each rank encode by itself, with the encoder of ``original``, where there is no bundle of one."""
    if isinstance(vae.encoder, _Absent) and isinstance(getattr(original, "encoder", None), nn.Module):
        overflows = original.dtype == torch.float16 and bool(original.config.get("force_upcast"))
        encoder = VaeEncoder(original)
        vae.encoder = _Lent(encoder.to(torch.float32) if overflows else encoder)


class _Lent(nn.Module):
    """The encoder of the original, in the dtype of the caller as :class:`_Part` is."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._dtype = next(module.parameters()).dtype

    def forward(self, x: Tensor) -> Tensor:
        """Return moments for pixels."""
        result: Tensor = self.module(x.to(self._dtype))
        return result.to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> _Lent:
        """Keep dtype and device where a pipeline moves its networks."""
        return self


class _Absent(nn.Module):
    """Stand for a part that was not converted."""

    def __init__(self, part: str, bundle: str) -> None:
        super().__init__()
        self._part, self._bundle = part, bundle

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise InputError(
            f"{self._bundle} has no {self._part} of the autoencoder: convert its folder with --part both, and load the "
            "folder that this makes"
        )
