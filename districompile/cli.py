"""The command line: what can be typed. What the commands do is in :mod:`districompile.commands`, imported when one
runs, so that ``--help`` and a mistyped option answer at once.

Exit codes: 0 done; 1 ``verify`` found a difference; 2 a user error, told in one line on standard error; 130
interrupted; 141 the reader of standard output closed it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from districompile.commands import checks
from districompile.errors import Error, ValueWarning
from districompile.interrupts import INTERRUPTED, end_undisturbed

app = typer.Typer(
    name="districompile",
    help="Compile a diffusion model into programs for N GPUs (or CPU processes) that draw one image together.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

Cfg = Literal["none", "batch", "split"]
GroupNorm = Literal["forecast", "corrected_async", "sync", "stale", "local"]
Dtype = Literal["float32", "float16", "bfloat16"]

MODEL_HELP = "'demo', a diffusers folder, a hub id (owner/name), or package.module:factory."
Gpus = Annotated[int, typer.Option("--gpus", "-n", min=1, help="How many processes share one image.")]
Height = Annotated[int | None, typer.Option(help="Pixels; for a bare UNet without a VAE, rows of its input.")]
Width = Annotated[int | None, typer.Option(help="Pixels; as for the height.")]
Batch = Annotated[int, typer.Option(min=1, help="Images in one call.")]
CfgOption = Annotated[
    Cfg | None,
    typer.Option(
        help="Guidance. batch: both halves in one doubled batch on every GPU (the default of text models); "
        "split: each half on its own half of the GPUs; none: no guidance."
    ),
]
GroupNormOption = Annotated[GroupNorm | None, typer.Option(help="Statistics of displaced norms [forecast].")]
Warmup = Annotated[int | None, typer.Option(min=1, help="Exact steps at the start of every image [4].")]
DriftLimit = Annotated[
    float | None,
    typer.Option(
        min=0,
        callback=checks.finite,
        help="Steps stay exact until the image changes at most so many times as fast as the sampler moves it; 0: only "
        "--warmup-steps are exact [1].",
    ),
]
QualityFloor = Annotated[
    str | None,
    typer.Option(
        help="Draw pictures, and convert with the fastest setting whose worst one is so close to one device's: 40dB."
    ),
]
Displace = Annotated[
    str | None,
    typer.Option(help="Exchanges to displace, of attention,conv,norm,resize,other; or none, or all [all]."),
]
BackendOption = Annotated[str | None, typer.Option(help="What the segments are compiled with [onnxruntime].")]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(help="Type of the weights, and of a factory's floating-point inputs [float32; a factory's own]."),
]
OptimiseOption = Annotated[
    str | None,
    typer.Option(
        help="Exact passes for speed, with commas: share-subexpressions, merge-linears, hoist-fetches, "
        "hoist-conditioning; or all [none]."
    ),
]
TargetOption = Annotated[
    str | None,
    typer.Option(
        help="tensorrt: GPUs to build for, as sm80, sm86, sm89, sm90, sm100, sm120 (several with commas), or current."
    ),
]
FlavourOption = Annotated[
    Literal["tensorrt", "tensorrt_rtx"] | None,
    typer.Option("--tensorrt-flavour", help="tensorrt: which library; without it, the one that fits this machine."),
]
EngineWeightsOption = Annotated[
    Literal["bound", "refit", "inside"] | None,
    typer.Option(
        help="tensorrt: where engines have their weights from. bound: as inputs, from the bundle's one copy; refit: "
        "put into a stripped engine at loading (the default where the builder has a GPU); inside: stored in it."
    ),
]
CollectivesOption = Annotated[
    Literal["between", "inside"] | None,
    typer.Option(help="Exact steps: cut at every exchange [between], or one engine that holds them (tensorrt only)."),
]
MaxAutotuneOption = Annotated[
    bool | None,
    typer.Option("--max-autotune", help="inductor: measure several kernels for each product and convolution; slow."),
]
AttentionOption = Annotated[
    Literal["auto", "torch", "flash3"] | None,
    typer.Option(help="inductor: whose kernels: FlashAttention-3 where it is installed and faster [auto], or not."),
]
TimedOption = Annotated[
    str | None,
    typer.Option(
        help="inductor: what is decided by timing, of products,convolutions,kernels (ours, where they are faster); or "
        "none, or all [all, on GPUs]."
    ),
]
DeviceOption = Annotated[
    Literal["cpu", "cuda"] | None,
    typer.Option(help="Where an eager bundle runs [cpu]; others run where they were made for."),
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace a bundle of another model, or one made with other options.")
]
Timeout = Annotated[
    float,
    typer.Option(
        help="Seconds until a process that gives no sign of life, or a transfer within a step, is given up; the first "
        "steps have ten times as long."
    ),
]
Segments = Annotated[int | None, typer.Option(min=1, help="Engines per steady step, at most [4].")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder made by convert.")]
ModelOverride = Annotated[
    str | None, typer.Option("--model", help="Where the original model is now, if it moved since convert.")
]

NativeCode = Annotated[
    bool,
    typer.Option(
        "--native-code/--no-native-code",
        help="Load engines that are machine code (inductor, tensorrt): only from whom you would take a program.",
    ),
]


@app.command()
def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    gpus: Gpus = 2,
    height: Height = None,
    width: Width = None,
    batch: Batch = 1,
    cfg: CfgOption = None,
    groupnorm: GroupNormOption = None,
    warmup_steps: Warmup = None,
    drift_limit: DriftLimit = None,
    displace: Displace = None,
    backend: BackendOption = None,
    dtype: DtypeOption = None,
    out: Annotated[Path | None, typer.Option(help="The bundle's folder [NAME-Ngpu here].")] = None,
    force: Force = False,
    strict: Annotated[bool, typer.Option("--strict", help="An operator without a rule is an error.")] = False,
    dump: Annotated[Path | None, typer.Option(help="Write the graph after every pass into this folder.")] = None,
    passes: Annotated[
        list[str] | None, typer.Option(help="A pass of your own, package.module:Class. May be repeated.")
    ] = None,
    rules: Annotated[
        list[str] | None, typer.Option(help="A module with rules of your own, package.module. May be repeated.")
    ] = None,
    stop_after: Annotated[str | None, typer.Option(help="Stop after this pass and print the graph.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Leave out this pass. May be repeated.")] = None,
    segments: Segments = None,
    optimise: OptimiseOption = None,
    target: TargetOption = None,
    tensorrt_flavour: FlavourOption = None,
    engine_weights: EngineWeightsOption = None,
    collectives: CollectivesOption = None,
    max_autotune: MaxAutotuneOption = None,
    attention: AttentionOption = None,
    timed: TimedOption = None,
    quality_floor: QualityFloor = None,
    quality_prompts: Annotated[
        Path | None, typer.Option(help="--quality-floor: a text file, one prompt a line (else a few of its own).")
    ] = None,
    quality_seeds: Annotated[str, typer.Option(help="--quality-floor: as 0,1 or 0-3; every prompt with each.")] = "0,1",
    quality_steps: Annotated[int, typer.Option(min=2, help="--quality-floor: sampling steps.")] = 20,
    as_json: Json = False,
) -> int:
    """Compile MODEL for N processes into a bundle on disk."""
    from districompile.commands import convert as command

    settings = command.Settings(
        model=model, gpus=gpus, height=height, width=width, batch=batch, cfg=cfg, groupnorm=groupnorm,
        warmup_steps=warmup_steps, drift_limit=drift_limit, displace=displace, backend=backend, dtype=dtype,
        segments=segments, strict=strict,
        dump=dump, passes=tuple(passes or ()), rules=tuple(rules or ()), stop_after=stop_after, skip=tuple(skip or ()),
        optimise=optimise, target=target, tensorrt_flavour=tensorrt_flavour, engine_weights=engine_weights,
        collectives=collectives, max_autotune=max_autotune, attention=attention, timed=timed,
    )  # fmt: skip
    floor = None
    if quality_floor is not None:
        floor = command.Floor(quality_floor, quality_prompts, quality_seeds, quality_steps)
    return command.main(settings, out, as_json, floor, force)


@app.command()
def inspect(
    bundle: BundleArgument,
    graph: Annotated[
        Literal["warmup", "steady"] | None, typer.Option(help="Print the steps of this phase instead.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Show what a bundle does: rows per rank, exchanges, bytes per step, fallbacks, segments."""
    from districompile.commands import inspect as command

    return command.main(bundle, graph, as_json)


