# SPDX-License-Identifier: Apache-2.0
"""The arguments and options of ``districompile bench``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from districompile.cli import options
from districompile.cli.options import (
    BundleArgument,
    CudaGraph,
    Device,
    Extensions,
    Json,
    ModelOverride,
    NativeCode,
    ShapeName,
    Timeout,
    Transport,
    Vae,
)

MEASUREMENT = "Measurement"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments and options of ``bench``, which every rank receives."""

    bundle: BundleArgument
    shape: ShapeName = None
    calls: Annotated[int, typer.Option(min=1, help="Timed calls of each phase.", rich_help_panel=MEASUREMENT)] = 20
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Time a whole run of this many calls too.",
            show_default="no run",
            rich_help_panel=MEASUREMENT,
        ),
    ] = None
    image: Annotated[
        bool,
        typer.Option(
            "--image",
            help="Time whole pictures instead: text, steps (--steps, 20), decoding and the host.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = False
    pictures: Annotated[
        int, typer.Option(min=1, help="Pictures of --image; one more is traced.", rich_help_panel=MEASUREMENT)
    ] = 4
    warm_up: Annotated[
        bool,
        typer.Option(
            "--warm-up",
            help="With --image, warm up as serve does: load, then draw 2 steps.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = False
    vae: Vae = None
    original: Annotated[
        bool,
        typer.Option(
            "--original", help="Time the original model on one device too, in PyTorch.", rich_help_panel=MEASUREMENT
        ),
    ] = False
    model: ModelOverride = None
    transport: Transport = "auto"
    cuda_graph: CudaGraph = True
    device: Device = None
    native_code: NativeCode = True
    timeout: Timeout = options.DEFAULT_TIMEOUT
    extension: Extensions = ()
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a trace of a few calls, for chrome://tracing or ui.perfetto.dev.",
            show_default="no trace",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None
    kernels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a table of the GPU kernels of a displaced step.",
            show_default="no table",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None
    as_json: Json = False
