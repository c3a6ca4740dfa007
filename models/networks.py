# SPDX-License-Identifier: Apache-2.0
"""The network of a pipeline that is called at each step: its UNet, or its transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from districompile.models.inputs import ModelError

_NETWORKS = ("unet", "transformer")  # names of the network in a pipeline that is called at each step


def network_name(pipe: Any) -> str:
    """Return the name under which a pipeline holds the network that it calls at each step: ``unet``, for example."""
    return next((n for n in _NETWORKS if getattr(pipe, n, None) is not None), _NETWORKS[0])


def network_of(index: Mapping[str, Any], source: str) -> str:
    """Return the name of the network in a pipeline, which must have one of them alone."""
    held = {k for k, v in index.items() if not k.startswith("_") and not (isinstance(v, list) and v[:1] == [None])}
    found = [name for name in _NETWORKS if name in held]
    kind = index.get("_class_name")
    if not found:
        raise ModelError(
            f"{source}: the pipeline {kind} has no unet and no transformer (it has: {', '.join(sorted(held))}); "
            "give a component's folder or a factory (package.module:function)"
        )
    more = sorted({f"{name}_2" for name in _NETWORKS} & held)
    if len(found) > 1 or more:
        raise ModelError(
            f"{source}: the pipeline {kind} has several networks ({', '.join((*found, *more))}); give the folder of "
            "one of them, and load one bundle for each in a program of your own"
        )
    return found[0]
