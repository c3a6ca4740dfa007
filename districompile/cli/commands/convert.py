# SPDX-License-Identifier: Apache-2.0
"""``districompile convert``: load a model, compile it, save the bundle, and print its report."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from districompile import api
from districompile.backends.base import Backend
from districompile.backends.registry import get_backend
from districompile.bundle.bundle import Bundle, check_replaceable
from districompile.cli import defaults
from districompile.cli.backend_options import parse_options
from districompile.cli.calibration import calibration_calls, example_on, measured_on
from districompile.cli.common import (
    UsageError,
    console,
    folder_bytes,
    is_bundle,
    load_extensions,
    print_json,
    quiet_libraries,
)
from districompile.cli.convert import Settings, default_out
from districompile.cli.options import DEFAULT_DTYPE, Conversion
from districompile.cli.shapes import Shape, shapes_of
from districompile.common.outputs import check_folder
from districompile.errors import BackendError
from districompile.ir.printer import fit_lines
from districompile.ir.report_builder import QuantisedLayer
from districompile.ir.spec import dtype_of
from districompile.models.autoencoder import DECODER, wanted_parts
from districompile.models.controlled import MARK
from districompile.models.imports import add_current_folder
from districompile.models.inputs import parameter_bytes
from districompile.models.origin import Origin
from districompile.models.sources import LoadedModel, load_source
from districompile.plan.plan_report import QualitySearch, QualityTrial
from districompile.plan.report import Report, size
from districompile.progress import Progress, terminal_progress


def make_backend(settings: Conversion) -> Backend:
    """Return the backend with its options.

    Raises :class:`BackendError` where it cannot be used here, :class:`UsageError` for an unknown option or a bad value.
    """
    name = settings.backend_name
    if not settings.backend_option:
        return get_backend(name)
    return get_backend(name, **parse_options(name, settings.backend_option))


def main(settings: Settings) -> int:
    """Convert the model, save the bundle and print its report."""
    load_extensions(settings.extension)
    settings = with_origin(settings)
    shapes_of(settings)  # a mistake is found before the work
    if settings.add:
        from districompile.cli import add

        return add.main(settings)
    if settings.reuse == "auto" and settings.quality_floor is None:
        raise UsageError("--reuse auto: only with --quality-floor, which measures what it chooses")
    if settings.original is not None:
        raise UsageError("--model: only with --add, for a bundle whose model has moved or is a function")
    made = convert_parts(settings)
    if settings.as_json and settings.stop_after is None:
        print_json(made[0] if len(made) == 1 else {"bundles": made})
    return 0


def convert_parts(settings: Settings, backend: Backend | None = None) -> list[dict[str, Any]]:
    """Convert what the model has to be converted as: the parts of a VAE, or one module. Return the facts of each.

    ``backend`` is that of an earlier conversion with the same options. Its workers are at work already.
    """
    made = []
    for each in parts_of(settings):
        facts, backend = convert_one(each, backend)
        made.append(facts)
    return made


def parts_of(settings: Settings) -> list[Settings]:
    """Return the settings of each bundle to make: one, or one for each part of an autoencoder.

    Raises :class:`UsageError` where the folder for several is a bundle.
    """
    given = Origin.of(settings.model)
    parts = () if given.part is not None else wanted_parts(settings.model, settings.part)
    if parts in ((), (DECODER,)):
        return [settings]
    models = [str(dataclasses.replace(given, part=None if part == DECODER else part)) for part in parts]
    if len(parts) == 1:
        return [dataclasses.replace(settings, model=models[0])]
    target = settings.out or default_out(settings)
    if is_bundle(target):
        raise UsageError(f"{target} is a bundle, and both parts need a folder of their own: give another --out")
    return [
        dataclasses.replace(settings, model=model, out=target / part, dump=settings.dump and settings.dump / part)
        for model, part in zip(models, parts, strict=True)
    ]


def convert_one(settings: Settings, backend: Backend | None = None) -> tuple[dict[str, Any], Backend]:
    """Convert one module, save its bundle, and print its report unless JSON is asked for. Return the facts, and the
    backend.

    ``backend`` is used if it is the one of the settings. A VAE that belongs into the bundle is converted behind it
    (:mod:`.convert_vae`), by the same backend.
    """
    from districompile.cli.commands import convert_vae

    settings, choice = defaults.resolve(settings, defaults.this_machine())
    if settings.dump is not None:
        check_folder(settings.dump, "--dump")
    if backend is None or backend.name != settings.backend_name:
        backend = make_backend(settings)
    vae = convert_vae.wanted_vae(settings, backend)
    if choice.line is not None:
        print(choice.line, file=sys.stderr)
    facts = _convert_network(settings, choice, backend)
    if vae is not None:
        again = functools.partial(convert_parts, backend=backend)
        folder = convert_vae.convert_into(settings.out or default_out(settings), vae, settings, again)
        facts = facts and {**facts, "vae": None if folder is None else str(folder)}
    return facts, backend


def _convert_network(settings: Settings, choice: defaults.Choice, backend: Backend) -> dict[str, Any]:
    """Convert one module, with the choices made. The model is no longer in memory when this returns."""
    target = settings.out or default_out(settings)
    quiet_libraries()
    progress = terminal_progress()
    started = time.perf_counter()
    settings, known = with_guidance(settings, choice, progress)
    if settings.stop_after is None:
        check_replaceable(target, origin(settings), settings.force)
        backend.begin()
    trials: tuple[QualityTrial, ...] = ()
    if settings.quality_floor is not None:
        from districompile.cli.quality import reach_floor

        settings, trials = reach_floor(settings, progress, compile_model)
    programs, loaded = compile_shapes(settings, progress, known)
    program, *others = programs
    if settings.quality_floor is not None:
        quality = QualitySearch(settings.quality_floor, settings.quality_steps, trials)
        report = dataclasses.replace(program.plan.report, quality=quality)
        program.plan = dataclasses.replace(program.plan, report=report)
    compiled = time.perf_counter()
    if settings.stop_after is not None:
        print(fit_lines(program.graph_text("exact"), console().width if sys.stdout.isatty() else None))
        return {}
    save(program, target, backend, settings, loaded, progress, others, choice.others)
    plans = Bundle.open(target, verify=False).plans
    plan = next(iter(plans.values()))  # with the engines that were built
    seconds = {"convert": round(compiled - started, 2), "save": round(time.perf_counter() - compiled, 2)}
    if settings.as_json:
        return {"bundle": str(target), "seconds": seconds, "shapes": list(plans), "vae": None,
                "report": Report(plan).to_dict()}  # fmt: skip
    terminal = console()
    terminal.print(Report(plan, explain=False))
    if others:
        terminal.print(f"shapes: {', '.join(plans)}; the report is that of the first", markup=False, highlight=False)
    terminal.print(
        f"{target}: {size(folder_bytes(target))}, converted in {seconds['convert']} s, built and saved in "
        f"{seconds['save']} s",
        markup=False,
        highlight=False,
    )
    return {}


def with_guidance(
    settings: Settings, choice: defaults.Choice, progress: Progress
) -> tuple[Settings, LoadedModel | None]:
    """Choose guidance by a prediction, if that is to be done, and say so. Return the settings, and the loaded model."""
    if choice.gpu is None:
        return settings, None
    loaded = load(settings, progress)
    add_current_folder()
    settings, line = defaults.with_guidance(settings, loaded, choice.gpu, progress)
    if line is not None:
        print(line, file=sys.stderr)
    return settings, loaded


def compile_model(settings: Settings, progress: Progress, loaded: LoadedModel | None = None) -> tuple[Any, LoadedModel]:
    """Load the model and compile it for the first of its shapes. Return the program and the loaded model."""
    loaded = loaded or load(settings, progress)
    return compile_shape(settings, loaded, shapes_of(settings)[0], progress), loaded


def compile_shapes(
    settings: Settings, progress: Progress, loaded: LoadedModel | None = None
) -> tuple[list[Any], LoadedModel]:
    """Load the model and compile it for all shapes that the options ask for. Return the programs and the model."""
    loaded, shapes = loaded or load(settings, progress), shapes_of(settings)
    if settings.stop_after is not None and len(shapes) > 1:
        raise UsageError("--stop-after prints one graph: ask for one shape")
    for shape in shapes:
        shape.example(loaded, settings.cfg or loaded.cfg)  # a size that does not work is found before the work
    programs = []
    with progress.task("converting shapes", len(shapes)) as task:
        layers = None  # in 8 bits: all shapes read the same weights
        for number, shape in enumerate(shapes):
            # Each shape has its own graphs
            dump = settings.dump if settings.dump is None or not number else settings.dump / f"shape-{number + 1}"
            own = dataclasses.replace(settings, dump=dump)
            programs.append(compile_shape(own, loaded, shape, progress, layers))
            layers = programs[0].plan.report.quantised or None
            task.advance()
    return programs, loaded


def load(settings: Settings, progress: Progress) -> LoadedModel:
    """Load the model."""
    with progress.task(f"loading {settings.model}") as task:
        model = settings.model + "".join(f"{MARK}{folder}" for folder in settings.controlnet)
        loaded = load_source(model, None if settings.dtype is None else dtype_of(settings.dtype))
        task.describe(f"loaded {size(parameter_bytes(loaded.module))} of weights")
    return loaded


def compile_shape(
    settings: Settings, loaded: LoadedModel, shape: Shape, progress: Progress,
    layers: Sequence[QuantisedLayer] | None = None,
) -> Any:  # fmt: skip
    """Compile a loaded model for one shape, with ``layers`` in 8 bits if they are known. Return the program."""
    cfg = settings.cfg or loaded.cfg
    example = shape.example(loaded, cfg)
    if cfg == "split" and settings.ranks % 2:
        raise UsageError(
            f"--cfg split gives each guidance half its own GPUs: --gpus must be even, not {settings.ranks}"
        )
    add_current_folder()
    options: dict[str, Any] = {
        "groupnorm": settings.groupnorm,
        "displace": settings.displace,
        "warmup_steps": settings.warmup_steps,
        "drift_limit": settings.drift_limit,
        "reuse": settings.reuse,
        "transfer_bits": settings.transfer_bits,
        "segments": settings.segments,
        "timestep": settings.timestep,
        "phases": settings.phases,
        "optimise": settings.optimise,
        "dump": settings.dump,
        "stop_after": settings.stop_after,
    }
    if settings.quantise == "auto":
        raise UsageError("--quantise auto chooses by images: give --quality-floor as well, or --quantise fp8")
    options = {name: value for name, value in options.items() if value is not None}
    options |= {
        "ranks": settings.ranks, "rows": example.rows, "cfg": "split" if cfg == "split" else "none",
        "passes": settings.passes, "rules": settings.rules, "extensions": settings.extension,
        "strict": settings.strict, "skip": settings.skip, "progress": progress,
    }  # fmt: skip
    call = tuple(example.args), dict(example.kwargs)
    if settings.quantise in (None, "none") or layers:
        options |= {"quantise": layers} if layers else {}
        program = api.convert(loaded.module, *call, **options)
    else:
        program = _measured(settings, loaded, shape, call, {**options, "quantise": settings.quantise})
    # Facts that the pipeline around the module needs
    default = loaded.default_size or (None, None)
    described = dataclasses.replace(
        program.plan.options, guidance=cfg, images=shape.batch,
        height=default[0] if shape.height is None else shape.height,
        width=default[1] if shape.width is None else shape.width, quantise=settings.quantise or "none",
    )  # fmt: skip
    if settings.dtype is not None or loaded.kind != "factory":  # else the factory's own types
        described = dataclasses.replace(described, dtype=settings.dtype or DEFAULT_DTYPE)
    program.plan = dataclasses.replace(program.plan, options=described)
    return program


def _measured(
    settings: Settings, loaded: LoadedModel, shape: Shape, call: tuple[Any, Any], options: dict[str, Any]
) -> Any:
    """Convert a model whose layers are measured first: on a GPU, unless engines are for a CPU or it is too small."""
    backend = make_backend(settings)
    on_gpu = torch.cuda.is_available() and backend.device.startswith("cuda")
    for device in [torch.device("cuda")] * on_gpu + [torch.device("cpu")]:
        try:
            with measured_on(loaded, device):
                calls = calibration_calls(
                    loaded, shape, settings.cfg or loaded.cfg, options["progress"], settings.timestep
                )
                args, kwargs = example_on(call, device)
                options |= {"calibration": calls, "faster": backend.faster_in_8_bits}
                return api.convert(loaded.module, args, kwargs, **options)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            print("note: the GPU has too little memory to measure layers: the CPU does it", file=sys.stderr)
    raise AssertionError("a CPU has no such error")


def save(
    program: Any, target: Path, backend: Backend, settings: Settings, loaded: LoadedModel, progress: Progress,
    shapes: Sequence[Any] = (), others: Sequence[str] = (),
) -> None:  # fmt: skip
    """Build the engines and write the bundle of all shapes. A failure leaves nothing at ``target``.

    If ``backend`` cannot build the model, each of ``others`` is tried.
    """
    try:
        program.save(
            target, backend, source=loaded.source, collectives=settings.collectives or "between", progress=progress,
            made_with=origin(settings), force=settings.force, shapes=shapes,
        )  # fmt: skip
    except BackendError as e:
        if not others:
            raise
        print(f"note: --backend {others[0]} instead of {backend.name}, which cannot build this: {e}", file=sys.stderr)
        other = dataclasses.replace(settings, backend=others[0])
        save(program, target, make_backend(other), other, loaded, progress, shapes, others[1:])


_NOT_RECORDED = (
    "add",
    "original",
    "part",
    "vae",
    "config",
    "variant",
    "dump",
    "stop_after",
    "out",
    "force",
    "as_json",
    "help_backend",
)


def origin(settings: Settings) -> dict[str, Any]:
    """Return what a bundle is made from, and the options: a conversion with the same replaces the bundle."""
    given = {k: v for k, v in dataclasses.asdict(settings).items() if k not in _NOT_RECORDED}
    given = {k: v for k, v in given.items() if v or k not in ("size", "tokens", "input", "reuse", "transfer_bits")}
    resolved = {"gpus": settings.ranks, "backend": settings.backend_name, "dtype": settings.dtype or DEFAULT_DTYPE}
    if settings.quality_floor is None:
        given = {k: v for k, v in given.items() if not k.startswith("quality_")}
    elif settings.quality_prompts is not None:
        resolved["quality_prompts"] = str(settings.quality_prompts)
    return {"command": "convert", **given, **resolved}


def with_origin(settings: Settings) -> Settings:
    """Return the settings with ``--config`` and ``--variant`` as part of the model, as a bundle keeps them."""
    if settings.config is None and settings.variant is None:
        return settings
    given = Origin.of(settings.model)
    model = Origin(given.path, settings.config or given.config, settings.variant or given.variant, given.part)
    return dataclasses.replace(settings, model=str(model), config=None, variant=None)
