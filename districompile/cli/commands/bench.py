# SPDX-License-Identifier: Apache-2.0
"""``districompile bench``: time the steps of a bundle on this machine."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from rich.table import Table

from districompile.bundle.bundle import Bundle
from districompile.cli.bench import Settings
from districompile.cli.calls import Calls, between, mark, synchronize
from districompile.cli.common import (
    UsageError,
    chosen_dtype,
    console,
    example_of,
    load_extensions,
    print_json,
    quiet_libraries,
    source_of,
    whole_path,
)
from districompile.cli.shapes import at_shape
from districompile.common.outputs import check_file, write_file
from districompile.errors import InputError
from districompile.ir.spec import PHASES, Phase
from districompile.models.sources import load_source
from districompile.plan.report import size
from districompile.progress import terminal_progress
from districompile.runtime.load import check_device, check_native_code, load
from districompile.runtime.module import DistributedModule
from districompile.runtime.processes.launcher import launch
from districompile.runtime.processes.liveness import check_timeout
from districompile.runtime.trace import Trace, senders_of, write_chrome_trace
from districompile.runtime.transports.select import check_transport

_WARM = 3  # calls of the original model before the clock runs
# The keys of the JSON output, and the words of the table.
WORDS = {
    "exact": "every exchange carries values of this step, so that the ranks compute what one device computes",
    "displaced": "exchanges carry values of the previous step, while the ranks compute",
    "reused": "a displaced step that keeps what deep levels gave in the last full step",
    "transfers": "time that transfers take, whether the rank computes meanwhile or not",
    "exposed": "time that the rank spends on transfers, or waits for them, instead of computing",
    "hidden": "time of transfers while the rank computes: transfers without exposed",
    "imbalance": "time that the fastest rank waits for the slowest, because it computes less",
    "without transfers": "the same step with no transfers, for comparison: its results are wrong",
}


def main(settings: Settings) -> int:
    """Start the processes, time the steps, and print the figures."""
    check_transport(settings.transport)
    load_extensions(settings.extension)
    quiet_libraries()
    bundle = at_shape(Bundle.open(settings.bundle), settings.shape)
    kind = check_device(bundle, settings.device)
    check_native_code(bundle, settings.native_code)
    if settings.kernels is not None and kind != "cuda":
        raise InputError("--kernels lists the kernels of a GPU, and this bundle runs on the CPU: leave it out")
    check_timeout(settings.timeout)
    for name, file in (("--trace", settings.trace), ("--kernels", settings.kernels)):
        if file is not None:
            check_file(file, name)
    if settings.model is not None and not (settings.original or settings.image):
        raise UsageError("--model: only with --original, which times the model on one device, and with --image")
    if settings.vae is not None and not settings.image:
        raise UsageError("--vae: only with --image")
    if settings.image and (settings.original or settings.kernels is not None):
        raise UsageError("--image times whole pictures: leave --original and --kernels out")
    if settings.original:
        source_of(bundle.manifest, settings.model)  # an error is found before the work
    (shape,) = bundle.plans
    job = dataclasses.replace(
        settings, bundle=settings.bundle.resolve(), shape=shape, vae=whole_path(settings.vae)
    )  # fmt: skip
    if settings.image:
        from districompile.cli.commands import bench_image

        return bench_image.main(job, bundle)
    results = launch(worker, (job,), bundle.plan.world_size)
    ranks = [results[r] for r in sorted(results) if results[r] is not None]
    if not ranks:  # another rank under an outer launcher
        return 0
    figures = list(_figures(ranks))
    if settings.original:
        figures.append(time_original(settings, bundle, torch.device(kind)))
    if settings.trace is not None and ranks[0]["traces"] is not None:
        # An executor knows its rank within a guidance half only
        traces = [dataclasses.replace(r["traces"], rank=r["rank"]) for r in ranks]
        write_chrome_trace(settings.trace, traces, senders_of(bundle.plan))
    if settings.kernels is not None and ranks[0]["kernels"] is not None:
        write_file(settings.kernels, ranks[0]["kernels"])
    if settings.as_json:
        print_json({"bundle": str(settings.bundle), "shape": shape, "figures": figures})
    else:
        _print_table(settings, figures)
    return 0


def time_original(settings: Settings, bundle: Bundle, device: torch.device) -> dict[str, Any]:
    """Time calls of the original model on one device, in eager PyTorch, with inputs as the bundle was made for."""
    source = source_of(bundle.manifest, settings.model)
    with terminal_progress().task(f"timing {source} on one device"), torch.inference_mode():
        loaded = load_source(source, chosen_dtype(bundle.plan))
        module = loaded.module.to(device)
        example = example_of(loaded, bundle.plan, 0, device)
        times = []
        for number in range(_WARM + settings.calls):
            begin = mark(device)
            module(*example.args, **example.kwargs)
            end = mark(device)
            synchronize(device)
            if number >= _WARM:
                times.append(between(begin, end))
    return {
        "figure": "original on one device", "ms": round(statistics.median(times), 4), "min_ms": round(min(times), 4),
        "calls": len(times), "processes": 1, "device": _device_name(device), "model": source,
    }  # fmt: skip


def _print_table(settings: Settings, figures: list[dict[str, Any]]) -> None:
    """Print the figures for people: a column a phase, and what the words mean."""
    found = {f["figure"]: f for f in figures}
    first = figures[0]
    terminal = console()

    def say(text: str = "") -> None:
        terminal.print(text, markup=False, highlight=False, soft_wrap=not terminal.is_terminal)

    say(
        f"{settings.bundle}: {first['processes']} processes, {first['device']}, transport {first['transport']}; "
        f"medians of {first['calls']} calls, of the slowest rank"
    )
    phases = [p for p in PHASES if f"{p} step" in found]
    table = Table("", *phases, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    rows = (
        ("step", "{} step", "ms"), ("fastest step", "{} step", "min_ms"),
        ("step without transfers", "{} step, transfers free", "ms"),
        ("  computing", "{} step, transfers", "run_ms"), ("  transfers", "{} step, transfers", "transfer_ms"),
        ("    exposed", "{} step, transfers", "exposed_ms"), ("    hidden", "{} step, transfers", "hidden_ms"),
        ("  imbalance", "{} step, transfers", "imbalance_ms"),
    )  # fmt: skip
    for title, name, key in rows:
        cells = [found.get(name.format(phase), {}).get(key) for phase in phases]
        if any(c is not None for c in cells):
            table.add_row(title, *("" if c is None else f"{c:.3f} ms" for c in cells))
    sent = [found.get(f"{phase} step, transfers", {}).get("sent_bytes") for phase in phases]
    if any(c is not None for c in sent):
        table.add_row("  sent by a rank", *("" if c is None else size(c) for c in sent))
    original = found.get("original on one device")
    if original is not None:
        steps = [found[f"{phase} step"]["ms"] for phase in phases]
        table.add_row("original on one device", *[f"{original['ms']:.3f} ms"] * len(phases))
        table.add_row("  times as fast", *(f"{original['ms'] / ms:.2f}" for ms in steps))
    terminal.print(table)
    if original is not None:
        say(
            f"original: {original['model']} in eager PyTorch, {original['device']}, median of {original['calls']} calls"
        )
    if "average step" in found:
        mean = found["average step"]
        say(f"average step behind the exact ones, 1 in {mean['reuse']} of them displaced: {mean['ms']:.3f} ms, "
            f"{mean['times_as_fast']:.2f} times as fast as without reuse")  # fmt: skip
    if "run" in found:
        run = found["run"]
        say(f"run of {run['steps']} steps, {min(run['steps'], run['warmup_steps'])} of them exact: {run['seconds']} s")
    if "peak memory of a GPU" in found:
        say(f"peak memory of a GPU: {found['peak memory of a GPU']['gib']} GiB")
    say(f"loading the bundle: {found['load']['seconds']} s")
    say()
    shown = [w for w in WORDS if w != "imbalance" or len(sent) > 1]
    shown = [w for w in shown if w not in PHASES or w in phases]
    for word in shown if any(c is not None for c in sent) else phases:
        say(f"{word}: {WORDS[word]}")


def worker(job: Settings) -> dict[str, Any]:
    """Measure on one rank; returns its figures."""
    quiet_libraries()
    load_extensions(job.extension)
    began = time.perf_counter()
    module = load(
        job.bundle, verify="quick", transport=job.transport, cuda_graph=job.cuda_graph, device=job.device,
        native_code=job.native_code, timeout=job.timeout, shapes=None if job.shape is None else [job.shape],
    )  # fmt: skip
    loaded = time.perf_counter()
    figures: dict[str, list[float]] = {}
    rank, world = int(os.environ.get("RANK", "0")), module.plan.world_size
    timer = Calls(module)
    phases = [p for p in PHASES if p in module.plan.phases]
    for phase in phases:
        module.phase = phase
        figures[phase] = timer.timed(job.calls)
    traces = _traced(module, timer) if world > 1 else None
    module.phase = [p for p in phases if p != "reused"][-1]
    kernels = _kernels(timer) if job.kernels is not None else None
    if world > 1:
        with module.transfers_free():
            for phase in phases:
                module.phase = phase
                figures[f"{phase} free"] = timer.timed(job.calls)
    warmup = module.plan.options.warmup_steps
    if job.steps is not None:
        for _ in range(2):  # all graphs of a whole run are captured in the first one
            timer.restart()
            synchronize(module.device)
            start = time.perf_counter()
            for number in range(job.steps):
                # Random inputs are no image that settles: --warmup-steps says how many steps are exact
                module.phase = _phase_of(number - warmup, phases, module.plan.options.reuse)
                timer.call()
            synchronize(module.device)
            run_s = time.perf_counter() - start
        figures["run"] = [run_s]
    result = {
        "rank": rank, "device": _device_name(module.device), "transport": module.transport, "load_s": loaded - began,
        "figures": figures, "peak": module.peak_bytes, "traces": traces, "kernels": kernels, "steps": job.steps,
        "warmup_steps": warmup, "reuse": module.plan.options.reuse,
    }  # fmt: skip
    module.close()
    return result


def _phase_of(number: int, phases: list[Phase], reuse: int | None) -> Phase:
    """The phase of a call of a run, counted from the first that is not exact."""
    if number < 0:
        return "exact"
    if reuse is not None and (number + 1) % reuse:
        return "reused"
    return [p for p in phases if p != "reused"][-1]


def _kernels(timer: Calls) -> str:
    """The kernels of one call of the module's phase, by time."""
    from torch.profiler import ProfilerActivity, profile

    timer.call()
    with profile(activities=[ProfilerActivity.CUDA]) as found:  # operators on the host: gloo's threads crash torch 2.13
        timer.call()
        torch.cuda.synchronize()
    averages = found.key_averages()
    return str(averages.table(sort_by="self_cuda_time_total", row_limit=100, max_name_column_width=120))


