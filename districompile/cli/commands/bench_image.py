# SPDX-License-Identifier: Apache-2.0
"""``districompile bench --image``: time whole pictures of a bundle, from the prompt to the file."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from districompile.bundle.bundle import Bundle
from districompile.cli.bench import Settings
from districompile.cli.common import console, load_extensions, print_json, quiet_libraries, source_of
from districompile.cli.generate import Request, as_bytes, as_pictures, draw
from districompile.cli.options import NO_VAE
from districompile.cli.picture_clock import DECODE, HOST, SAMPLER, STEP, PictureClock, chrome_events, totals
from districompile.cli.pictures import PNG_LEVEL
from districompile.cli.pipeline import MEETING, attach, chosen_vae, open_pipeline
from districompile.common.outputs import write_file
from districompile.models.sources import pipeline_location
from districompile.runtime.opening import upload_ahead
from districompile.runtime.processes.launcher import launch

PROMPT = "a red circle above a blue square"
_STEPS = 20
_FILE = "file"
_WORDS = {
    STEP: "steps", SAMPLER: "sampler", DECODE: "VAE, decoding", HOST: "host, all else", _FILE: "PNG file",
}  # fmt: skip


def main(settings: Settings, bundle: Bundle) -> int:
    """Draw pictures on all ranks of ``bundle``, and print where the time goes. The settings are checked."""
    pipeline_location(source_of(bundle.manifest, settings.model))
    vae, note = chosen_vae(
        settings.vae, bundle, bundle.plans.values(), device=settings.device, native_code=settings.native_code
    )
    if note is not None:
        print(f"note: {note}", file=sys.stderr)
    job = dataclasses.replace(settings, vae=NO_VAE if vae is None else str(vae))
    results = launch(worker, (job,), bundle.plan.world_size)
    ranks = [results[r] for r in sorted(results) if results[r] is not None]
    if not ranks or ranks[0]["rank"] != 0:  # another rank under an outer launcher
        return 0
    if settings.trace is not None:
        events = [event for found in ranks for event in found.pop("events")]
        write_file(settings.trace, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    figures = figures_of(ranks)
    if settings.as_json:
        print_json({"bundle": str(settings.bundle), "shape": settings.shape, "image": figures})
    else:
        _print(settings, figures)
    return 0


def figures_of(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of whole pictures, from those of all ranks.

    ``first_s`` and ``seconds`` (the median of the others) are of rank 0, ``load_s`` is of the slowest rank.
    ``parts_ms`` are of a picture that waits for the device at each part. ``exposed_ms``: what steps spend on transfers.
    ``step_host_ms``: on neither engines nor transfers.
    """
    first, *later = ranks[0]["seconds"]
    seconds = statistics.median(later or [first])
    parts = ranks[0]["parts"]
    slowest = max(ranks, key=lambda r: float(r["load_s"]))
    inside = {name: ranks[0][name] for name in ("run_ms", "exposed_ms") if ranks[0][name] is not None}
    if inside:
        inside["step_host_ms"] = round(max(0.0, parts.get(STEP, 0.0) - sum(inside.values())), 3)
    return {
        "processes": len(ranks), "steps": ranks[0]["steps"], "calls": ranks[0]["calls"], "first_s": round(first, 4),
        "seconds": round(seconds, 4), "first_over_others": round(first / seconds, 3),
        "load_s": round(slowest["load_s"], 3),
        "load_parts_s": {k: round(v, 3) for k, v in slowest["load_parts_s"].items()},
        "parts_ms": {k: round(v, 3) for k, v in parts.items()},
        **inside, "ranks": [{"rank": r["rank"], "parts_ms": r["parts"]} for r in ranks],
    }  # fmt: skip


