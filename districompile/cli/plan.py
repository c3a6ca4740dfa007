# SPDX-License-Identifier: Apache-2.0
"""The arguments and options of ``districompile plan``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer

from districompile.cli import checks, options
from districompile.cli.convert import MODEL_HELP
from districompile.cli.options import Dtype, Extensions, Json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments and options of ``plan``."""

    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
    gpus: Annotated[
        int,
        typer.Option(
            "--gpus", "-n", min=1, help="Largest number of GPUs to consider.", rich_help_panel=options.PARTITION
        ),
    ] = 8
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WIDTHxHEIGHT",
            help="Size of the image in pixels, such as 832x1216.",
            show_default="the model's own",
            rich_help_panel=options.MODEL,
        ),
    ] = None
    batch: Annotated[int, typer.Option(min=1, help="Images in one call.", rich_help_panel=options.MODEL)] = 1
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights.", rich_help_panel=options.MODEL)] = "float16"
    guidance: Annotated[
        Literal["none", "batch", "split", "both"],
        typer.Option(
            help="none: one call without guidance. batch: both halves in one call. split: each half on half of the "
            "GPUs. both: compare batch and split; for a model without guidance, none.",
            rich_help_panel=options.PARTITION,
        ),
    ] = "both"
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps of an image.", rich_help_panel=options.QUALITY)] = 50
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Model of GPU, such as h100, a100 or rtx-4090. An unknown name lists all.",
            show_default="the one of this machine, else h100",
            rich_help_panel=options.RUNTIME,
        ),
    ] = None
    link: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            callback=checks.finite,
            help="GB/s that one GPU sends to the others together, in one direction.",
            show_default="of the model of GPU",
            rich_help_panel=options.RUNTIME,
        ),
    ] = None
    machines: Annotated[
        int,
        typer.Option(min=1, help="Machines that have the GPUs, the same number each.", rich_help_panel=options.RUNTIME),
    ] = 1
    network: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            callback=checks.finite,
            help="GB/s that one machine sends to the others together, in one direction: 50 for 400 Gbit/s.",
            show_default="needed with --machines",
            rich_help_panel=options.RUNTIME,
        ),
    ] = None
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Compile and time the engines of one rank on this machine, in place of their prediction.",
            rich_help_panel=options.RUNTIME,
        ),
    ] = False
    extension: Extensions = ()
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw the seconds of an image by number of GPUs: a .png, .svg or .pdf file.",
            show_default="nothing is drawn",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None
    as_json: Json = False
