# SPDX-License-Identifier: Apache-2.0
"""The arguments and options of ``districompile run``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer

from districompile.cli import checks, options
from districompile.cli.options import (
    Conversion,
    CudaGraph,
    Device,
    Json,
    ModelOverride,
    NativeCode,
    ShapeName,
    Timeout,
    Transport,
    Vae,
)

IMAGE = "Image"
START = "Image to image"
SEVERAL = "Several images"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Conversion):
    """The arguments and options of ``run``. The fields of :class:`Conversion` apply to a MODEL only."""

    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="Folder made by convert, or a MODEL as for convert.")]
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            callback=checks.text,
            help="Text that describes the image.",
            show_default="required by text models",
            rich_help_panel=IMAGE,
        ),
    ] = None
    negative_prompt: Annotated[
        str | None,
        typer.Option(
            callback=checks.text,
            help="Text that describes what the image must not show.",
            show_default="none",
            rich_help_panel=IMAGE,
        ),
    ] = None
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.", rich_help_panel=IMAGE)] = 50
    guidance: Annotated[
        float | None,
        typer.Option(
            callback=checks.finite, help="Guidance scale.", show_default="the pipeline's own", rich_help_panel=IMAGE
        ),
    ] = None
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=checks.LARGEST_SEED, help="Seed. The same seed draws the same image.", rich_help_panel=IMAGE
        ),
    ] = 0
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WIDTHxHEIGHT",
            help="Size of the picture in pixels: one of the bundle's shapes, or any with --shapes auto.",
            show_default="the bundle's first shape",
            rich_help_panel=IMAGE,
        ),
    ] = None
    shape: ShapeName = None
    shapes: Annotated[
        Literal["auto"] | None,
        typer.Option(
            help="auto: convert a size that the bundle does not have, at its first use, and keep it in the bundle.",
            show_default="the bundle's shapes alone",
            rich_help_panel=options.MODEL,
        ),
    ] = None
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Scheduler: the name of a class of diffusers, such as EulerDiscreteScheduler.",
            show_default="the pipeline's own",
            rich_help_panel=IMAGE,
        ),
    ] = None
    lora: Annotated[
        tuple[str, ...],
        typer.Option(
            metavar="FILE[=SCALE]",
            help="Add a LoRA (safetensors), times SCALE (1). The bundle with it is kept in the cache. May be repeated.",
            show_default="none",
            rich_help_panel=IMAGE,
        ),
    ] = ()
    image: Annotated[
        Path | None,
        typer.Option(
            help="Start from this picture. It is scaled and cropped to the size of the bundle.",
            show_default="noise",
            rich_help_panel=START,
        ),
    ] = None
    mask: Annotated[
        Path | None,
        typer.Option(
            help="Picture of the size of --image: what is white in it is drawn anew.",
            show_default="everything",
            rich_help_panel=START,
        ),
    ] = None
    strength: Annotated[
        float | None,
        typer.Option(
            callback=checks.share,
            help="How much of --image is replaced by noise at the start, above 0 and at most 1. That share of the "
            "steps is computed.",
            show_default="the pipeline's own",
            rich_help_panel=START,
        ),
    ] = None
    control_image: Annotated[
        tuple[str, ...],
        typer.Option(
            metavar="FILE[=SCALE]",
            help="Picture for a ControlNet of the bundle, times SCALE (1); one for each, in the order of convert "
            "--controlnet.",
            show_default="none",
            rich_help_panel=START,
        ),
    ] = ()
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Text file with one prompt a line, instead of --prompt.",
            show_default="one prompt",
            rich_help_panel=SEVERAL,
        ),
    ] = None
    seeds: Annotated[
        str | None,
        typer.Option(
            help="Seeds of every prompt, such as 1,2,5-8.", show_default="--seed alone", rich_help_panel=SEVERAL
        ),
    ] = None
    num_images: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=checks.MOST_IMAGES,
            help="Number of images of every prompt, with the seeds that follow --seed.",
            show_default="as many as the bundle computes in one call",
            rich_help_panel=SEVERAL,
        ),
    ] = None
    grid: Annotated[
        bool,
        typer.Option(
            "--grid",
            help="Write all images as one picture too, NAME-grid: a row for each prompt, a column for each seed.",
            rich_help_panel=SEVERAL,
        ),
    ] = False
    out: Annotated[
        Path,
        typer.Option(
            help="Image file. Its suffix selects the format. Further images are NAME-1, NAME-2, and so on.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = Path("image.png")
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace files that this command did not draw.", rich_help_panel=options.OUTPUT),
    ] = False
    preview_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="K",
            help="Write the unfinished image to NAME-preview after every K steps.",
            show_default="no preview",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None
    log_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps the log of every process.",
            show_default="logs are not kept",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None
    as_json: Json = False
    model: ModelOverride = None
    vae: Vae = None
    transport: Transport = "auto"
    cuda_graph: CudaGraph = True
    device: Device = None
    native_code: NativeCode = True
    timeout: Timeout = options.DEFAULT_TIMEOUT