@app.command()
def verify(
    bundle: BundleArgument,
    prompt: Annotated[str | None, typer.Option(callback=checks.text, help="What to draw for the drift.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps for the drift.")] = 50,
    seed: Annotated[int, typer.Option(min=0, max=checks.LARGEST_SEED - 1, help="Seed of inputs and latents.")] = 0,
    tolerance: Annotated[
        float | None,
        typer.Option(callback=checks.finite, help="Largest relative error of the exact phase [by dtype and backend]."),
    ] = None,
    drift: Annotated[bool, typer.Option(help="Measure the displaced phase over a whole sampling run.")] = True,
    backend: Annotated[
        Literal["onnxruntime"] | None,
        typer.Option(help="Run what a tensorrt bundle's engines were built from by ONNX Runtime: needs no GPU."),
    ] = None,
    quality: Annotated[
        bool, typer.Option("--quality", help="Draw many pictures and compare each with one device's.")
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option(help="--quality: a text file, one prompt a line (else a few of its own).")
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="--quality: prompts, where no file is given.")] = 8,
    seeds: Annotated[
        str | None, typer.Option(help="--quality: as 0,1 or 0-3; every prompt with each (--seed).")
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(
            help="--quality: compare with these group norm modes too, with commas; reference: the paper's code."
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(callback=checks.finite, help="--quality: guidance scale (else the pipeline's own)."),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="--quality: write an HTML page with pictures here.")] = None,
    processes: Annotated[
        bool, typer.Option("--processes", help="--quality: start one process a rank, instead of all in this one.")
    ] = False,
    timeout: Timeout = 30.0,
    nodes: Annotated[bool, typer.Option("--nodes", help="Compare every operator too: finds a wrong rule.")] = False,
    model: ModelOverride = None,
    device: DeviceOption = None,
    native_code: NativeCode = True,
    as_json: Json = False,
) -> int:
    """Compare a bundle with the original model: the exact phase's error, and the displaced phase's drift.
    With --quality: the pictures of many prompts and seeds."""
    if quality:
        from districompile.commands import quality as measuring

        chosen = measuring.Settings(
            bundle=bundle, prompts=prompts, pictures=pictures, seeds=seeds if seeds is not None else str(seed),
            modes=modes, steps=steps, guidance=guidance, report=report, processes=processes, model=model, device=device,
            native_code=native_code, timeout=timeout,
        )  # fmt: skip
        return measuring.main(chosen, as_json)
    from districompile.commands import verify as command

    settings = command.Settings(
        bundle=bundle,
        prompt=prompt,
        steps=steps,
        seed=seed,
        tolerance=tolerance,
        drift=drift,
        nodes=nodes,
        backend=backend,
        model=model,
        device=device,
        native_code=native_code,
    )
    return command.main(settings, as_json)


