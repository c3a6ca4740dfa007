"""``districompile verify --quality``: many pictures of a bundle, and of other group norm modes, against one device."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import load_file, save_file

from districompile.bundle import Bundle
from districompile.commands import convert as converting
from districompile.commands.checks import check_steps
from districompile.commands.common import UsageError, chosen_dtype, console, print_json, quiet_libraries, source_of
from districompile.commands.drawing import check_guidance, place
from districompile.ir.plan import Plan, dtype_of
from districompile.models.sources import LoadedModel, load_pipeline, load_source
from districompile.outputs import check_file
from districompile.progress import Progress, Silent, terminal_progress
from districompile.quality.cases import GENERAL, Case, demo_prompts, make_cases, read_prompts
from districompile.quality.draw import Drawn, Setting, draw
from districompile.quality.floor import Candidate, Trial, ladder, parse_floor, search
from districompile.quality.measure import Measured, Result, Way, borders_of, check_modes, measure, way_of
from districompile.quality.page import COLUMNS, figures, write_page
from districompile.runtime.launcher import launch
from districompile.runtime.liveness import TIMEOUT, check_timeout
from districompile.runtime.module import check_device, check_native_code, load
from districompile.runtime.runner import world_size

_MOST_SEEDS = 10_000


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of ``verify --quality``."""

    bundle: Path
    prompts: Path | None = None
    pictures: int = 8
    seeds: str = "0"
    modes: str | None = None
    steps: int = 50
    guidance: float | None = None
    report: Path | None = None
    processes: bool = False
    model: str | None = None
    device: str | None = None
    native_code: bool = True
    timeout: float = TIMEOUT


def main(settings: Settings, as_json: bool) -> int:
    """Measure, print, and write the page where one is asked for."""
    bundle = Bundle.open(settings.bundle)
    device = torch.device(check_device(bundle, settings.device))
    check_native_code(bundle, settings.native_code)
    modes = [m for m in (settings.modes or "").split(",") if m]
    check_modes(modes)
    seeds = parse_seeds(settings.seeds)
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
    if as_json:
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
    name = f"bundle ({plan.options.get('groupnorm', 'as built')})"
    if settings.processes:
        ways = [Way(name, plan.ranks, pictures=_in_processes(settings, bundle))]
    else:
        ways = [Way(name, plan.ranks, module=lambda: _Closing(load(settings.bundle, lockstep=True, device=device)))]
    example = loaded.example(
        plan.options.get("height"), plan.options.get("width"), setting.images, plan.options.get("guidance")
    )
    ways += [way_of(m, loaded.module, example, plan.ranks, device, conversion_options(plan)) for m in modes]
    return measure(pipe, loaded.module, ways, cases, setting, borders_of(plan), progress)


def reach_floor(
    settings: converting.Settings, floor: converting.Floor, progress: Progress
) -> tuple[converting.Settings, list[dict[str, Any]]]:
    """The settings with the cheapest options that reach ``floor``, and what was tried; ranks run in this process."""
    wanted, seeds = parse_floor(floor.floor), parse_seeds(floor.seeds)
    if floor.prompts is not None:
        read_prompts(floor.prompts)  # a mistake is found before the work
    check_steps(settings.model, floor.steps)
    dtype = None if settings.dtype is None else dtype_of(settings.dtype)
    with progress.task(f"loading {settings.model}"):
        loaded = load_source(settings.model, dtype)
        pipe = pipeline_of(loaded)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    program, _ = converting.compile_model(settings, progress)
    plan = program.plan
    setting = Setting(floor.steps, None, plan.options)
    cases = make_cases(prompts_of(loaded, plan, floor.prompts, 4), seeds)
    loaded.module.to(device)
    place(pipe, device)
    example = loaded.example(settings.height, settings.width, settings.batch, plan.options.get("guidance"))
    with progress.task("one device", len(cases) * floor.steps / setting.images) as task:
        expected = draw(pipe, loaded.module, cases, setting, task)

    def measured(candidate: Candidate) -> Result:
        options = {**conversion_options(plan), **candidate.options, "passes": settings.passes, "rules": settings.rules}
        ways = [way_of(str(options.pop("groupnorm")), loaded.module, example, settings.gpus, device, options)]
        return measure(pipe, expected, ways, cases, setting, borders_of(plan), progress).results[0]

    def report(trial: Trial) -> None:
        print(f"{trial.candidate}: worst {trial.worst_db:.1f} dB", file=sys.stderr)

    first = Candidate(
        str(plan.options["groupnorm"]), int(plan.options["warmup_steps"]), float(plan.options["drift_limit"]),
        tuple(plan.options["displace"]),
    )  # fmt: skip
    trials = search(wanted, ladder(first), measured, report)
    chosen = trials[-1].candidate
    changed = dataclasses.replace(
        settings, groupnorm=chosen.groupnorm, warmup_steps=chosen.warmup_steps, drift_limit=chosen.drift_limit,
        displace=",".join(chosen.displace) or "none",
    )  # fmt: skip
    return changed, [t.to_dict() for t in trials]


