# SPDX-License-Identifier: Apache-2.0
"""``districompile run``: draw images on all processes of a bundle.

This process checks the options and starts the ranks. For a bundle that is ready it does not import PyTorch: the ranks
do, and they check what depends on the bundle's plan and on diffusers (:mod:`districompile.cli.commands.run_rank`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from districompile.bundle.manifest import PLAN, PLANS, read_manifest
from districompile.cli import checks, convert, defaults
from districompile.cli.common import (
    UsageError,
    console,
    is_bundle,
    load_extensions,
    print_json,
    quiet_libraries,
    whole_path,
)
from districompile.cli.drawing import Job, Refused, Report
from districompile.cli.options import Conversion
from districompile.cli.pictures import Targets, check_start, image_format, read_picture
from districompile.cli.run import Settings
from districompile.common.outputs import OutputError, check_folder
from districompile.progress import Progress, terminal_progress
from districompile.quality.cases import Case, read_prompts
from districompile.runtime.processes.launcher import launch


def main(settings: Settings) -> int:
    """Convert a MODEL first, then start the processes and wait for the images."""
    image_format(settings.out)
    _check_combinations(settings)
    check_start(settings.image, settings.mask)
    loras = tuple(parse_scaled(text, "--lora") for text in settings.lora)
    controls = tuple(parse_scaled(text, "--control-image") for text in settings.control_image)
    for path, _ in controls:
        read_picture(path, "--control-image")
    if settings.log_dir is not None:
        check_folder(settings.log_dir, "--log-dir")
    prompts = _prompts(settings)
    _targets(settings, len(_cases(settings, prompts, 1))).check(settings.force)  # also before a conversion
    folder = _bundle_folder(settings)
    manifest = read_manifest(folder)
    model = str(settings.model or manifest.get("source") or "")
    if not model:
        raise UsageError(f"{folder} does not say where its model came from: give --model")
    if str(manifest.get("device")).startswith("cuda") and not defaults.driver_gpus():
        raise UsageError(f"{folder} was made for a GPU, and there is none here: convert again for the CPU")
    cases = _cases(settings, prompts, _images(settings, folder))
    targets = _targets(settings, len(cases))
    targets.check(settings.force)
    if loras:
        folder = _with_loras(folder, str(manifest["sha256"]), loras)
    world = int(manifest["mesh"]["cfg"]) * int(manifest["mesh"]["patch"])
    job = Job(
        bundle=folder, model=model, cases=cases, targets=targets, columns=len(cases) // len(prompts),
        negative_prompt=settings.negative_prompt, steps=settings.steps, guidance=settings.guidance,
        scheduler=settings.scheduler, loras=loras, image=_absolute(settings.image), mask=_absolute(settings.mask),
        strength=settings.strength, controls=controls, preview_every=settings.preview_every,
        size=settings.size, shape=settings.shape, grows=settings.shapes == "auto", vae=whole_path(settings.vae),
        transport=settings.transport,
        cuda_graph=settings.cuda_graph, device=settings.device, native_code=settings.native_code,
        timeout=settings.timeout, extensions=settings.extension,
        record=_record(settings, manifest, model, world),
    )  # fmt: skip
    found = launch(worker, (job,), world, log_dir=settings.log_dir)
    refused = next((f for f in found.values() if isinstance(f, Refused)), None)
    if refused is not None:
        raise UsageError(refused.message)
    report = found.get(0)
    if isinstance(report, Report):  # else another rank under an outer launcher
        _print(report, settings, folder, world)
    return 0


def worker(job: Job) -> Report | Refused | None:
    """Draw on one rank. Ranks other than 0 return None, unless they refuse."""
    from districompile.cli.commands.run_rank import draw_all

    return draw_all(job)


def _check_combinations(settings: Settings) -> None:
    if settings.image is None:
        for name in ("mask", "strength"):
            if getattr(settings, name) is not None:
                raise UsageError(f"--{name}: only with --image")
    if settings.shape is not None and settings.size is not None:
        raise UsageError("--shape names one of the bundle's shapes with its size: leave --size out")
    if settings.size is not None:
        checks.parse_size(settings.size)
    if settings.prompts is not None and settings.prompt is not None:
        raise UsageError("--prompts and --prompt: give one of the two")
    if settings.seeds is not None and (settings.num_images is not None or settings.seed):
        raise UsageError("--seeds gives all seeds: leave out --seed and --num-images")


def _prompts(settings: Settings) -> list[str | None]:
    return [settings.prompt] if settings.prompts is None else list(read_prompts(settings.prompts))


def _cases(settings: Settings, prompts: list[str | None], images: int) -> tuple[Case, ...]:
    """Return all pictures, prompt by prompt. ``images`` is the number of images of one call."""
    if settings.seeds is not None:
        seeds = checks.seeds(settings.seeds)
    else:
        seeds = [(settings.seed + i) % (checks.LARGEST_SEED + 1) for i in range(settings.num_images or images)]
    if len(prompts) * len(seeds) > checks.MOST_IMAGES:
        raise UsageError(f"{len(prompts)} prompts with {len(seeds)} seeds: ask for at most {checks.MOST_IMAGES} images")
    return tuple(Case(prompt, seed) for prompt in prompts for seed in seeds)


def _targets(settings: Settings, count: int) -> Targets:
    return Targets.of(settings.out.absolute(), count, settings.grid, settings.preview_every is not None)


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


def _images(settings: Settings, folder: Path) -> int:
    """Return the number of images of one call in the shape that is drawn.

    The plans are read as they are: the ranks check them. A plan that they refuse counts as one image here.
    """
    found: Any = None
    try:
        plans = {"": folder / PLAN, **{f.stem: f for f in sorted((folder / PLANS).glob("*.json"))}}
        options = {name: json.loads(file.read_bytes())["options"] for name, file in plans.items()}
        size = None if settings.size is None else checks.parse_size(settings.size)
        found = options[""]["images"]
        for name, other in options.items():
            named = settings.shape is not None and (name == settings.shape or name.startswith(f"{settings.shape}-"))
            if named or (size is not None and (other.get("width"), other.get("height")) == size):
                found = other["images"]
                break
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return found if isinstance(found, int) and 1 <= found <= checks.MOST_IMAGES else 1


def parse_scaled(text: str, option: str) -> tuple[Path, float]:
    """Parse ``FILE=SCALE`` or ``FILE``. Raise :class:`UsageError` for a file that is not there."""
    name, equals, number = text.rpartition("=")
    scale = 1.0
    try:
        scale = float(number) if equals else 1.0
    except ValueError:
        name = text
    path = Path(name if equals and name else text).expanduser()
    checks.finite(scale)
    if not path.is_file():
        raise UsageError(f"{option} {text}: there is no file {path}")
    return path.absolute(), scale


def _record(settings: Settings, manifest: dict[str, Any], model: str, world: int) -> dict[str, Any]:
    """Return how the images are drawn, for their files."""
    given: dict[str, Any] = {
        "negative_prompt": settings.negative_prompt,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "scheduler": settings.scheduler,
        "image": None if settings.image is None else str(settings.image),
        "mask": None if settings.mask is None else str(settings.mask),
        "strength": settings.strength,
        "lora": list(settings.lora) or None,
        "control_image": list(settings.control_image) or None,
        "vae": settings.vae,
    }
    bundle = {"model": model, "bundle": str(manifest["sha256"]), "backend": manifest["backend"], "processes": world}
    return {**{name: value for name, value in given.items() if value is not None}, **bundle}


def _print(report: Report, settings: Settings, folder: Path, world: int) -> None:
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    targets = _targets(settings, len([f for d in report.drawn for f in d.files]))
    seconds = sum(d.seconds for d in report.drawn)
    if settings.as_json:
        drifts = [d.drift for d in report.drawn if d.drift is not None]
        shares: dict[str, float] = {}
        for name, share in ((n, s) for d in report.drawn for n, s in d.not_finite.items()):
            shares[name] = max(share, shares.get(name, 0.0))
        print_json(
            {
                "images": [str(f) for d in report.drawn for f in d.files],
                "pictures": [
                    {"file": str(f), "prompt": c.prompt, "seed": c.seed}
                    for d in report.drawn for f, c in zip(d.files, d.cases, strict=True)
                ],
                "grid": None if targets.grid is None else str(targets.grid),
                "not_finite": shares,
                "seconds": round(seconds, 3),
                "it_per_s": round(sum(d.it_per_s * d.seconds for d in report.drawn) / max(seconds, 1e-9), 3),
                "calls": {n: sum(d.calls[n] for d in report.drawn) for n in report.drawn[0].calls},
                "drift": max(drifts, default=None),
                "transport": report.transport,
                "bundle": str(folder),
                "processes": world,
                "steps": settings.steps,
                "seed": report.drawn[0].cases[0].seed,
            }
        )  # fmt: skip
        return
    for drawn in report.drawn:
        steps = sum(drawn.calls.values())
        for file in drawn.files:
            console().print(
                f"{file}: {steps} steps ({_phases(drawn.calls)}) on {world} processes in "
                f"{drawn.seconds:.1f} s ({drawn.it_per_s:.2f} it/s)",
                markup=False,
                highlight=False,
            )
    if targets.grid is not None:
        console().print(f"{targets.grid}: all of them", markup=False, highlight=False)


def _phases(calls: Mapping[str, int]) -> str:
    """Return how many steps were exact; with reuse, how many of each phase there were."""
    shown = calls if "reused" in calls else {"exact": calls["exact"]}
    return ", ".join(f"{count} {phase}" for phase, count in shown.items())


def _bundle_folder(settings: Settings) -> Path:
    """Return the given bundle, or the cached conversion of the given MODEL."""
    path = Path(settings.bundle).expanduser()
    if not is_bundle(path) and settings.size is not None:
        if settings.width is not None or settings.height is not None:
            raise UsageError("--size gives height and width: leave --height and --width out")
        width, height = checks.parse_size(settings.size)
        settings = dataclasses.replace(settings, width=width, height=height)
    fields = {f.name: getattr(settings, f.name) for f in dataclasses.fields(Conversion)}
    given = {name: value for name, value in fields.items() if value is not None and value != ()}
    if is_bundle(path):
        given.pop("extension", None)
        if given:
            names = ", ".join("--" + name.replace("_", "-") for name in given)
            raise UsageError(f"{names}: only for a MODEL; {path} is a bundle, whose options are fixed (convert again)")
        return path
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("under torchrun give a bundle: run districompile convert first")
    from districompile.cli.commands import convert as converting
    from districompile.cli.commands import convert_vae

    conversion = converting.with_origin(convert.Settings(model=settings.bundle, **given))
    conversion, choice = defaults.resolve(conversion, defaults.this_machine())
    # With --shapes auto, all sizes of a model are shapes of one bundle
    growing = settings.shapes == "auto"
    folder = cache_root() / _key(dataclasses.replace(conversion, width=None, height=None) if growing else conversion)
    if is_bundle(folder):
        return folder
    load_extensions(settings.extension)
    checks.check_steps(settings.model or conversion.model, settings.steps)  # before it is converted
    _check_cache(folder)
    quiet_libraries()
    progress = terminal_progress()
    backend = converting.make_backend(conversion)
    backend.begin()
    if choice.line is not None:
        print(choice.line, file=sys.stderr)
    conversion, known = converting.with_guidance(conversion, choice, progress)
    vae = convert_vae.wanted_vae(conversion, backend)
    _convert_network(conversion, folder, backend, choice, known, progress)
    if vae is not None:
        own = dataclasses.replace(conversion, as_json=True)
        again = functools.partial(converting.convert_parts, backend=backend)
        convert_vae.convert_into(folder, vae, own, again)
    print(
        f"converted {settings.bundle} for {conversion.ranks} processes; the bundle is kept in {folder}", file=sys.stderr
    )
    return folder


def _convert_network(
    conversion: convert.Settings, folder: Path, backend: Any, choice: defaults.Choice, known: Any, progress: Progress
) -> None:
    """Convert a model into the cache. It is no longer in memory when this returns."""
    from districompile.cli.commands import convert as converting

    program, loaded = converting.compile_model(conversion, progress, known)
    converting.save(program, folder, backend, conversion, loaded, progress, others=choice.others)


def _with_loras(bundle: Path, sha256: str, loras: tuple[tuple[Path, float], ...]) -> Path:
    """Return a bundle in the cache that has the weights of ``bundle`` with LoRAs. Its other files are shared."""
    parts = [sha256, *(f"{hashlib.sha256(path.read_bytes()).hexdigest()}={scale!r}" for path, scale in loras)]
    folder = cache_root() / f"{bundle.resolve().name}-lora-{_digest(parts)}"
    if is_bundle(folder):
        return folder
    _check_cache(folder)
    from districompile.bundle.refit import read_lora, refit

    quiet_libraries()
    config = read_manifest(bundle).get("config") or {}
    changes = [change for path, scale in loras for change in read_lora(path, config, scale)[0]]
    note = {"weights": None, "loras": [str(path) for path, _ in loras], "scale": [scale for _, scale in loras]}
    refit(bundle, folder, loras=changes, note=note, progress=terminal_progress())
    print(f"the bundle with the LoRA is kept in {folder}", file=sys.stderr)
    return folder


def _check_cache(folder: Path) -> None:
    try:
        check_folder(folder)
    except OutputError as e:
        raise UsageError(f"the bundle cannot be kept: {e}; set XDG_CACHE_HOME, or convert first") from e


def cache_root() -> Path:
    """Return the cache folder of conversions made by ``run``."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "districompile"
    except RuntimeError as e:
        raise UsageError("there is no home folder to keep the conversion in: set XDG_CACHE_HOME") from e


def _key(conversion: convert.Settings) -> str:
    """Return a name that changes with the model's files, the options, the compiler's own files and torch."""
    from districompile.models.origin import Origin

    package = Path(__file__).resolve().parents[2]
    parts: list[str] = [repr(conversion), importlib.metadata.version("torch")]
    origin = Origin.of(conversion.model)
    models = [package / "models" / "demo" if conversion.model == "demo" else Path(origin.path).expanduser()]
    models += [Path(origin.config).expanduser()] if origin.config is not None else []
    if origin.file is not None:
        status = origin.file.stat()
        parts.append(f"{origin.file.resolve()}:{status.st_size}:{status.st_mtime_ns}")
    for folder in (
        *(m.resolve() for m in models),
        package,
        (package / "passes").resolve(),
        (package / "models").resolve(),
    ):
        if folder.is_dir():
            files = sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
            parts += [f"{p}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files]
    return f"{convert.default_out(conversion).name}-{_digest(parts)}"


def _digest(parts: list[str]) -> str:
    return hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:16]
