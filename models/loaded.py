# SPDX-License-Identifier: Apache-2.0
"""A loaded model with example inputs, and model sources of installed packages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

import torch
from torch import nn

from districompile.common.extensions import load_entry_point, package_of
from districompile.errors import Error
from districompile.models import inputs
from districompile.models.imports import raised
from districompile.models.inputs import Example, ModelError, Size

GROUP = "districompile.models"


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A module and what is known about it.

    ``kind`` is the class it was made from, or ``"factory"``. ``source`` loads it again (:func:`load_source`). ``cfg``
    is the guidance that its pipeline uses by default. ``default_size`` is in pixels. ``pipeline_loader`` makes the
    diffusers pipeline around it, with a placeholder where the module belongs; None for a bare component or a factory.
    """

    module: nn.Module
    kind: str
    source: str
    cfg: str
    default_size: tuple[int, int] | None
    maker: Callable[[Size, int], Example]
    parts: int = 2
    pipeline_loader: Callable[[], Any] | None = None

    def example(
        self, height: int | None = None, width: int | None = None, batch: int = 1, cfg: str | None = None,
        seed: int = 0, tokens: int | None = None,
    ) -> Example:  # fmt: skip
        """Inputs of one call at ``height`` x ``width`` pixels for ``batch`` images; sizes default to the model's own.

        ``tokens`` is the length of the text; the default is that of the text encoder.

        ``cfg`` is ``"none"``, ``"batch"`` or ``"split"`` (the last two give a call with both guidance halves); the
        default is the model's own. Raises :class:`ModelError` for a size that the model cannot take.
        """
        if self.kind == "factory":
            if (height, width, batch, tokens) != (None, None, 1, None):
                raise ModelError(
                    f"{self.source} fixes its own inputs: height, width, batch and tokens do not apply; give shapes of "
                    "inputs by name (--input NAME=SHAPE)"
                )
            return self.maker(Size(0, 0, 1), seed)
        fallback = self.default_size or (0, 0)
        if self.default_size is None and (height is None or width is None):
            raise ModelError(f"{self.source} does not say for which size it was made: give height and width")
        rows = fallback[0] if height is None else height
        columns = fallback[1] if width is None else width
        return self.maker(Size(rows, columns, inputs.guided_batch(batch, cfg or self.cfg, self.parts), tokens), seed)


def from_entry_point(entry: EntryPoint, argument: str, model: str, dtype: torch.dtype | None) -> LoadedModel:
    """The model that a source of an installed package loads: ``source(argument, dtype)``."""
    load = load_entry_point(entry)
    where = f"{model}: the model source {entry.name} of the package {package_of(entry)}"
    if not callable(load):
        raise ModelError(f"{where} is not a function: it takes the text after the colon, and a dtype or None")
    try:
        loaded = load(argument, dtype)
    except Error:
        raise
    except (Exception, SystemExit) as e:  # of the other package's own code
        raise ModelError(f"{where} failed: {raised(e)}") from e
    if not isinstance(loaded, LoadedModel):
        raise ModelError(f"{where} returned a {type(loaded).__name__}, not a districompile.extend.LoadedModel")
    return dataclasses.replace(loaded, source=model)
