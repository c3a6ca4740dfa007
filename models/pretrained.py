# SPDX-License-Identifier: Apache-2.0
"""Read networks from folders by diffusers' loaders, and say in one line what is wrong with a folder."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from districompile.errors import ValueWarning
from districompile.models.configs import culprit
from districompile.models.files import load_fault, one_reason
from districompile.models.inputs import ModelError, SizeError

_MOST_UNREAD = 0.1  # of a model's tensors: a stray one is common, a layer's worth is another model


def from_pretrained(
    cls: Any, where: str, subfolder: str | None, dtype: torch.dtype, variant: str | None, config: Mapping[str, Any],
    source: str,
) -> nn.Module:  # fmt: skip
    """The module. Raises :class:`ModelError` for a weight that is missing, of another shape, or of another model."""
    try:
        # An explicit True refuses pickles; low memory: built on meta, then filled from the mapped file
        loaded, found = cls.from_pretrained(
            where, subfolder=subfolder or "", dtype=dtype, variant=variant, use_safetensors=True,
            low_cpu_mem_usage=True, output_loading_info=True,
        )  # fmt: skip
    except Exception as e:  # a constructor raises whatever it makes of a wrong value
        why = culprit(cls, config)
        named = "" if why is None else f" ({why})"
        reason = load_fault(e, Path(where, subfolder or "")).partition(" If you want to instead")[0].replace("  ", " ")
        raise ModelError(f"{source}: its {cls.__name__} cannot be loaded{named}: {reason}") from e
    if missing := _listed(found.get("missing_keys")):
        raise ModelError(
            f"{source}: the weight file lacks {missing}: weights and config.json are of different models, or the "
            "download is incomplete"
        )
    module: nn.Module = loaded
    check_unexpected(found.get("unexpected_keys") or (), module, source)
    return module


def check_unexpected(names: Collection[str], module: nn.Module, source: str) -> None:
    """Say which weights of a file are not read. Raises :class:`ModelError` where they are many."""
    if not names:
        return
    says = f"{source}: the weight file has {_listed(names)} besides, which its config.json does not ask for"
    if len(names) > _MOST_UNREAD * len(module.state_dict()):
        raise ModelError(f"{says}: weights and config.json are of different models")
    warnings.warn(f"{says}: ignored, as the original does", ValueWarning, stacklevel=2)


def _listed(names: Collection[str] | None) -> str:
    """A few names, and how many more there are."""
    ordered = sorted(names or ())
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn what fails inside into one line that names the file it was read from."""
    try:
        yield
    except SizeError:
        raise
    except ModelError as e:
        raise ModelError(f"{where}: {e}") from e
    except Exception as e:  # values of any type come from the file
        raise ModelError(f"{where} does not fit the model: {one_reason(e)}") from e


def import_diffusers() -> Any:
    """The diffusers library; :class:`ModelError` says how to install it."""
    try:
        return importlib.import_module("diffusers")
    except ImportError as e:
        raise ModelError(f"diffusers cannot be imported ({e}): pip install 'districompile[diffusers]'") from e
