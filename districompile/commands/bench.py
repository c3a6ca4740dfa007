"""``districompile bench``: time the steps of a bundle on this machine, one JSON line a figure."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from districompile.bundle import Bundle
from districompile.commands.common import quiet_libraries
from districompile.commands.timesteps import falling_timesteps, timestep_range
from districompile.errors import InputError
from districompile.ir.plan import Phase, Plan, TensorSpec
from districompile.outputs import check_file, write_file
from districompile.runtime.choose import check_transport
from districompile.runtime.launcher import launch
from districompile.runtime.liveness import TIMEOUT, check_timeout
from districompile.runtime.module import DistributedModule, check_device, check_native_code, load
from districompile.runtime.runner import called_spec, timestep_path, world_size
from districompile.runtime.trace import Trace, write_chrome_trace

_WARM = 3  # calls before the clock runs, twice: the first step by step, the others while they are captured
PHASES: tuple[Phase, ...] = ("warmup", "steady")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of ``bench``; also what every rank is told. ``steps``: time a whole run of that many calls too."""

    bundle: Path
    calls: int
    steps: int | None
    trace: Path | None
    transport: str
    cuda_graph: bool
    device: str | None = None
    kernels: Path | None = None
    native_code: bool = True
    timeout: float = TIMEOUT


def main(settings: Settings) -> int:
    """Start the processes, time, and print."""
    check_transport(settings.transport)
    quiet_libraries()
    bundle = Bundle.open(settings.bundle)
    kind = check_device(bundle, settings.device)
    check_native_code(bundle, settings.native_code)
    if settings.kernels is not None and kind != "cuda":
        raise InputError("--kernels lists the kernels of a GPU, and this bundle runs on the CPU: leave it out")
    check_timeout(settings.timeout)
    for name, file in (("--trace", settings.trace), ("--kernels", settings.kernels)):
        if file is not None:
            check_file(file, name)
    job = dataclasses.replace(settings, bundle=settings.bundle.resolve())
    results = launch(worker, (job,), world_size(bundle.plan))
    ranks = [results[r] for r in sorted(results) if results[r] is not None]
    if not ranks:  # another rank under an outer launcher
        return 0
    for line in _lines(ranks):
        print(json.dumps({"bundle": str(settings.bundle), **line}), flush=True)
    if settings.trace is not None and ranks[0]["traces"] is not None:
        write_chrome_trace(settings.trace, [r["traces"] for r in ranks])
    if settings.kernels is not None and ranks[0]["kernels"] is not None:
        write_file(settings.kernels, ranks[0]["kernels"])
    return 0


def worker(job: Settings) -> dict[str, Any]:
    """One rank: what it measured."""
    quiet_libraries()
    began = time.perf_counter()
    module = load(
        job.bundle, verify="quick", transport=job.transport, cuda_graph=job.cuda_graph, device=job.device,
        native_code=job.native_code, timeout=job.timeout,
    )  # fmt: skip
    loaded = time.perf_counter()
    figures: dict[str, list[float]] = {}
    rank, world = int(os.environ.get("RANK", "0")), world_size(module.plan)
    timer = Calls(module)
    for phase in PHASES:
        module.phase = phase
        figures[phase] = timer.timed(job.calls)
    traces = _traced(module, timer) if world > 1 else None
    module.phase = "steady"
    kernels = _kernels(timer) if job.kernels is not None else None
    if world > 1:
        with module.transfers_free():
            for phase in PHASES:
                module.phase = phase
                figures[f"{phase} free"] = timer.timed(job.calls)
    warmup = int(module.plan.options.get("warmup_steps", 4))
    if job.steps is not None:
        for _ in range(2):  # all graphs of a whole run are captured in the first one
            timer.restart()
            _synchronize(module)
            start = time.perf_counter()
            for number in range(job.steps):
                # Random inputs are no image that settles: --warmup-steps says how many steps are exact
                module.phase = "warmup" if number < warmup else "steady"
                timer.call()
            _synchronize(module)
            run_s = time.perf_counter() - start
        figures["run"] = [run_s]
    result = {
        "rank": rank, "device": _device_name(module.device), "transport": module.transport, "load_s": loaded - began,
        "figures": figures, "peak": module.peak_bytes, "traces": traces, "kernels": kernels, "steps": job.steps,
        "warmup_steps": warmup,
    }  # fmt: skip
    module.close()
    return result


