# SPDX-License-Identifier: Apache-2.0
"""``districompile verify --quality``: compare images of a bundle, and of other group norm modes, with one device's."""

from __future__ import annotations

import dataclasses
import functools
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from rich.table import Table
from safetensors.torch import load_file, save_file

from districompile.bundle.bundle import Bundle
from districompile.cli import convert
from districompile.cli.calibration import calibration_calls
from districompile.cli.checks import check_steps
from districompile.cli.checks import seeds as parse_seeds
from districompile.cli.common import (
    UsageError,
    chosen_dtype,
    console,
    load_extensions,
    print_json,
    quiet_libraries,
    source_of,
)
from districompile.cli.generate import check_guidance, place
from districompile.cli.options import GroupNorm
from districompile.cli.shapes import Shape, at_shape, shapes_of
from districompile.cli.verify import Settings
from districompile.common.outputs import check_file
from districompile.errors import ConvertError
from districompile.ir.spec import dtype_of
from districompile.ir.unit import reuse_text
from districompile.models.sources import LoadedModel, load_pipeline, load_source
from districompile.plan.plan import ExecutionPlan
from districompile.plan.plan_report import QualityTrial
from districompile.program import Program
from districompile.progress import Progress, Silent, terminal_progress
from districompile.quality.cases import GENERAL, Case, demo_prompts, make_cases, read_prompts
from districompile.quality.draw import Drawn, Setting, draw
from districompile.quality.floor import REUSE, Candidate, Trial, ladder, parse_floor, reusing, search
from districompile.quality.measure import BITS, Measured, Result, Way, borders_of, check_modes, measure, way_of
from districompile.quality.page import COLUMNS, figures, write_page
from districompile.runtime.load import check_device, check_native_code, load
from districompile.runtime.processes.launcher import launch
from districompile.runtime.processes.liveness import check_timeout


def main(settings: Settings) -> int:
    """Measure, print the table, and write the page of ``--report``."""
    load_extensions(settings.extension)
    bundle = at_shape(Bundle.open(settings.bundle), settings.shape)
    device = torch.device(check_device(bundle, settings.device))
    check_native_code(bundle, settings.native_code)
    modes = [m for m in (settings.modes or "").split(",") if m]
    check_modes(modes)
    seeds = parse_seeds(settings.seeds or str(settings.seed))
    if settings.prompts is not None:
        read_prompts(settings.prompts)  # a mistake is found before the work
    check_guidance(bundle.plan.options, settings.guidance)
    if settings.report is not None:
        check_file(settings.report, "--report")
        if settings.report.suffix.lower() not in (".html", ".htm"):
            raise UsageError(f"--report {settings.report}: give the name of a file that ends in .html")
    check_timeout(settings.timeout)
    quiet_libraries()
    progress = terminal_progress()
    plan, source = bundle.plan, source_of(bundle.manifest, settings.model)
    check_steps(source, settings.steps)
    with progress.task(f"loading {source}"):
        loaded = load_source(source, chosen_dtype(plan))
        pipe = pipeline_of(loaded)
    cases = make_cases(prompts_of(loaded, plan, settings.prompts, settings.pictures), seeds)
    measured = _measure(settings, bundle, loaded, pipe, modes, cases, device, progress)
    setting = f"{settings.steps} steps, {len(cases)} pictures, {source}"
    if settings.report is not None:
        about = [f"{settings.bundle}: {setting}.", _options_text(plan)]
        write_page(settings.report, f"Pictures of {settings.bundle.name}", about, measured)
    if settings.as_json:
        results = [r.to_dict() for r in measured.results]
        print_json({"bundle": str(settings.bundle), "steps": settings.steps, "model": source, "results": results})
        return 0
    terminal = console()
    terminal.print(f"{setting}; against one device", markup=False, highlight=False)
    terminal.print(result_table(measured))
    if settings.report is not None:
        terminal.print(f"{settings.report}: the worst pictures side by side", markup=False, highlight=False)
    return 0