class _Closing:
    """A loaded bundle that is closed on leaving."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __enter__(self) -> Any:
        return self._module

    def __exit__(self, *_: object) -> None:
        self._module.close()


def conversion_options(plan: Plan) -> dict[str, Any]:
    """Options of :func:`districompile.convert` that a plan was made with, as far as they change pictures."""
    names = ("cfg", "displace", "warmup_steps", "drift_limit")
    options = {name: plan.options[name] for name in names if name in plan.options}
    return {**options, "cfg": "split" if options.get("cfg") == "split" else "none"}


def pipeline_of(loaded: LoadedModel) -> Any:
    """The pipeline around a model. Raises :class:`UsageError` where there is none."""
    if loaded.pipeline_loader is None:
        raise UsageError(
            f"{loaded.source} is no whole pipeline: pictures need one; verify without --quality compares calls"
        )
    return loaded.pipeline_loader()


def prompts_of(loaded: LoadedModel, plan: Plan, path: Path | None, count: int) -> list[str | None]:
    """The prompts of a file; without one the demo's own, a few general ones, or none for a model without text."""
    if all(i.path != "encoder_hidden_states" for i in plan.inputs):
        if path is not None:
            raise UsageError("--prompts: the model does not draw from text; --seeds says how many pictures")
        return [None]
    if path is not None:
        return list(read_prompts(path))
    return list(demo_prompts(count) if loaded.source == "demo" else GENERAL[:count])


def parse_seeds(text: str) -> list[int]:
    """``"0,1,7"`` or ``"0-3"`` as numbers."""
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, to, last = part.strip().partition("-")
            found = range(int(first), int(last if to else first) + 1)
            if len(found) + len(seeds) > _MOST_SEEDS:
                raise UsageError(f"--seeds {text}: give at most {_MOST_SEEDS} of them")
            seeds += found
    except (ValueError, OverflowError):
        raise UsageError(f"--seeds {text}: give numbers with commas, or a range as 0-3") from None
    if not seeds or max(seeds) >= 2**63 or min(seeds) < 0:
        raise UsageError(f"--seeds {text}: give at least one number, each below 2**63")
    return seeds


def result_table(measured: Measured) -> Table:
    """A row for each way of computing."""
    table = Table(box=None, pad_edge=False)
    for i, name in enumerate(("way", "ranks", *COLUMNS, "worst picture")):
        table.add_column(name, justify="left" if i in (0, 8) else "right", overflow="fold")
    for r in measured.results:
        table.add_row(r.way, str(r.ranks), *figures(r), str(r.worst.case))
    return table


def _options_text(plan: Plan) -> str:
    names = ("groupnorm", "warmup_steps", "drift_limit", "displace", "cfg", "dtype")
    return "Converted with " + ", ".join(f"{n} {plan.options[n]}" for n in names if n in plan.options) + "."


@dataclasses.dataclass(frozen=True)
class Job:
    """What every rank's process is given."""

    bundle: Path
    model: str
    dtype: str
    cases: tuple[Case, ...]
    setting: Setting
    device: str | None
    out: Path
    timeout: float


def _in_processes(settings: Settings, bundle: Bundle) -> Any:
    def pictures(cases: Sequence[Case], setting: Setting) -> Drawn:
        plan = bundle.plan
        with tempfile.TemporaryDirectory(prefix="districompile-quality-") as scratch:
            job = Job(
                settings.bundle.resolve(), source_of(bundle.manifest, settings.model),
                str(plan.options.get("dtype", "float32")), tuple(cases),
                dataclasses.replace(setting, options=dict(setting.options)), settings.device, Path(scratch) / "drawn",
                settings.timeout,
            )  # fmt: skip
            found = launch(worker, (job,), world_size(plan)).get(0)
            if found is None:
                raise UsageError("--processes starts the ranks itself: call it without torchrun")
            tensors = load_file(job.out)
            return Drawn(tensors["pixels"], tensors.get("latents"), tuple(found["exact"]), tuple(found["rates"]))

    return pictures


def worker(job: Job) -> Mapping[str, Any]:
    """One rank: draws all pictures; rank 0 leaves them in a file."""
    quiet_libraries()
    compiled = load(job.bundle, device=job.device, timeout=job.timeout)
    pipe = load_pipeline(job.model, dtype_of(job.dtype))
    place(pipe, compiled.device)
    with Silent().task("") as task:
        drawn = draw(pipe, compiled, job.cases, job.setting, task)
    if compiled.leads:
        tensors = {"pixels": drawn.pixels, **({} if drawn.latents is None else {"latents": drawn.latents})}
        save_file({k: v.contiguous() for k, v in tensors.items()}, job.out)
    compiled.close()
    return {"exact": list(drawn.exact or ()), "rates": list(drawn.rates or ())}
