# SPDX-License-Identifier: Apache-2.0
"""The arguments and options of ``districompile refit``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from districompile.cli import checks, options
from districompile.cli.options import BundleArgument, Extensions, Force, Json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments and options of ``refit``."""

    bundle: BundleArgument
    lora: Annotated[
        tuple[Path, ...],
        typer.Option(
            metavar="FILE",
            help="A LoRA (.safetensors) that is added to the UNet's weights. May be repeated.",
            show_default="none",
            rich_help_panel=options.MODEL,
        ),
    ] = ()
    scale: Annotated[
        float, typer.Option(callback=checks.finite, help="Scale of the LoRA.", rich_help_panel=options.MODEL)
    ] = 1.0
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A model of the same architecture, as for convert, whose weights are used.",
            show_default="the bundle's own weights",
            rich_help_panel=options.MODEL,
        ),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the new bundle.", show_default="replace the old one", rich_help_panel=options.OUTPUT
        ),
    ] = None
    force: Force = False
    extension: Extensions = ()
    as_json: Json = False
