"""``districompile convert``: load, compile, save, report."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from districompile import api
from districompile.backends.base import Backend, get_backend
from districompile.bundle import Bundle, check_replaceable
from districompile.commands.common import UsageError, console, print_json, quiet_libraries
from districompile.ir.plan import dtype_of
from districompile.models.imports import add_current_folder
from districompile.models.inputs import parameter_bytes
from districompile.models.sources import LoadedModel, load_source
from districompile.outputs import check_folder
from districompile.progress import Progress, terminal_progress
from districompile.report import Report, size

DEFAULT_BACKEND = "onnxruntime"
DEFAULT_DTYPE = "float32"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of ``convert``; None means that the default is used."""

    model: str
    gpus: int = 2
    height: int | None = None
    width: int | None = None
    batch: int = 1
    cfg: str | None = None
    groupnorm: str | None = None
    warmup_steps: int | None = None
    drift_limit: float | None = None
    displace: str | None = None
    backend: str | None = None
    dtype: str | None = None
    segments: int | None = None
    strict: bool = False
    dump: Path | None = None
    passes: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    stop_after: str | None = None
    skip: tuple[str, ...] = ()
    optimise: str | None = None
    target: str | None = None
    tensorrt_flavour: str | None = None
    engine_weights: str | None = None
    collectives: str | None = None
    max_autotune: bool | None = None
    attention: str | None = None
    timed: str | None = None


_BACKEND_OPTIONS = {  # option -> its flag, and the one backend that takes it
    "flavour": ("--tensorrt-flavour", "tensorrt"),
    "target": ("--target", "tensorrt"),
    "weights": ("--engine-weights", "tensorrt"),
    "max_autotune": ("--max-autotune", "inductor"),
    "attention": ("--attention", "inductor"),
    "timed": ("--timed", "inductor"),
}


def make_backend(settings: Settings) -> Backend:
    """The backend with its options. Raises :class:`BackendError` where it cannot be used here, :class:`UsageError` for
    an option that belongs to another one."""
    name = settings.backend or DEFAULT_BACKEND
    options = {
        "flavour": settings.tensorrt_flavour, "target": settings.target, "weights": settings.engine_weights,
        "max_autotune": settings.max_autotune, "attention": settings.attention,
        "timed": settings.timed,
    }  # fmt: skip
    given = {key: value for key, value in options.items() if value is not None}
    for flag, owner in (_BACKEND_OPTIONS[key] for key in given):
        if name != owner:
            raise UsageError(f"{flag}: only with --backend {owner}, not with {name}")
    return get_backend(name, **given)


@dataclasses.dataclass(frozen=True)
class Floor:
    """What ``--quality-floor`` asks for, and what is drawn to find out."""

    floor: str
    prompts: Path | None
    seeds: str
    steps: int


def main(settings: Settings, out: Path | None, as_json: bool, floor: Floor | None = None, force: bool = False) -> int:
    """Convert, save to ``out`` and print what was made. ``force``: replace a bundle that was made otherwise."""
    target = out or default_out(settings)
    made_with = origin(settings, floor)
    if settings.stop_after is None:
        check_replaceable(target, made_with, force)
    if settings.dump is not None:
        check_folder(settings.dump, "--dump")
    backend = make_backend(settings)
    quiet_libraries()
    progress = terminal_progress()
    started = time.perf_counter()
    trials: list[dict[str, Any]] = []
    if floor is not None:
        from districompile.commands.quality import reach_floor

        settings, trials = reach_floor(settings, floor, progress)
    program, loaded = compile_model(settings, progress)
    if floor is not None:
        program.plan.report["quality"] = {"floor_db": floor.floor, "steps": floor.steps, "trials": trials}
    compiled = time.perf_counter()
    if settings.stop_after is not None:
        print(program.graph_text("warmup"))
        return 0
    save(program, target, backend, settings, loaded, progress, made_with, force)
    plan = Bundle.open(target, verify=False).plan  # with the engines that were built
    seconds = {"convert": round(compiled - started, 2), "save": round(time.perf_counter() - compiled, 2)}
    if as_json:
        print_json({"bundle": str(target), "seconds": seconds, "report": Report(plan).to_dict()})
        return 0
    terminal = console()
    terminal.print(Report(plan))
    for line in (*quality_lines(plan.report), *pass_lines(plan.report)):
        terminal.print(line, markup=False, highlight=False)
    terminal.print(
        f"{target}: {size(folder_bytes(target))}, converted in {seconds['convert']} s, built and saved in "
        f"{seconds['save']} s",
        markup=False,
        highlight=False,
    )
    return 0


