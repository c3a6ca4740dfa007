# SPDX-License-Identifier: Apache-2.0
"""The arguments and options of ``districompile convert``."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from districompile.cli import checks, options
from districompile.cli.options import Conversion, Force, Json, ModelOverride

MODEL_HELP = "'demo', a diffusers folder, a .safetensors file, a hub id (owner/name), or package.module:factory."


def _help_backend(context: typer.Context, value: bool) -> None:
    """Print the options of ``--backend NAME``, or of every backend where no name was given before, and exit."""
    if value:
        from districompile.cli.backend_options import print_help

        print_help(context.params.get("backend"))
        raise typer.Exit(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Conversion):
    """The arguments and options of ``convert``. ``help_backend`` never reaches the command."""

    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
    phases: Annotated[
        Literal["auto", "both", "exact"],
        typer.Option(
            help="Phases to compile. auto: both for a model that takes a timestep, and the exact one alone for others, "
            "such as decoders, whose calls do not repeat.",
            rich_help_panel=options.PIPELINE,
        ),
    ] = "auto"
    size: Annotated[
        tuple[str, ...],
        typer.Option(
            metavar="WIDTHxHEIGHT",
            help="Size of the picture in pixels. Repeat it for a bundle of several shapes.",
            show_default="the model's own",
            rich_help_panel=options.MODEL,
        ),
    ] = ()
    batch: Annotated[
        str,
        typer.Option(
            metavar="N,...",
            callback=checks.numbers,
            help="Images in one call. Several: a shape each.",
            rich_help_panel=options.MODEL,
        ),
    ] = "1"
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            callback=checks.numbers,
            help="Length of the text in tokens, such as 77,154. Several: a shape each.",
            show_default="the text encoder's",
            rich_help_panel=options.MODEL,
        ),
    ] = None
    input: Annotated[
        tuple[str, ...],
        typer.Option(
            metavar="NAME=SHAPE,...",
            help="For a module of a function: shapes of its inputs, as sample=1x4x48x32. Repeat it for several shapes.",
            show_default="the function's own",
            rich_help_panel=options.MODEL,
        ),
    ] = ()
    timestep: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="For a module of a function: the input that differs between the steps of a sampler. Without one, all "
            "steps are exact.",
            show_default="one with a usual name, such as timestep, t, sigma or noise_labels",
            rich_help_panel=options.MODEL,
        ),
    ] = None
    add: Annotated[
        bool,
        typer.Option(
            "--add",
            help="MODEL is a bundle: add the shapes to it. Its other shapes, weights and options stay.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False
    original: ModelOverride = None
    controlnet: Annotated[
        tuple[str, ...],
        typer.Option(
            metavar="FOLDER",
            help="Put this ControlNet into the UNet. May be repeated.",
            show_default="none",
            rich_help_panel=options.MODEL,
        ),
    ] = ()
    part: Annotated[
        Literal["auto", "decoder", "encoder", "both"],
        typer.Option(
            help="For the folder of a VAE. auto: its decoder, and its encoder too if the pipeline around it encodes "
            "pictures. Both are bundles in one folder, decoder and encoder.",
            rich_help_panel=options.MODEL,
        ),
    ] = "auto"
    vae: Annotated[
        bool | None,
        typer.Option(
            "--vae/--no-vae",
            help="Convert the decoder of the pipeline's VAE too, into the bundle's folder vae, so that all GPUs "
            "decode. With --add: add the sizes to it.",
            show_default="with two or more GPUs, where the VAE can be converted; with --add, where the bundle has one",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Refuse operators without a rule.", rich_help_panel=options.PIPELINE),
    ] = False
    passes: Annotated[
        tuple[str, ...],
        typer.Option(
            metavar="PASS",
            help="Run another pass, package.module:Class. May be repeated.",
            show_default="none",
            rich_help_panel=options.PIPELINE,
        ),
    ] = ()
    rules: Annotated[
        tuple[str, ...],
        typer.Option(
            metavar="MODULE",
            help="Import a module that registers operator rules, package.module. May be repeated.",
            show_default="none",
            rich_help_panel=options.PIPELINE,
        ),
    ] = ()
    skip: Annotated[
        tuple[str, ...],
        typer.Option(
            metavar="PASS",
            help="Leave out a pass. May be repeated.",
            show_default="none",
            rich_help_panel=options.PIPELINE,
        ),
    ] = ()
    stop_after: Annotated[
        str | None,
        typer.Option(
            metavar="PASS",
            help="Stop after this pass and print the graph.",
            show_default="after the last pass",
            rich_help_panel=options.PIPELINE,
        ),
    ] = None
    help_backend: Annotated[
        bool,
        typer.Option(
            "--help-backend",
            is_eager=True,
            callback=_help_backend,
            help="List the options of --backend NAME, or without it of every backend, and exit.",
            rich_help_panel=options.BACKEND,
        ),
    ] = False
    quality_floor: Annotated[
        str | None,
        typer.Option(
            metavar="DB",
            help="Draw images, and convert with the fastest setting whose worst image has at least this PSNR against "
            "one device, such as 40dB.",
            show_default="no images are drawn",
            rich_help_panel=options.QUALITY,
        ),
    ] = None
    quality_prompts: Annotated[
        Path | None,
        typer.Option(
            help="For --quality-floor: a text file with one prompt a line.",
            show_default="a few built-in prompts",
            rich_help_panel=options.QUALITY,
        ),
    ] = None
    quality_seeds: Annotated[
        str,
        typer.Option(
            help="For --quality-floor: the seeds of every prompt, such as 0,1 or 0-3.",
            rich_help_panel=options.QUALITY,
        ),
    ] = "0,1"
    quality_steps: Annotated[
        int, typer.Option(min=2, help="For --quality-floor: sampling steps.", rich_help_panel=options.QUALITY)
    ] = 20
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the bundle.", show_default="NAME-Ngpu in this folder", rich_help_panel=options.OUTPUT
        ),
    ] = None
    dump: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Write the captured graph, and the graph and its changes after every pass, into this folder.",
            show_default="nothing is written",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None
    force: Force = False
    as_json: Json = False


def default_out(settings: Settings) -> Path:
    """Return ``NAME-Ngpu`` in the current folder, where NAME is the last part of the model's name."""
    from districompile.models.origin import Origin

    given = Origin.of(settings.model)
    name = re.split(r"[/:]", given.path.rstrip("/"))[-1] or "model"
    if Path(given.path).is_dir():
        name = Path(given.path).resolve().name
    elif given.file is not None:
        name = given.file.stem
    return Path(f"{name}-{settings.ranks}gpu")