def _traced(module: DistributedModule, timer: Calls) -> Trace:
    """Some calls of each phase, each with what it waited for; those that are captured for it come first."""
    phases = [p for p in reversed(PHASES) if p in module.plan.phases]
    with module.trace() as trace:
        for phase in phases:
            module.phase = phase
            for _ in range(6):
                timer.call()
    return trace


def _figures(ranks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The slowest rank counts."""
    first = ranks[0]
    common = {"processes": len(ranks), "device": first["device"], "transport": first["transport"]}
    names = {phase: f"{phase} step" for phase in PHASES if phase in first["figures"]}
    for phase, name in names.items():
        medians = [statistics.median(r["figures"][phase]) for r in ranks]
        fastest = min(min(r["figures"][phase]) for r in ranks)
        calls = len(first["figures"][phase])
        yield {"figure": name, "ms": round(max(medians), 4), "min_ms": round(fastest, 4), "calls": calls, **common}
    if "reused" in names and first["reuse"] is not None:
        found = {p: max(statistics.median(r["figures"][p]) for r in ranks) for p in ("displaced", "reused")}
        average = (found["displaced"] + (first["reuse"] - 1) * found["reused"]) / first["reuse"]
        gain = round(found["displaced"] / average, 3)
        yield {"figure": "average step", "ms": round(average, 4), "times_as_fast": gain, "reuse": first["reuse"],
               **common}  # fmt: skip
    if first["traces"] is not None:
        for phase, name in names.items():
            rows = [[s for s in r["traces"].summary() if s["phase"] == phase][-1] for r in ranks]
            yield {"figure": f"{name}, transfers", **transfers_of(rows), **common}
    for phase, name in names.items():
        if f"{phase} free" in first["figures"]:
            medians = [statistics.median(r["figures"][f"{phase} free"]) for r in ranks]
            yield {"figure": f"{name}, transfers free", "ms": round(max(medians), 4), **common}
    if "run" in first["figures"]:
        seconds = max(r["figures"]["run"][0] for r in ranks)
        yield {"figure": "run", "seconds": round(seconds, 4), "steps": first["steps"],
               "warmup_steps": first["warmup_steps"], **common}  # fmt: skip
    if peak := max(r["peak"] for r in ranks):
        yield {"figure": "peak memory of a GPU", "gib": round(peak / 2**30, 3), **common}
    yield {"figure": "load", "seconds": round(max(r["load_s"] for r in ranks), 2), **common}


def transfers_of(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarise one traced call: the row of the rank that computes longest, and ``imbalance_ms``.

    The other ranks wait for that rank as long as it computes more than they do. ``imbalance_ms`` is the difference
    between the slowest and the fastest rank. ``sent_bytes`` is the largest of all ranks.
    """
    slowest = max(ranks, key=lambda s: s["run_ms"])
    imbalance = slowest["run_ms"] - min(s["run_ms"] for s in ranks)
    return {**slowest, "sent_bytes": max(s["sent_bytes"] for s in ranks), "imbalance_ms": round(imbalance, 4)}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