def worker(job: Settings) -> dict[str, Any]:
    """Draw on one rank as ``run`` does, and return its times."""
    quiet_libraries()
    load_extensions(job.extension)
    began = time.perf_counter()
    bundle = Bundle.open(job.bundle, verify=False)
    plan = bundle.plan if job.shape is None else bundle.plans[job.shape]
    upload_ahead(bundle, job.device)  # as `serve` does
    pipe = open_pipeline(source_of(bundle.manifest, job.model), plan.options)
    opened = time.perf_counter()
    vae = None if job.vae in (None, NO_VAE) else Path(job.vae)
    compiled = attach(
        pipe, job.bundle, vae, verify="quick", transport=job.transport, cuda_graph=job.cuda_graph,
        device=job.device, native_code=job.native_code, timeout=job.timeout,
        start_timeout=max(60.0, MEETING * job.timeout),
        shapes=None if job.shape is None else [job.shape], warm_up=job.warm_up,
    )  # fmt: skip
    attached = time.perf_counter()
    first = int(os.environ.get("RANK", "0")) == 0
    decode = first or vae is not None
    steps = job.steps or _STEPS
    if job.warm_up:  # as `serve` does, for text encoders, sampler and decoder
        draw(pipe, Request(PROMPT, None, min(2, steps), None, 0, plan.options), decode=decode)
        compiled.reset()
    loaded = time.perf_counter()

    def picture(seed: int) -> float:
        request = Request(PROMPT, None, steps, None, seed, plan.options)
        start = time.perf_counter()
        pixels = draw(pipe, request, decode=decode).pixels
        if first and pixels is not None:
            for made in as_pictures(as_bytes(pixels)):
                made.save(io.BytesIO(), format="PNG", compress_level=PNG_LEVEL)
        return time.perf_counter() - start

    seconds = [picture(seed) for seed in range(job.pictures)]
    clock = PictureClock(pipe, compiled.device)
    alone = plan.world_size == 1
    with contextlib.nullcontext() if alone else compiled.trace() as trace, clock.record() as parts:
        request = Request(PROMPT, None, steps, None, job.pictures, plan.options)
        pixels = draw(pipe, request, decode=decode).pixels
        if first and pixels is not None:
            with clock.part(_FILE):
                for made in as_pictures(as_bytes(pixels)):
                    made.save(io.BytesIO(), format="PNG", compress_level=PNG_LEVEL)
    calls = [] if trace is None else trace.calls
    rows = [] if trace is None else trace.summary()
    rank = int(os.environ.get("RANK", "0"))
    found = {
        "rank": rank, "seconds": seconds, "load_s": loaded - began, "steps": steps, "calls": dict(compiled.image_calls),
        "load_parts_s": {"pipeline": opened - began, "bundle": attached - opened, "warm-up": loaded - attached},
        "parts": totals(parts), "events": chrome_events(rank, parts, calls),
        "run_ms": round(sum(r["run_ms"] for r in rows), 3) if rows else None,
        "exposed_ms": round(sum(r["exposed_ms"] for r in rows), 3) if rows else None,
    }  # fmt: skip
    compiled.close()
    return found


def _print(settings: Settings, figures: dict[str, Any]) -> None:
    terminal = console()

    def say(text: str) -> None:
        terminal.print(text, markup=False, highlight=False, soft_wrap=not terminal.is_terminal)

    exact = figures["calls"]["exact"]
    say(
        f"{settings.bundle}: {figures['processes']} processes, pictures of {figures['steps']} steps ({exact} exact), "
        "from prompt to file, of rank 0"
    )
    total = sum(figures["parts_ms"].values())
    table = Table("part", "ms", "share", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, ms in figures["parts_ms"].items():
        table.add_row(_WORDS.get(name, name), f"{ms:.1f}", f"{ms / total:.1%}")
        if name == STEP and "run_ms" in figures:
            for title, key in (("engines", "run_ms"), ("exposed transfers", "exposed_ms"), ("host", "step_host_ms")):
                table.add_row(f"  {title}", f"{figures[key]:.1f}", f"{figures[key] / total:.1%}")
    terminal.print(table)
    say(
        f"a picture: {figures['seconds']:.3f} s; the first: {figures['first_s']:.3f} s "
        f"({figures['first_over_others']:.2f} times); loading: {figures['load_s']:.1f} s ("
        + ", ".join(f"{name} {seconds:.1f}" for name, seconds in figures["load_parts_s"].items() if seconds >= 0.05)
        + ")"
    )