class Calls:
    """Calls of a module with random inputs and timesteps that fall, as in sampling."""

    def __init__(self, module: DistributedModule) -> None:
        self._module = module
        self.kwargs = random_call(module.plan, module.device)
        path = timestep_path(module.plan)
        spec = next((called_spec(module.plan, i) for i in module.plan.inputs if i.path == path), None)
        self._path = None if spec is None else path
        self._values: list[Any] = [None]
        if spec is not None:
            self._values = falling_timesteps(spec, *timestep_range(module.plan, module.config))
        self.restart()

    def restart(self) -> None:
        """The next call starts an image."""
        self._number = 0
        self._module.reset()

    def call(self) -> Any:
        """One call, with the next timestep."""
        self._continue()
        return self._call()

    def _call(self) -> Any:
        if self._path is not None:
            # On the host: where the next call belongs is then known without waiting for the device
            _put(self.kwargs, self._path, self._values[self._number])
            self._number += 1
        return self._module(**self.kwargs)

    def _continue(self) -> bool:
        """Start another image where no timestep is left, which leaves one for the next call; whether it did."""
        if self._path is None or self._number < len(self._values):
            return False
        self.restart()
        if self._module.phase == "steady" and len(self._values) > 1:
            with self._module.exact():  # displaced calls continue from an exact one
                self._call()
        return True

    def timed(self, count: int) -> list[float]:
        """Milliseconds from each call's end to the next one's, as they follow each other in sampling."""
        for _ in range(2 * _WARM):
            self.call()
        _synchronize(self._module)
        marks = [_mark(self._module)]
        pairs = []
        for _ in range(count):
            if self._continue():
                marks = [_mark(self._module)]  # what begins an image is not timed
            self._call()
            marks.append(_mark(self._module))
            pairs.append((marks[-2], marks[-1]))
        _synchronize(self._module)
        return [_between(a, b) for a, b in pairs]


def _mark(module: DistributedModule) -> Any:
    if module.device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _between(a: Any, b: Any) -> float:
    return (b - a) * 1e3 if isinstance(a, float) else float(a.elapsed_time(b))


def _kernels(timer: Calls) -> str:
    """The kernels of one displaced call, by time."""
    from torch.profiler import ProfilerActivity, profile

    timer.call()
    with profile(activities=[ProfilerActivity.CUDA]) as found:  # operators on the host: gloo's threads crash torch 2.13
        timer.call()
        torch.cuda.synchronize()
    averages = found.key_averages()
    return str(averages.table(sort_by="self_cuda_time_total", row_limit=100, max_name_column_width=120))


def _traced(module: DistributedModule, timer: Calls) -> Trace:
    """Some calls of each phase, each with what it waited for; those that are captured for it come first."""
    phases: tuple[Phase, ...] = ("steady", "warmup")
    with module.trace() as trace:
        for phase in phases:
            module.phase = phase
            for _ in range(6):
                timer.call()
    return trace


def _lines(ranks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The slowest rank counts."""
    first = ranks[0]
    common = {"processes": len(ranks), "device": first["device"], "transport": first["transport"]}
    names = {"warmup": "exact step", "steady": "displaced step"}
    for phase, name in names.items():
        medians = [statistics.median(r["figures"][phase]) for r in ranks]
        fastest = min(min(r["figures"][phase]) for r in ranks)
        calls = len(first["figures"][phase])
        yield {"figure": name, "ms": round(max(medians), 4), "min_ms": round(fastest, 4), "calls": calls, **common}
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
    """A traced call, of the rank that computes longest. The others wait for that rank besides, as long as it computes
    more than they do: ``uneven_ms`` for the first of them."""
    slowest = max(ranks, key=lambda s: s["run_ms"])
    uneven = slowest["run_ms"] - min(s["run_ms"] for s in ranks)
    return {**slowest, "sent_bytes": max(s["sent_bytes"] for s in ranks), "uneven_ms": round(uneven, 4)}


def random_call(plan: Plan, device: torch.device, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments that fit a plan: normally distributed numbers, and zeros where integers are wanted."""
    generator = torch.Generator().manual_seed(seed)
    kwargs: dict[str, Any] = {}
    for path, value in plan.constants.items():
        if value is not None and path in plan.signature:
            kwargs[path] = value
    for spec in plan.inputs:
        _put(kwargs, spec.path, _random(called_spec(plan, spec), generator).to(device))
    listed: dict[str, Any] = _listed(kwargs)
    return listed


def _random(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    if not spec.dtype.is_floating_point:
        return torch.zeros(spec.shape, dtype=spec.dtype)
    return torch.randn(spec.shape, generator=generator).to(spec.dtype)


def _put(kwargs: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    at: Any = kwargs
    for name in parents:
        at = at[int(name)] if isinstance(at, list) else at.setdefault(name, {})
    if isinstance(at, list):
        at[int(last)] = value
    else:
        at[last] = value


def _listed(x: Any) -> Any:
    """Containers whose keys count from 0 are lists."""
    if not isinstance(x, dict):
        return x
    if x and all(k == str(i) for i, k in enumerate(x)):
        return [_listed(v) for v in x.values()]
    return {k: _listed(v) for k, v in x.items()}


def _synchronize(module: DistributedModule) -> None:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
