# SPDX-License-Identifier: Apache-2.0
"""The arguments and options of ``districompile verify``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer

from districompile.cli import checks, options
from districompile.cli.options import (
    BundleArgument,
    Device,
    Extensions,
    Json,
    ModelOverride,
    NativeCode,
    ShapeName,
    Timeout,
)

COMPARISON = "Comparison"
IMAGES = "Images (--quality)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments and options of ``verify``."""

    bundle: BundleArgument
    shape: ShapeName = None
    model: ModelOverride = None
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.", rich_help_panel=COMPARISON)] = 50
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=checks.LARGEST_SEED - 1, help="Seed of inputs and latents.", rich_help_panel=COMPARISON
        ),
    ] = 0
    prompt: Annotated[
        str | None,
        typer.Option(
            callback=checks.text,
            help="Prompt of the sampling run that measures the drift.",
            show_default=options.DEFAULT_PROMPT,
            rich_help_panel=COMPARISON,
        ),
    ] = None
    tolerance: Annotated[
        float | None,
        typer.Option(
            callback=checks.finite,
            help="Largest accepted relative error of the exact phase.",
            show_default="by dtype and backend",
            rich_help_panel=COMPARISON,
        ),
    ] = None
    drift: Annotated[
        bool,
        typer.Option(help="Measure the displaced phase over a whole sampling run.", rich_help_panel=COMPARISON),
    ] = True
    nodes: Annotated[
        bool,
        typer.Option(
            "--nodes", help="Compare every operator too. This names a wrong rule.", rich_help_panel=COMPARISON
        ),
    ] = False
    rules: Annotated[
        tuple[str, ...],
        typer.Option(
            metavar="MODULE",
            help="For --nodes: import a module that registers operator rules. May be repeated.",
            show_default="none",
            rich_help_panel=COMPARISON,
        ),
    ] = ()
    quality: Annotated[
        bool,
        typer.Option("--quality", help="Draw many images and compare each with one device's.", rich_help_panel=IMAGES),
    ] = False
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file with one prompt a line.", show_default="built-in prompts", rich_help_panel=IMAGES),
    ] = None
    pictures: Annotated[int, typer.Option(min=1, help="Number of built-in prompts.", rich_help_panel=IMAGES)] = 8
    seeds: Annotated[
        str | None,
        typer.Option(help="Seeds of every prompt, such as 0,1 or 0-3.", show_default="--seed", rich_help_panel=IMAGES),
    ] = None
    modes: Annotated[
        str | None,
        typer.Option(
            help="Other modes to compare, separated by commas: the group norm modes forecast, corrected_async, sync, "
            "stale, local; reference (the paper's code); exact (nothing is displaced); deep=N (reuse); 8bit "
            "(differences); fp8 or float, the bits of layers instead of the bundle's. Several are joined by +, as "
            "exact+fp8.",
            show_default="none",
            rich_help_panel=IMAGES,
        ),
    ] = None
    guidance: Annotated[
        float | None,
        typer.Option(
            callback=checks.finite,
            help="Guidance scale.",
            show_default="the pipeline's own",
            rich_help_panel=IMAGES,
        ),
    ] = None
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write an HTML page with images to this file.", show_default="no page", rich_help_panel=IMAGES
        ),
    ] = None
    processes: Annotated[
        bool,
        typer.Option(
            "--processes",
            help="Start one process a rank. Without it, all ranks run in this process.",
            rich_help_panel=IMAGES,
        ),
    ] = False
    backend: Annotated[
        Literal["onnxruntime"] | None,
        typer.Option(
            help="Run the ONNX files of a tensorrt bundle by ONNX Runtime, without a GPU.",
            show_default="the bundle's own",
            rich_help_panel=options.RUNTIME,
        ),
    ] = None
    device: Device = None
    native_code: NativeCode = True
    timeout: Timeout = options.DEFAULT_TIMEOUT
    extension: Extensions = ()
    as_json: Json = False