@app.command()
def run(
    bundle: Annotated[
        str, typer.Argument(metavar="BUNDLE", help="A folder made by convert, or a MODEL as for convert.")
    ],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", callback=checks.text, help="What to draw.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(callback=checks.text, help="What not to draw.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 50,
    guidance: Annotated[
        float | None, typer.Option(callback=checks.finite, help="Guidance scale [the pipeline's own].")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=checks.LARGEST_SEED, help="The same seed draws the same image.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="The image file; its ending gives the format.")] = Path(
        "image.png"
    ),
    log_dir: Annotated[Path | None, typer.Option(help="Keep the log of every process here.")] = None,
    model: ModelOverride = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", "-n", min=1, help="For a MODEL: how many processes [2].")
    ] = None,
    height: Height = None,
    width: Width = None,
    cfg: CfgOption = None,
    groupnorm: GroupNormOption = None,
    warmup_steps: Warmup = None,
    drift_limit: DriftLimit = None,
    displace: Displace = None,
    backend: BackendOption = None,
    dtype: DtypeOption = None,
    segments: Segments = None,
    optimise: OptimiseOption = None,
    target: TargetOption = None,
    tensorrt_flavour: FlavourOption = None,
    engine_weights: EngineWeightsOption = None,
    collectives: CollectivesOption = None,
    max_autotune: MaxAutotuneOption = None,
    attention: AttentionOption = None,
    timed: TimedOption = None,
    transport: Annotated[
        str, typer.Option(help="What moves bytes between the processes: auto, peer, nccl or gloo.")
    ] = "auto",
    cuda_graph: Annotated[bool, typer.Option(help="On GPUs, replay each call as one CUDA graph.")] = True,
    device: DeviceOption = None,
    native_code: NativeCode = True,
    timeout: Timeout = 30.0,
    as_json: Json = False,
) -> int:
    """Draw one image on all processes of a bundle. A MODEL is converted first, and kept in a cache for the next
    time."""
    from districompile.commands import run as command

    settings = command.Settings(
        bundle=bundle, prompt=prompt, negative_prompt=negative_prompt, steps=steps, guidance=guidance, seed=seed,
        out=out, log_dir=log_dir, model=model, gpus=gpus, transport=transport, cuda_graph=cuda_graph, device=device,
        native_code=native_code, timeout=timeout,
        conversion={
            "height": height, "width": width, "cfg": cfg, "groupnorm": groupnorm, "warmup_steps": warmup_steps,
            "drift_limit": drift_limit,
            "displace": displace, "backend": backend, "dtype": dtype, "segments": segments, "target": target,
            "optimise": optimise, "max_autotune": max_autotune, "attention": attention, "timed": timed,
            "tensorrt_flavour": tensorrt_flavour, "engine_weights": engine_weights, "collectives": collectives,
        },
    )  # fmt: skip
    return command.main(settings, as_json)


