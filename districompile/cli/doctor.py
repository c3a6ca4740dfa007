# SPDX-License-Identifier: Apache-2.0
"""The options of ``districompile doctor``."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from districompile.cli.options import Json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of ``doctor``."""

    trying: Annotated[
        bool, typer.Option("--try", help="Convert and run a small network with each backend that is usable here.")
    ] = False
    as_json: Json = False
