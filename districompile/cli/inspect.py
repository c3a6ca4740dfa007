# SPDX-License-Identifier: Apache-2.0
"""The arguments and options of ``districompile inspect``."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import typer

from districompile.cli import options
from districompile.cli.options import BundleArgument, Extensions, Json, ShapeName


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments and options of ``inspect``."""

    bundle: BundleArgument
    shape: ShapeName = None
    graph: Annotated[
        Literal["exact", "displaced", "reused"] | None,
        typer.Option(
            help="Print the steps of this phase instead of the report.",
            show_default="the report",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None
    extension: Extensions = ()
    as_json: Json = False