def _measure(
    settings: Settings, bundle: Bundle, loaded: LoadedModel, pipe: Any, modes: Sequence[str], cases: Sequence[Case],
    device: torch.device, progress: Progress,
) -> Measured:  # fmt: skip
    plan = bundle.plan
    loaded.module.to(device)
    place(pipe, device)
    setting = Setting(settings.steps, settings.guidance, plan.options)
    reuse = reuse_text(plan.options.reuse, plan.options.reuse_level)
    name = f"bundle ({mode_text(plan.options.groupnorm, reuse, plan.options.transfer_bits)})"
    if settings.processes:
        ways = [Way(name, plan.ranks, pictures=_in_processes(settings, bundle))]
    else:
        shapes = list(bundle.plans)
        load_it = functools.partial(load, settings.bundle, lockstep=True, device=device, shapes=shapes)
        ways = [Way(name, plan.ranks, module=lambda: _Closing(load_it()))]
    example = loaded.example(plan.options.height, plan.options.width, setting.images, plan.options.guidance)
    options = conversion_options(plan)
    if any("+fp8" in m for m in modes):
        shape = Shape(plan.options.height, plan.options.width, setting.images)
        options["calibration"] = calibration_calls(loaded, shape, plan.options.guidance, progress)
    ways += [way_of(m, loaded.module, example, plan.ranks, device, options) for m in modes]
    return measure(pipe, loaded.module, ways, cases, setting, borders_of(plan), progress)


def reach_floor(
    settings: convert.Settings, progress: Progress,
    compile_model: Callable[[convert.Settings, Progress], tuple[Program, LoadedModel]],
) -> tuple[convert.Settings, tuple[QualityTrial, ...]]:  # fmt: skip
    """Return the settings with the cheapest options that reach ``--quality-floor``, and the trials.

    ``compile_model`` is that of ``convert``. All ranks run in this process.
    """
    wanted, seeds = parse_floor(settings.quality_floor or ""), parse_seeds(settings.quality_seeds)
    steps, prompts = settings.quality_steps, settings.quality_prompts
    if prompts is not None:
        read_prompts(prompts)  # a mistake is found before the work
    check_steps(settings.model, steps)
    dtype = None if settings.dtype is None else dtype_of(settings.dtype)
    with progress.task(f"loading {settings.model}"):
        loaded = load_source(settings.model, dtype)
        pipe = pipeline_of(loaded)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bits = settings.quantise == "auto"
    program, auto = _first_program(
        dataclasses.replace(settings, quantise="none") if bits else settings, progress, compile_model
    )
    plan = program.plan
    setting = Setting(steps, None, plan.options)
    cases = make_cases(prompts_of(loaded, plan, prompts, 4), seeds)
    loaded.module.to(device)
    place(pipe, device)
    example = shapes_of(settings)[0].example(loaded, plan.options.guidance)
    layers: dict[str, Any] = {"none": "none", plan.options.quantise: conversion_options(plan)["quantise"]}
    if bits:
        layers["fp8"] = compile_model(dataclasses.replace(settings, quantise="fp8"), progress)[0].plan.report.quantised
    with progress.task("one device", len(cases) * steps / setting.images) as task:
        expected = draw(pipe, loaded.module, cases, setting, task)

    def measured(candidate: Candidate) -> Result:
        options = {**conversion_options(plan), **candidate.options, "passes": settings.passes, "rules": settings.rules}
        options["quantise"] = layers[candidate.quantise]
        mode = mode_text(candidate.groupnorm, candidate.reuse, plan.options.transfer_bits)
        ways = [way_of(mode, loaded.module, example, settings.ranks, device, options)]
        return measure(pipe, expected, ways, cases, setting, borders_of(plan), progress).results[0]

    def report(trial: Trial) -> None:
        print(f"{trial.candidate}: worst {trial.worst_db:.1f} dB", file=sys.stderr)

    first = Candidate(
        plan.options.groupnorm, plan.options.warmup_steps, plan.options.drift_limit, plan.options.displace,
        reuse_text(plan.options.reuse, plan.options.reuse_level), plan.options.quantise,
    )  # fmt: skip
    choices = ("fp8", "none") if bits else ()
    trials = search(wanted, reusing(first, bits=choices) if auto else ladder(first, choices), measured, report)
    chosen = trials[-1].candidate
    reuse = None if chosen.reuse == "none" else chosen.reuse
    changed = dataclasses.replace(
        settings, groupnorm=cast(GroupNorm, chosen.groupnorm), warmup_steps=chosen.warmup_steps,
        drift_limit=chosen.drift_limit, displace=",".join(chosen.displace) or "none", reuse=reuse,
        quantise=chosen.quantise,
    )  # fmt: skip
    return changed, tuple(t.record() for t in trials)


def _first_program(
    settings: convert.Settings, progress: Progress,
    compile_model: Callable[[convert.Settings, Progress], tuple[Program, LoadedModel]],
) -> tuple[Program, bool]:  # fmt: skip
    """Return the model without reuse, and whether ``--reuse auto`` may try it: a network may have nothing to keep."""
    if settings.reuse != "auto":
        return compile_model(settings, progress)[0], False
    found = compile_model(dataclasses.replace(settings, reuse=None), progress)[0]
    try:
        compile_model(dataclasses.replace(settings, reuse=REUSE[0]), progress)
    except ConvertError as e:
        print(f"note: --reuse auto without reuse: {e}", file=sys.stderr)
        return found, False
    return found, True