def compile_model(settings: Settings, progress: Progress) -> tuple[Any, LoadedModel]:
    """Load the model and compile it; returns the program and what was loaded."""
    with progress.task(f"loading {settings.model}") as task:
        loaded = load_source(settings.model, None if settings.dtype is None else dtype_of(settings.dtype))
        task.describe(f"loaded {size(parameter_bytes(loaded.module))} of weights")
    cfg = settings.cfg or loaded.cfg
    example = loaded.example(settings.height, settings.width, settings.batch, cfg)
    if cfg == "split" and settings.gpus % 2:
        raise UsageError(f"--cfg split gives each guidance half its own GPUs: --gpus must be even, not {settings.gpus}")
    add_current_folder()
    options: dict[str, Any] = {
        "groupnorm": settings.groupnorm,
        "displace": settings.displace,
        "warmup_steps": settings.warmup_steps,
        "drift_limit": settings.drift_limit,
        "segments": settings.segments,
        "optimise": settings.optimise,
        "dump": settings.dump,
        "stop_after": settings.stop_after,
    }
    program = api.convert(
        loaded.module,
        args=example.args,
        kwargs=example.kwargs,
        ranks=settings.gpus,
        rows=example.rows,
        cfg="split" if cfg == "split" else "none",
        passes=settings.passes,
        rules=settings.rules,
        strict=settings.strict,
        skip=settings.skip,
        progress=progress,
        **{name: value for name, value in options.items() if value is not None},
    )
    # What the pipeline around the module has to know, and the module itself does not.
    program.plan.options.update(guidance=cfg, images=settings.batch)
    if settings.dtype is not None or loaded.kind != "factory":  # else the factory's own types
        program.plan.options["dtype"] = settings.dtype or DEFAULT_DTYPE
    for name, value in (("height", settings.height), ("width", settings.width)):
        position = 0 if name == "height" else 1
        known = loaded.default_size[position] if loaded.default_size else None
        program.plan.options[name] = known if value is None else value
    return program, loaded


def save(
    program: Any, target: Path, backend: Backend, settings: Settings, loaded: LoadedModel, progress: Progress,
    made_with: Mapping[str, Any], force: bool = False,
) -> None:  # fmt: skip
    """Build the engines and write the bundle; a failure leaves nothing at ``target``."""
    program.save(
        target, backend, source=loaded.source, collectives=settings.collectives or "between", progress=progress,
        made_with=made_with, force=force,
    )  # fmt: skip


def origin(settings: Settings, floor: Floor | None = None) -> dict[str, Any]:
    """What a bundle is made from, and with which options: converted again with the same, it replaces itself."""
    options = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("dump", "stop_after")}
    options["backend"] = settings.backend or DEFAULT_BACKEND
    options["dtype"] = settings.dtype or DEFAULT_DTYPE
    return {"command": "convert", **options, "quality": None if floor is None else dataclasses.asdict(floor)}


def default_out(settings: Settings) -> Path:
    """``NAME-Ngpu`` in the current folder, NAME being the model's last part."""
    name = re.split(r"[/:]", settings.model.rstrip("/"))[-1] or "model"
    if Path(settings.model).is_dir():
        name = Path(settings.model).resolve().name
    return Path(f"{name}-{settings.gpus}gpu")


def pass_lines(report: dict[str, Any]) -> list[str]:
    """One line naming the passes that ran; those that change numerics are marked."""
    passes = report.get("passes", ())
    if not passes:
        return []
    names = ", ".join(p["name"] + ("" if p["exact"] else " (displaced)") for p in passes)
    return [f"passes: {names}"]


def quality_lines(report: dict[str, Any]) -> list[str]:
    """What ``--quality-floor`` tried, and what it chose."""
    quality = report.get("quality")
    if not quality:
        return []
    lines = [f"quality floor {quality['floor_db']}, {quality['steps']} steps; tried, cheapest first:"]
    for t in quality["trials"]:
        exact = "" if t["exact_steps"] is None else f", {t['exact_steps']:.1f} exact steps"
        lines.append(
            f"  {t['candidate']}: worst {t['worst_db']:.1f} dB ({t['worst']}), mean {t['mean_db']:.1f} dB{exact}"
            + ("  <- chosen" if t["good"] else "")
        )
    return lines


def folder_bytes(folder: Path) -> int:
    """Bytes of all files under ``folder``."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
