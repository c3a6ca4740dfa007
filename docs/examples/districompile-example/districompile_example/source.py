"""A model source: the UNet of any model that districompile loads, which sharpens its last layer's input."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from districompile.extend import Error, LoadedModel, load_source
from districompile_example.sharpen import Sharpen


def load(argument: str, dtype: torch.dtype | None) -> LoadedModel:
    """Load ``sharpened:MODEL``. Raises :class:`districompile.Error` for a model without a last norm."""
    loaded = load_source(argument, dtype)
    norm = getattr(loaded.module, "conv_norm_out", None)
    if not isinstance(norm, nn.Module):
        raise Error(f"sharpened:{argument}: only a UNet of diffusers can be sharpened")
    loaded.module.conv_norm_out = nn.Sequential(norm, Sharpen())
    return dataclasses.replace(loaded, source=f"sharpened:{argument}")