@app.command()
def refit(
    bundle: BundleArgument,
    lora: Annotated[
        list[Path] | None,
        typer.Option(help="A LoRA (.safetensors), added to the UNet's weights. May be repeated."),
    ] = None,
    scale: Annotated[float, typer.Option(callback=checks.finite, help="How strongly the LoRA counts.")] = 1.0,
    weights: Annotated[
        str | None, typer.Option(help="A model of the same architecture, as for convert, whose weights are taken.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the new bundle goes [in place of the old one].")] = None,
    force: Force = False,
    as_json: Json = False,
) -> int:
    """Give a bundle other weights, a fine-tune's or a LoRA's, without building its engines again."""
    from districompile.commands import refit as command

    return command.main(command.Settings(bundle, tuple(lora or ()), scale, weights, out, force), as_json)


@app.command()
def bench(
    bundle: BundleArgument,
    calls: Annotated[int, typer.Option(min=1, help="Timed calls of each phase.")] = 20,
    steps: Annotated[int | None, typer.Option(min=1, help="Time a whole run of so many calls, too.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write runs and transfers of a few calls here, in Chrome's trace format.")
    ] = None,
    transport: Annotated[str, typer.Option(help="What moves rows between ranks: auto, peer, nccl, gloo.")] = "auto",
    cuda_graph: Annotated[bool, typer.Option(help="Replay calls as CUDA graphs.")] = True,
    device: DeviceOption = None,
    native_code: NativeCode = True,
    kernels: Annotated[Path | None, typer.Option(help="Write a table of a displaced step's kernels here.")] = None,
    timeout: Timeout = 30.0,
) -> int:
    """Time a bundle's exact and displaced steps on this machine with random inputs: one JSON line a figure."""
    from districompile.commands import bench as command

    return command.main(
        command.Settings(bundle, calls, steps, trace, transport, cuda_graph, device, kernels, native_code, timeout)
    )


@app.command()
def doctor(
    as_json: Json = False,
    trying: Annotated[
        bool, typer.Option("--try", help="Put a small network through each backend that is usable here.")
    ] = False,
) -> int:
    """Show versions, devices, and which backends can be used here, and why not."""
    from districompile.commands import doctor as command

    return command.main(as_json, trying)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"districompile {version('districompile')}")
        raise typer.Exit(0)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Errors that a user can cause are one line, everything else is a defect
    and keeps its traceback."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        with checks.Output(), warnings.catch_warnings():
            warnings.showwarning = _warn
            # Typer's group turns Ctrl-C into the result 130.
            result: Any = typer.main.get_command(app).main(
                args=args or ["--help"], prog_name="districompile", standalone_mode=False
            )
            end_undisturbed()
    except checks.ReaderLeft:
        return 141  # as a shell says it of a process that SIGPIPE ended
    except Error as e:
        return _fail(str(e))
    except OSError as e:
        if e.filename is None:
            raise
        name = str(e.filename)
        return _fail(f"{name if len(name) <= 100 else name[:97] + '...'}: {e.strerror}")
    except (KeyboardInterrupt, typer.Abort):
        end_undisturbed()
        result = INTERRUPTED
    except Exception as e:
        # Usage errors; their class lives in click or inside typer, depending on typer's version.
        if hasattr(e, "format_message") and hasattr(e, "exit_code"):
            return _fail(str(e.format_message()))
        raise
    if result == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return result if isinstance(result, int) else 0


def _warn(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Our own in one line, as errors are."""
    own = issubclass(category, ValueWarning)
    print(f"{'warning' if own else category.__name__}: {message}", file=sys.stderr)


def _fail(message: str) -> int:
    line = " ".join(part.strip() for part in message.splitlines() if part.strip())
    print(f"error: {line}", file=sys.stderr)
    return 2
