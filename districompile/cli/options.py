# SPDX-License-Identifier: Apache-2.0
"""Command-line options as fields of dataclasses, and the options that several commands share.

A command has one frozen dataclass. Each field is one argument or option: its type, its default and its help stand
in one place. :func:`command_of` makes the function that Typer reads from the dataclass. Nothing here imports PyTorch.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from districompile.cli import checks
from districompile.plan.defaults import OPTIMISE, SEGMENTS

MODEL = "Model"
PARTITION = "Partition"
QUALITY = "Quality"
PIPELINE = "Passes and extensions"
BACKEND = "Backend"
RUNTIME = "Runtime"
OUTPUT = "Output"
EXPERIMENTAL = "Experimental"

DEFAULT_GPUS = 2
DEFAULT_BACKEND = "onnxruntime"
DEFAULT_DTYPE: Literal["float32"] = "float32"
DEFAULT_GROUPNORM = "forecast"
DEFAULT_TIMEOUT = 30.0
DEFAULT_PROMPT = "a red circle above a blue square at sunset"

Cfg = Literal["none", "batch", "split"]
GroupNorm = Literal["forecast", "corrected_async", "sync", "stale", "local"]
Dtype = Literal["float32", "float16", "bfloat16"]

T = TypeVar("T")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.", rich_help_panel=OUTPUT)]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Replace a bundle of another model, or one made with other options.",
        rich_help_panel=OUTPUT,
    ),
]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder made by convert.")]
ModelOverride = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Location of the original model. Needed if it moved, or if the model is a function.",
        show_default="as recorded in the bundle",
        rich_help_panel=MODEL,
    ),
]
Extensions = Annotated[
    tuple[str, ...],
    typer.Option(
        "--extension",
        metavar="NAME",
        help="Load the extension NAME: an installed entry point or a module. May be repeated.",
        show_default="the installed ones",
        rich_help_panel=PIPELINE,
    ),
]
ShapeName = Annotated[
    str | None,
    typer.Option(
        "--shape",
        metavar="NAME",
        help="One of the bundle's shapes, such as 832x1216-b1-t77, or the beginning of its name. inspect lists them.",
        show_default="the first one",
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[
    Literal["cpu", "cuda"] | None,
    typer.Option(
        help="Device of an eager bundle. Bundles of other backends run where they were made for.",
        show_default="cpu",
        rich_help_panel=RUNTIME,
    ),
]
NO_VAE = "none"  # of --vae
Vae = Annotated[
    str | None,
    typer.Option(
        "--vae",
        metavar="BUNDLE",
        help="Bundle of the pipeline's VAE (convert FOLDER/vae), for as many GPUs: all of them decode. none: the first "
        "process decodes alone.",
        show_default="the one in the bundle's folder, if it can be used, else none",
        rich_help_panel=RUNTIME,
    ),
]
NativeCode = Annotated[
    bool,
    typer.Option(
        "--native-code/--no-native-code",
        help="Load engines that are machine code (inductor, tensorrt). Accept them only from a source that you trust.",
        rich_help_panel=RUNTIME,
    ),
]
Timeout = Annotated[
    float,
    typer.Option(
        help="Seconds without a sign of life after which a process or a transfer has failed. The first steps have ten "
        "times as long.",
        rich_help_panel=RUNTIME,
    ),
]
Transport = Annotated[
    str,
    typer.Option(
        help="Transport of rows between processes: peer, nccl, gloo, or auto (the fastest that works).",
        rich_help_panel=RUNTIME,
    ),
]
CudaGraph = Annotated[bool, typer.Option(help="On GPUs, replay each call as one CUDA graph.", rich_help_panel=RUNTIME)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """The options that both ``convert`` and ``run MODEL`` accept. None means that the default applies."""

    height: Annotated[
        int | None,
        typer.Option(
            help="Height in pixels. For a bare UNet without a VAE: rows of its input.",
            show_default="the model's own",
            rich_help_panel=MODEL,
        ),
    ] = None
    width: Annotated[
        int | None,
        typer.Option(
            help="Width in pixels, or columns of the input of a bare UNet.",
            show_default="the model's own",
            rich_help_panel=MODEL,
        ),
    ] = None
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Type of the weights, and of a factory's floating-point inputs.",
            show_default=f"{DEFAULT_DTYPE}; with GPUs as the weights are shipped; a factory's own",
            rich_help_panel=MODEL,
        ),
    ] = None
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="For a single file of weights: a diffusers folder of the same kind of model, for its configuration.",
            show_default="from the model hub",
            rich_help_panel=MODEL,
        ),
    ] = None
    variant: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Variant of a folder's weight files, such as fp16.",
            show_default="the plain files, or the only variant",
            rich_help_panel=MODEL,
        ),
    ] = None
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus",
            "-n",
            min=1,
            help="Number of GPUs (or CPU processes) that share one image.",
            show_default=str(DEFAULT_GPUS),
            rich_help_panel=PARTITION,
        ),
    ] = None
    cfg: Annotated[
        Cfg | None,
        typer.Option(
            help="Guidance. batch: both halves in one doubled batch. split: each half on one half of the GPUs.",
            show_default="batch for text models (with an even number of GPUs split), else none",
            rich_help_panel=PARTITION,
        ),
    ] = None
    segments: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Largest number of engines of a displaced step. More engines let transfers start earlier.",
            show_default=f"4; with GPUs {SEGMENTS}",
            rich_help_panel=PARTITION,
        ),
    ] = None
    groupnorm: Annotated[
        GroupNorm | None,
        typer.Option(
            metavar="MODE",
            help="Statistics of group norms in displaced steps: forecast, corrected_async (the paper's), sync, stale "
            "or local.",
            show_default=DEFAULT_GROUPNORM,
            rich_help_panel=QUALITY,
        ),
    ] = None
    displace: Annotated[
        str | None,
        typer.Option(
            metavar="PURPOSES",
            help="Exchanges that use the previous step's values, separated by commas: attention, conv, norm, resize, "
            "other; or all, or none.",
            show_default="all",
            rich_help_panel=QUALITY,
        ),
    ] = None
    warmup_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of exact steps at the start of every image, at least.",
            show_default="4",
            rich_help_panel=QUALITY,
        ),
    ] = None
    drift_limit: Annotated[
        float | None,
        typer.Option(
            min=0,
            callback=checks.finite,
            help="Steps stay exact while the image changes more than this many times as fast as the sampler moves it. "
            "0: only --warmup-steps are exact.",
            show_default="1",
            rich_help_panel=QUALITY,
        ),
    ] = None
    reuse: Annotated[
        str | None,
        typer.Option(
            metavar="deep=N[:L]",
            help="Of N steps behind the exact ones, compute one in full. The others keep what deep levels or middle "
            "blocks gave in it, and compute L levels, or L blocks at either end. auto, with --quality-floor: the "
            "fastest that reaches it.",
            show_default="none",
            rich_help_panel=QUALITY,
        ),
    ] = None
    quantise: Annotated[
        str | None,
        typer.Option(
            metavar="BITS",
            callback=checks.quantise,
            help="fp8: compute layers in 8 bits where calls of the model show that this is accurate, and on a Hopper "
            "GPU where it is faster; fp8:40 asks for 40 dB of signal to noise at its output. auto: with "
            "--quality-floor, where the images allow it. none.",
            show_default="none",
            rich_help_panel=QUALITY,
        ),
    ] = None
    transfer_bits: Annotated[
        int | None,
        typer.Option(
            metavar="8",
            help="Send halos, keys and values of displaced steps as differences of 8 bits. It changes pictures a "
            "little, and pays where links are slow.",
            show_default="in full",
            rich_help_panel=QUALITY,
        ),
    ] = None
    optimise: Annotated[
        str | None,
        typer.Option(
            metavar="PASSES",
            help="Optimisation passes, separated by commas: cse, fuse-parallel-linears, hoist-fetches, "
            "in-place-gather, cache-conditioning; or all of these, which change no result. "
            "all,exchange-before-norm changes displaced steps a little; for --phases exact it is what all means.",
            show_default=f"none; with GPUs {OPTIMISE}",
            rich_help_panel=PIPELINE,
        ),
    ] = None
    extension: Extensions = ()
    backend: Annotated[
        str | None,
        typer.Option(
            is_eager=True,
            metavar="NAME",
            help="Compiler of the segments: eager, inductor, onnxruntime, tensorrt, or one of an installed package.",
            show_default=f"{DEFAULT_BACKEND}; with GPUs tensorrt where it runs on them, else inductor",
            rich_help_panel=BACKEND,
        ),
    ] = None
    backend_option: Annotated[
        tuple[str, ...],
        typer.Option(
            "--backend-option",
            "-o",
            metavar="KEY=VALUE",
            help="Set an option of the backend. May be repeated. convert --backend NAME --help-backend lists them.",
            show_default="none",
            rich_help_panel=BACKEND,
        ),
    ] = ()
    collectives: Annotated[
        Literal["between", "inside"] | None,
        typer.Option(
            help="Exact steps: one engine between two exchanges, or one engine that contains the exchanges (tensorrt "
            "only).",
            show_default="between",
            rich_help_panel=EXPERIMENTAL,
        ),
    ] = None

    @property
    def ranks(self) -> int:
        """The number of processes that share one image."""
        return self.gpus or DEFAULT_GPUS

    @property
    def backend_name(self) -> str:
        """The name of the backend, given or default."""
        return self.backend or DEFAULT_BACKEND


def command_of(settings: type[T], function: Callable[[T], int]) -> Callable[..., int]:
    """Return the function that Typer reads: one keyword parameter for each field of the dataclass ``settings``.

    A field of type ``tuple[X, ...]`` is an option that may be repeated. The help is the docstring of ``function``.
    """
    hints = typing.get_type_hints(settings, include_extras=True)
    parameters = []
    for field in dataclasses.fields(typing.cast(Any, settings)):
        hint, default = hints[field.name], field.default
        if default is dataclasses.MISSING:
            default = inspect.Parameter.empty
        repeated = _item_of_tuple(hint)
        if repeated is not None:
            hint, default = repeated, None
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
        )

    def command(**given: Any) -> int:
        repeated_fields = {p.name for p in parameters if p.default is None and _item_of_tuple(hints[p.name])}
        return function(settings(**{k: tuple(v or ()) if k in repeated_fields else v for k, v in given.items()}))

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": int}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _item_of_tuple(hint: Any) -> Any:
    """``Annotated[tuple[X, ...], option]`` as ``Annotated[list[X] | None, option]``; None for any other type."""
    if typing.get_origin(hint) is not Annotated:
        return None
    base, *extra = typing.get_args(hint)
    if typing.get_origin(base) is not tuple:
        return None
    item = typing.get_args(base)[0]
    union: Any = types.GenericAlias(list, (item,)) | None
    return Annotated[tuple([union, *extra])]