class _Closing:
    """Context manager of a loaded bundle, which closes it."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __enter__(self) -> Any:
        return self._module

    def __exit__(self, *_: object) -> None:
        self._module.close()


def mode_text(groupnorm: str, reuse: str, bits: int | None) -> str:
    """Return options of a conversion as a mode, as ``--modes`` takes it."""
    return "+".join([groupnorm, *([] if reuse == "none" else [reuse]), *([BITS] if bits else [])])


def conversion_options(plan: ExecutionPlan) -> dict[str, Any]:
    """Return the options of :func:`districompile.convert` of a plan that influence images."""
    names = ("cfg", "displace", "warmup_steps", "drift_limit")
    bits = "none" if plan.options.quantise == "none" else plan.report.quantised
    return {**{name: getattr(plan.options, name) for name in names}, "quantise": bits}


def pipeline_of(loaded: LoadedModel) -> Any:
    """Return the pipeline around a model. Raise :class:`UsageError` where there is none."""
    if loaded.pipeline_loader is None:
        raise UsageError(
            f"{loaded.source} is not a whole pipeline, which --quality needs; verify without --quality compares calls"
        )
    return loaded.pipeline_loader()


def prompts_of(loaded: LoadedModel, plan: ExecutionPlan, path: Path | None, count: int) -> list[str | None]:
    """Return the prompts of a file, or ``count`` built-in ones; ``[None]`` for a model without text."""
    if all(i.path != "encoder_hidden_states" for i in plan.inputs):
        if path is not None:
            raise UsageError("--prompts: the model has no text input; --seeds gives the number of images")
        return [None]
    if path is not None:
        return list(read_prompts(path))
    return list(demo_prompts(count) if loaded.source == "demo" else GENERAL[:count])


def result_table(measured: Measured) -> Table:
    """Return a table with a row for each configuration."""
    table = Table(box=None, pad_edge=False)
    for i, name in enumerate(("way", "ranks", *COLUMNS, "worst picture")):
        table.add_column(name, justify="left" if i in (0, 8) else "right", overflow="fold")
    for r in measured.results:
        table.add_row(r.way, str(r.ranks), *figures(r), str(r.worst.case))
    return table


def _options_text(plan: ExecutionPlan) -> str:
    names = (
        "groupnorm",
        "warmup_steps",
        "drift_limit",
        "displace",
        "reuse",
        "transfer_bits",
        "quantise",
        "cfg",
        "dtype",
    )
    options = plan.options.to_dict()
    return "Converted with " + ", ".join(f"{n} {options[n]}" for n in names if n in options) + "."


@dataclasses.dataclass(frozen=True)
class Job:
    """The work of every rank."""

    bundle: Path
    model: str
    dtype: str
    cases: tuple[Case, ...]
    setting: Setting
    device: str | None
    out: Path
    timeout: float
    extensions: tuple[str, ...]
    shape: str


def _in_processes(settings: Settings, bundle: Bundle) -> Any:
    def pictures(cases: Sequence[Case], setting: Setting) -> Drawn:
        plan = bundle.plan
        with tempfile.TemporaryDirectory(prefix="districompile-quality-") as scratch:
            job = Job(
                settings.bundle.resolve(), source_of(bundle.manifest, settings.model),
                plan.options.dtype or "float32", tuple(cases),
                setting, settings.device, Path(scratch) / "drawn",
                settings.timeout, settings.extension, next(iter(bundle.plans)),
            )  # fmt: skip
            found = launch(worker, (job,), plan.world_size).get(0)
            if found is None:
                raise UsageError("--processes starts the ranks itself: call it without torchrun")
            tensors = load_file(job.out)
            return Drawn(tensors["pixels"], tensors.get("latents"), tuple(found["exact"]), tuple(found["rates"]))

    return pictures


def worker(job: Job) -> Mapping[str, Any]:
    """Generate all images on one rank. Rank 0 writes them to a file."""
    quiet_libraries()
    load_extensions(job.extensions)
    compiled = load(job.bundle, device=job.device, timeout=job.timeout, shapes=[job.shape])
    pipe = load_pipeline(job.model, dtype_of(job.dtype))
    place(pipe, compiled.device)
    with Silent().task("") as task:
        drawn = draw(pipe, compiled, job.cases, job.setting, task)
    if compiled.leads:
        tensors = {"pixels": drawn.pixels, **({} if drawn.latents is None else {"latents": drawn.latents})}
        save_file({k: v.contiguous() for k, v in tensors.items()}, job.out)
    compiled.close()
    return {"exact": list(drawn.exact or ()), "rates": list(drawn.rates or ())}
