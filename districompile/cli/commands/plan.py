# SPDX-License-Identifier: Apache-2.0
"""``districompile plan``: predict what several numbers of GPUs would take for an image, and say which are worth it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Group
from rich.table import Table

from districompile.cli import checks
from districompile.cli.common import UsageError, console, load_extensions, print_json, quiet_libraries
from districompile.cli.divisions import Divisions
from districompile.cli.plan import Settings
from districompile.common.outputs import check_file
from districompile.cost.gpus import Gpu, Network, find_gpu, gpu_of_device
from districompile.cost.measure import measure_rank
from districompile.cost.planner import Division, best
from districompile.cost.plot import check_plot, draw_plot
from districompile.ir.spec import Phase, dtype_of
from districompile.models.inputs import Example, parameter_bytes
from districompile.models.sources import LoadedModel, load_source
from districompile.plan.report import size
from districompile.program import Program
from districompile.progress import Progress, terminal_progress

_DEFAULT_GPU = "h100"
_SEGMENTS = 8  # engines of a displaced step, as on the GPUs that the prediction was fitted to


def main(settings: Settings) -> int:
    """Load and capture the model, partition it for every number of GPUs, and print what is predicted."""
    load_extensions(settings.extension)
    gpu, why = _gpu(settings)
    network = _network(settings)
    if settings.plot is not None:
        check_file(settings.plot, "--plot")
        check_plot(settings.plot)
    if settings.size is not None:
        checks.parse_size(settings.size)
    if settings.measure and not torch.cuda.is_available():
        raise UsageError("--measure compiles for the GPU of this machine, and there is none: leave it out")
    quiet_libraries()
    progress = terminal_progress()
    with progress.task(f"loading {settings.model}") as task:
        loaded = load_source(settings.model, dtype_of(settings.dtype))
        task.describe(f"loaded {size(parameter_bytes(loaded.module))} of weights")
    kinds = _guidance(settings, loaded)
    found = list(_divisions(settings, loaded, kinds, gpu, network, progress))
    chosen = best(found)
    facts: dict[str, Any] = {
        **{name: getattr(settings, name) for name in ("model", "size", "dtype", "batch", "steps")},
        "gpu": dataclasses.asdict(gpu), "gpu_chosen": why, "measured": settings.measure,
        "network": network and dataclasses.asdict(network),
    }  # fmt: skip
    if settings.plot is not None:
        draw_plot(found, settings.plot, f"{settings.model}, {settings.steps} steps on {gpu.name}")
    if settings.as_json:
        print_json({**facts, "divisions": [d.to_dict() for d in found], "best": chosen and chosen.to_dict()})
        return 0
    console().print(Group(_table(found, chosen, gpu, network), *_notes(settings, found, chosen, gpu, network, why)))
    return 0


def _gpu(settings: Settings) -> tuple[Gpu, str]:
    """Return the GPU to predict for, and where that comes from."""
    if settings.gpu is not None:
        gpu, why = find_gpu(settings.gpu), "--gpu"
    elif torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        here = gpu_of_device(properties.name, properties.total_memory)
        if here is None:
            raise UsageError(f"the GPU of this machine, {properties.name}, is not in the table: name one by --gpu")
        gpu, why = here, "of this machine"
    else:
        gpu, why = find_gpu(_DEFAULT_GPU), "no GPU here: --gpu names another"
    return (gpu if settings.link is None else dataclasses.replace(gpu, link=settings.link)), why


def _network(settings: Settings) -> Network | None:
    """Return what connects the machines; None for one. Raises :class:`UsageError` for GPUs that they cannot have."""
    if settings.machines == 1:
        if settings.network is not None:
            raise UsageError("--network connects machines: give their number by --machines")
        return None
    if settings.network is None:
        raise UsageError(f"--machines {settings.machines}: give the rate between them by --network GB/s")
    if settings.gpus % settings.machines:
        raise UsageError(f"--gpus {settings.gpus} are no equal shares of {settings.machines} machines")
    return Network(settings.gpus // settings.machines, settings.network)


def _guidance(settings: Settings, loaded: LoadedModel) -> tuple[str, ...]:
    """The kinds of guidance to compare: those of the option that the model has."""
    if settings.guidance != "both":
        return (settings.guidance,)
    if loaded.cfg == "none":
        return ("none",)
    return ("batch", "split") if loaded.parts == 2 else ("batch",)


def _divisions(
    settings: Settings,
    loaded: LoadedModel,
    kinds: Sequence[str],
    gpu: Gpu,
    network: Network | None,
    progress: Progress,
) -> Iterator[Division]:
    """Predict one GPU, then every number of GPUs for every kind of guidance."""
    width, height = checks.parse_size(settings.size) if settings.size else (None, None)

    def example(kind: str) -> Example:
        return loaded.example(height, width, settings.batch, kind)

    def measured(program: Program, ranks: int) -> dict[Phase, float]:
        return {phase: measure_rank(program, phase, ranks // 2) for phase in program.phases}

    options = {"segments": _SEGMENTS, "optimise": "all"}
    divisions = Divisions(loaded, example, gpu, settings.steps, progress, options, network)
    yield divisions.one_gpu("none" if kinds == ("none",) else "batch")
    for count in _counts(settings.gpus):
        for kind in kinds:
            if count > 1 and not (kind == "split" and count % 2):
                yield divisions.of(count, kind, measured if settings.measure else None)


def _counts(most: int) -> list[int]:
    """1, 2, 4, ... and ``most`` itself."""
    found = [1]
    while found[-1] * 2 <= most:
        found.append(found[-1] * 2)
    return found if found[-1] == most else [*found, most]


def _table(found: Sequence[Division], chosen: Division | None, gpu: Gpu, network: Network | None) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("GPUs", "guidance", "rows a GPU", "exact step, ms", "displaced, ms", "image, s", "if all exact, s",
                 "times one GPU", "memory, GiB", "sent a step, MB", *(["between machines, MB"] if network else []),
                 ""):  # fmt: skip
        table.add_column(name, justify="left" if name in ("guidance", "") else "right")
    alone = found[0].seconds
    for d in found:
        rows = str(d.rows[0]) if d.rows[0] == d.rows[1] else f"{d.rows[0]} to {d.rows[1]}"
        note = "best" if d is chosen else "" if d.fits else f"more than the {gpu.memory_gib:.0f} GiB of {gpu.name}"
        table.add_row(
            str(d.gpus), d.guidance, rows, f"{d.exact.ms:.2f}", "-" if d.gpus == 1 else f"{d.displaced.ms:.2f}",
            f"{d.seconds:.2f}", f"{d.exact_seconds:.2f}", f"{alone / d.seconds:.2f}", f"{d.memory_gib:.1f}",
            f"{d.sent_mb:.0f}", *([f"{d.crossing_mb:.0f}"] if network else []), note,
        )  # fmt: skip
    return table


def _notes(
    settings: Settings, found: Sequence[Division], chosen: Division | None, gpu: Gpu, network: Network | None,
    why: str,
) -> Iterator[str]:  # fmt: skip
    """What the table rests on, and the command that makes the best of it."""
    yield ""
    yield (
        f"GPU: {gpu.name} ({why}); {gpu.link:.0f} GB/s to the others. An image is {settings.steps} calls, without text "
        "encoder and VAE."
    )
    yield "An image takes between the two times: steps stay exact until its content has settled."
    if settings.measure:
        yield "Measured: the engines of one rank, without transfers. Predicted: transfers and one GPU."
    else:
        yield "Predicted from the graph. The prediction was compared with measurements on H100s alone."
    if network is not None:
        yield (
            f"{settings.machines} machines of {network.gpus} GPUs, {network.rate:g} GB/s between them. What NCCL "
            "reaches of that is assumed, and was not measured."
        )
    if chosen is None:
        yield f"Nothing fits into the memory of {gpu.name}."
    elif chosen.gpus == 1:
        yield "More GPUs are not worth it for this image: none is 1.1 times as fast."
    else:
        place = f" --size {settings.size}" if settings.size else ""
        cfg = "" if chosen.guidance == "none" else f" --cfg {chosen.guidance}"
        yield (
            f"districompile convert {settings.model} --gpus {chosen.gpus}{cfg}{place} --dtype {settings.dtype} "
            "--backend inductor"
        )
