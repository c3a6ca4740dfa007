# SPDX-License-Identifier: Apache-2.0
"""Adapters of PEFT, such as LoRA: layers around layers of the original, which change its weights.

The original is converted without them. What they make of a weight is computed by the adapter itself, merged into a
copy of its layer, so every method that PEFT can merge is supported: LoRA, rank-stabilised LoRA, DoRA, and biases.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from districompile.errors import InputError


def is_adapted(module: nn.Module) -> bool:
    """Return whether ``module`` is a layer of the original with adapters around it."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def base_of(module: nn.Module) -> nn.Module:
    """Return the layer of the original that adapters are around: ``module`` itself if there are none."""
    if not is_adapted(module):
        return module
    found: nn.Module = module.get_base_layer()  # type: ignore[operator]
    return found


@contextlib.contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """Put the layers of the original in the place of those with adapters, inside."""
    replaced = []
    for part in list(module.modules()):
        for name, child in part._modules.items():
            if child is not None and is_adapted(child) and not is_adapted(part):
                replaced.append((part, name, child))
    for part, name, child in replaced:
        part._modules[name] = base_of(child)
    try:
        yield
    finally:
        for part, name, child in replaced:
            part._modules[name] = child


def merged_weights(layers: Mapping[str, nn.Module], scale: float = 1.0) -> dict[str, Tensor]:
    """Return the weights that adapters change, by their names in the original, with the active adapters merged.

    ``scale`` is a factor of all adapters, as a pipeline passes it for one call. Raises :class:`InputError` for a method
    that cannot be merged.
    """
    found: dict[str, Tensor] = {}
    for path, layer in layers.items():
        merged = _merged(path, layer, scale)
        for name, tensor in (merged._parameters if merged is not None else {}).items():
            if tensor is not None:
                found[f"{path}.{name}"] = tensor.detach()
    return found


def unmerge_disabled(layers: Iterable[nn.Module]) -> None:
    """Take merged adapters out of layers whose adapters are disabled, as the first call of such a layer does."""
    for layer in layers:
        if layer.disable_adapters and layer.merged:
            with torch.no_grad():
                layer.unmerge()  # type: ignore[operator]


def _merged(path: str, layer: Any, scale: float) -> nn.Module | None:
    """Return a copy of the base layer with adapters merged; None if no adapter is active.

    A layer that has a merged (fused) adapter computes with its base weight alone, whatever else is active: PEFT's.
    """
    if layer.merged:
        return None
    names = [n for n in layer.active_adapters if n not in layer.merged_adapters and _has(layer, n)]
    if layer.disable_adapters or not names:
        return None
    try:
        with torch.no_grad():
            own = copy.deepcopy(layer)
            if scale != 1.0:
                own.scale_layer(scale)
            own.merge(safe_merge=False, adapter_names=names)
    except Exception as e:  # each method of PEFT has its own refusals
        raise InputError(
            f"the adapter {', '.join(names)} of {path} cannot be merged into its weight ({e}): fuse or unload it"
        ) from e
    return base_of(own)


def _has(layer: Any, name: str) -> bool:
    return any(name in (getattr(layer, kind, None) or {}) for kind in layer.adapter_layer_names)
