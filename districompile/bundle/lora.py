# SPDX-License-Identifier: Apache-2.0
"""Checks of a LoRA file's contents, before anything is computed with it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from districompile.errors import Error

_OTHER_SCALES = ("alpha_pattern", "use_rslora", "use_dora", "lora_bias")


class RefitError(Error):
    """The weights do not fit the bundle. The message names the weight and the reason."""


def adapter_metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return PEFT's metadata of a UNet's adapter, above all ``lora_alpha``.

    Raises :class:`RefitError` if the metadata is no JSON object.
    """
    try:
        noted = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError) as e:
        raise RefitError(f"{path}: its lora_adapter_metadata is not JSON ({str(e).splitlines()[0]})") from e
    if not isinstance(noted, dict):
        raise RefitError(f"{path}: its lora_adapter_metadata is a {type(noted).__name__}; it must be a JSON object")
    return {k.removeprefix("unet."): v for k, v in noted.items() if not k.startswith("text_encoder")}


def check_adapter(path: Path, metadata: Mapping[str, Any]) -> None:
    """Check an adapter's metadata.

    Raises :class:`RefitError` if it requires another scale than ``lora_alpha / rank``, or another method.
    """
    for key in _OTHER_SCALES:
        if metadata.get(key):
            raise RefitError(f"{path} was made with {key}, which is not read: merge it and give --weights")
    if metadata.get("lora_alpha") is not None:
        number(path, "lora_alpha", metadata["lora_alpha"])


def check_factors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Check that every tensor is a factor of a low-rank change.

    Raises :class:`RefitError` that names a tensor which is not.
    """
    for name, tensor in state.items():
        if name.endswith((".alpha", "dora_scale")):
            continue
        if not tensor.is_floating_point():
            raise RefitError(
                f"{path}: {name} is of type {str(tensor.dtype).removeprefix('torch.')}, not floating-point"
            )
        if tensor.ndim < 2 and not name.endswith(".bias"):
            raise RefitError(f"{path}: {name} has shape {list(tensor.shape)}; a factor of a LoRA is a matrix")
        if not tensor.numel():
            raise RefitError(f"{path}: {name} has shape {list(tensor.shape)}: a LoRA of rank 0 changes nothing")
        if not bool(torch.isfinite(tensor.float()).all()):
            raise RefitError(f"{path}: {name} holds NaN or infinite values")


def rank_of(path: Path, module: str, down: Tensor, up: Tensor) -> int:
    """Return the rank that both factors of a change share. Raises :class:`RefitError` if they differ."""
    if down.shape[0] != up.shape[1]:
        raise RefitError(
            f"{path}: the factors of {module} do not fit each other: {list(up.shape)} times {list(down.shape)}"
        )
    return int(down.shape[0])


def number(path: Path, what: str, value: Any) -> float:
    """Return a finite number from JSON or a tensor of one element. Raises :class:`RefitError` for anything else."""
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else list(value.shape)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RefitError(f"{path}: {what} is {value!r}; it must be a number")
    return float(value)
