# SPDX-License-Identifier: Apache-2.0
"""The arguments and options of ``districompile serve``."""

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
    ModelOverride,
    NativeCode,
    Timeout,
    Transport,
    Vae,
)

SERVER = "Server"
REQUESTS = "Requests"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments and options of ``serve``."""

    bundle: BundleArgument
    host: Annotated[
        str,
        typer.Option(help="Address to listen at. One that other machines reach needs a token.", rich_help_panel=SERVER),
    ] = "127.0.0.1"
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen at. 0: a free one.", rich_help_panel=SERVER)
    ] = 8000
    token: Annotated[
        str | None,
        typer.Option(
            help="Secret that every client sends as 'Authorization: Bearer TOKEN'. Other users of this machine can "
            "read it in the list of processes: prefer --token-file.",
            show_default="none",
            rich_help_panel=SERVER,
        ),
    ] = None
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token.", show_default="none", rich_help_panel=SERVER)
    ] = None
    name: Annotated[
        str | None,
        typer.Option(help="Name of the model in the API.", show_default="the bundle's folder", rich_help_panel=SERVER),
    ] = None
    log: Annotated[
        Path | None,
        typer.Option(
            help="File that a line of JSON is added to for each request.",
            show_default="standard output",
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
    queue: Annotated[
        int,
        typer.Option(min=0, help="Requests that may wait. More are answered with 429.", rich_help_panel=REQUESTS),
    ] = 16
    steps: Annotated[
        int, typer.Option(min=1, help="Sampling steps of a request that says none.", rich_help_panel=REQUESTS)
    ] = 50
    most_steps: Annotated[
        int, typer.Option(min=1, help="Largest number of steps of a request.", rich_help_panel=REQUESTS)
    ] = 200
    most_seconds: Annotated[
        float,
        typer.Option(min=1, help="Seconds after which the drawing of a request is given up.", rich_help_panel=REQUESTS),
    ] = 600.0
    lora: Annotated[
        tuple[str, ...],
        typer.Option(
            "--lora",
            metavar="NAME=FILE[@SCALE]",
            help="LoRA that requests may name. May be repeated. Each takes the memory of the weights once more.",
            show_default="none",
            rich_help_panel=REQUESTS,
        ),
    ] = ()
    model: ModelOverride = None
    extension: Extensions = ()
    vae: Vae = None
    transport: Transport = "auto"
    cuda_graph: CudaGraph = True
    device: Device = None
    native_code: NativeCode = True
    timeout: Timeout = options.DEFAULT_TIMEOUT
