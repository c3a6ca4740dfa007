"""``districompile run``: draw one image on all processes of a bundle."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from districompile.bundle import Bundle
from districompile.commands import convert as converting
from districompile.commands.checks import check_steps
from districompile.commands.common import (
    UsageError,
    console,
    is_bundle,
    print_json,
    quiet_libraries,
)
from districompile.commands.drawing import Request, check_guidance, draw, image_format, place, save_images
from districompile.ir.plan import dtype_of
from districompile.models.sources import DEMO, load_pipeline, pipeline_location
from districompile.outputs import OutputError, check_file, check_folder
from districompile.progress import Silent, terminal_progress
from districompile.report import Report
from districompile.runtime.choose import check_transport
from districompile.runtime.launcher import launch
from districompile.runtime.liveness import TIMEOUT, check_timeout
from districompile.runtime.module import check_device, check_native_code, load
from districompile.runtime.runner import world_size


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of ``run``. ``bundle`` is a bundle or a MODEL; ``conversion`` holds options of ``convert`` by name,
    None where they were not given, which apply to a MODEL only."""

    bundle: str
    prompt: str | None
    negative_prompt: str | None
    steps: int
    guidance: float | None
    seed: int
    out: Path
    log_dir: Path | None
    model: str | None
    gpus: int | None
    transport: str
    cuda_graph: bool
    device: str | None
    native_code: bool
    conversion: dict[str, Any]
    timeout: float = TIMEOUT


@dataclasses.dataclass(frozen=True)
class Job:
    """What every rank is told."""

    bundle: Path
    model: str
    dtype: str
    request: Request
    out: Path
    transport: str
    cuda_graph: bool
    device: str | None
    native_code: bool
    timeout: float


def main(settings: Settings, as_json: bool) -> int:
    """Convert first where a MODEL was given, then start the processes and wait for the image."""
    image_format(settings.out)
    check_transport(settings.transport)
    check_timeout(settings.timeout)
    check_file(settings.out, "--out")
    if settings.log_dir is not None:
        check_folder(settings.log_dir, "--log-dir")
    quiet_libraries()
    if not is_bundle(Path(settings.bundle).expanduser()):
        check_steps(settings.model or settings.bundle, settings.steps)  # before it is converted
    folder = _bundle_folder(settings)
    bundle = Bundle.open(folder)
    check_device(bundle, settings.device)
    check_native_code(bundle, settings.native_code)
    plan = bundle.plan
    model = str(settings.model or bundle.manifest.get("source") or "")
    if not model:
        raise UsageError(f"{folder} does not say where its model came from: give --model")
    check_guidance(plan.options, settings.guidance)
    if settings.prompt is None and any(i.path == "encoder_hidden_states" for i in plan.inputs):
        raise UsageError("--prompt is needed: the model draws from text")
    check_steps(pipeline_location(model), settings.steps)
    few = Report(plan).few_rows()
    if few is not None:
        print(f"note: {few}", file=sys.stderr)
    request = Request(
        settings.prompt, settings.negative_prompt, settings.steps, settings.guidance, settings.seed, dict(plan.options)
    )
    world = world_size(plan)
    job = Job(
        folder.resolve(), str(model), str(plan.options.get("dtype", "float32")), request, settings.out.absolute(),
        settings.transport, settings.cuda_graph, settings.device, settings.native_code, settings.timeout,
    )  # fmt: skip
    figures = launch(worker, (job,), world, log_dir=settings.log_dir).get(0)
    if figures is None:  # another rank under an outer launcher
        return 0
    for name, share in figures["not_finite"].items():
        print(
            f"warning: {share:.1%} of the {name} is NaN or infinite, and the picture black there: convert with --dtype "
            "float32 or bfloat16",
            file=sys.stderr,
        )
    warning = drift_warning(figures, plan.options, plan.report)
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)
    if as_json:
        print_json(
            {**figures, "bundle": str(folder), "processes": world, "steps": settings.steps, "seed": settings.seed}
        )
        return 0
    for image in figures["images"]:
        console().print(
            f"{image}: {settings.steps} steps ({figures['calls']['exact']} exact) on {world} processes in "
            f"{figures['seconds']:.1f} s ({figures['it_per_s']:.2f} it/s)",
            markup=False,
            highlight=False,
        )
    return 0


def worker(job: Job) -> dict[str, Any] | None:
    """One rank: the unmodified pipeline around the compiled UNet. Rank 0 shows progress, writes the image and returns
    what there is to tell."""
    quiet_libraries()
    first = int(os.environ.get("RANK", "0")) == 0
    compiled = load(
        job.bundle,
        transport=job.transport,
        cuda_graph=job.cuda_graph,
        device=job.device,
        native_code=job.native_code,
        timeout=job.timeout,
    )
    pipe = load_pipeline(job.model, dtype_of(job.dtype))
    place(pipe, compiled.device)
    pipe.unet = compiled
    progress = terminal_progress() if first else Silent()
    picture = draw(pipe, job.request, progress, decode=first)
    if not first or picture.pixels is None:
        return None
    images = save_images(picture.pixels, job.out)
    return {
        "images": [str(p) for p in images],
        "not_finite": not_finite({"latents": picture.latents, "image": picture.pixels}),
        "seconds": round(picture.seconds, 3),
        "it_per_s": round(picture.calls / picture.seconds, 3),
        "calls": compiled.image_calls,
        "drift": compiled.image_drift,
        "transport": compiled.transport,
    }


def not_finite(tensors: Mapping[str, torch.Tensor | None]) -> dict[str, float]:
    """The share of values that are NaN or infinite, of those tensors that have any."""
    shares = {n: 1 - t.isfinite().double().mean().item() for n, t in tensors.items() if t is not None}
    return {name: share for name, share in shares.items() if share > 0}


def drift_warning(figures: dict[str, Any], options: dict[str, Any], report: dict[str, Any]) -> str | None:
    """One line where the picture may differ from one device's: its displaced steps came while it still changed faster
    than the limit, or faster than in the pictures that ``--quality-floor`` measured."""
    drift, limit = figures.get("drift"), float(options.get("drift_limit", 0.0))
    trials = (report.get("quality") or {}).get("trials", ())
    seen = [t["drift"] for t in trials if t.get("good") and t.get("drift") is not None]
    if drift is None or limit <= 0:
        return None
    beyond = max([2 * limit, *seen])
    if drift <= beyond:
        return None
    return (
        f"during displaced steps the image changed up to {drift:.1f} times as fast as the sampler moved it "
        f"({beyond:.1f} was expected at most); the steps after that were exact. "
        "Lower --drift-limit or raise --warmup-steps at convert"
    )


def _bundle_folder(settings: Settings) -> Path:
    """The bundle that was given, or the cached conversion of the MODEL that was given."""
    path = Path(settings.bundle).expanduser()
    given = {name: value for name, value in settings.conversion.items() if value is not None}
    if settings.gpus is not None:
        given["gpus"] = settings.gpus
    if is_bundle(path):
        if given:
            names = ", ".join("--" + name.replace("_", "-") for name in given)
            raise UsageError(f"{names}: only for a MODEL; {path} is a bundle, whose options are fixed (convert again)")
        return path
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("under torchrun give a bundle, made by districompile convert before")
    conversion = converting.Settings(model=settings.bundle, **{"gpus": 2, **given})
    folder = cache_root() / _key(conversion)
    if is_bundle(folder):
        return folder
    try:
        check_folder(folder)
    except OutputError as e:
        raise UsageError(f"the conversion cannot be kept: {e}; set XDG_CACHE_HOME, or convert first") from e
    progress = terminal_progress()
    backend = converting.make_backend(conversion)
    program, loaded = converting.compile_model(conversion, progress)
    converting.save(program, folder, backend, conversion, loaded, progress, converting.origin(conversion))
    print(
        f"converted {settings.bundle} for {conversion.gpus} processes; the bundle is kept in {folder}", file=sys.stderr
    )
    return folder


def cache_root() -> Path:
    """Where conversions made by ``run`` are kept: the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "districompile"
    except RuntimeError as e:
        raise UsageError("there is no home folder to keep the conversion in: set XDG_CACHE_HOME") from e


def _key(conversion: converting.Settings) -> str:
    """A name that changes with the model's files, the options, the compiler's own files and torch."""
    parts: list[str] = [repr(conversion), torch.__version__]
    folders = [DEMO if conversion.model == "demo" else Path(conversion.model).expanduser()]
    folders.append(Path(__file__).resolve().parents[1])
    for folder in folders:
        if folder.is_dir():
            files = sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
            parts += [f"{p}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files]
    name = converting.default_out(conversion).name
    return f"{name}-{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:16]}"
