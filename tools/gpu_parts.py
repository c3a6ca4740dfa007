"""What ``bench_gpu.py`` measures in processes of its own: one GPU, and one rank's engines with transfers free."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from bench_convert import SD15, SDXL

MODELS: dict[str, dict[str, Any]] = {"sdxl": SDXL, "sd15": SD15}
Say = Callable[..., None]


def network(model: str, device: torch.device, dtype: torch.dtype = torch.float16) -> torch.nn.Module:
    """The UNet with small random weights, on the device. ``model``: a name of ``MODELS``, or a JSON configuration."""
    from diffusers import UNet2DConditionModel

    config = MODELS[model] if model in MODELS else json.loads(model)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with device:
        module: torch.nn.Module = UNet2DConditionModel(**config).eval()
    torch.set_default_dtype(before)
    return module


def example(module: torch.nn.Module, device: torch.device, height: int, width: int, batch: int = 1) -> dict[str, Any]:
    """Arguments of one call; height and width of the latent. Guidance takes a batch of two."""
    config: Any = module.config
    dtype = next(module.parameters()).dtype
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

    kwargs: dict[str, Any] = {
        "sample": normal(batch, 4, height, width),
        "timestep": torch.tensor(500.0, device=device),
        "encoder_hidden_states": normal(batch, 77, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        kwargs["added_cond_kwargs"] = {
            "text_embeds": normal(batch, pooled),
            "time_ids": torch.full((batch, 6), 1024.0, device=device, dtype=dtype),
        }
    return kwargs


class Turn:
    """Compile together, measure alone: processes that share ``path`` hold it together until they measure."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else path.open("a")
        self._lock(fcntl.LOCK_SH)

    def _lock(self, kind: int) -> None:
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)
            fcntl.flock(self._file, kind)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other process of the run compiles or measures meanwhile."""
        self._lock(fcntl.LOCK_EX)
        try:
            yield
        finally:
            torch.cuda.synchronize() if torch.cuda.is_available() else None
            self._lock(fcntl.LOCK_SH)


def median_ms(step: Callable[[], Any], count: int = 20, warm: int = 3) -> float:
    """Median of the times from the end of one ``step`` to that of the next, by CUDA events where there is a GPU: steps
    follow each other, as in sampling, so that the host's work counts only where the GPU waits for it."""
    for _ in range(warm):
        step()
    if not torch.cuda.is_available():
        times = []
        for _ in range(count):
            start = time.perf_counter()
            step()
            times.append((time.perf_counter() - start) * 1e3)
        return float(statistics.median(times))
    torch.cuda.synchronize()
    marks = [cast(Any, torch.cuda.Event)(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return float(statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)))


def captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """``step`` as the replay of one CUDA graph; on the CPU, itself."""
    if not torch.cuda.is_available():
        return step
    side: Any = cast(Any, torch.cuda.Stream)()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def peak_gib() -> float | None:
    """Most memory of the process on the GPU so far, CUDA's own not counted."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None


@torch.no_grad()
def single(say: Say, turn: Turn, model: str, height: int, width: int, modes: tuple[str, ...], batch: int = 1) -> None:
    """One GPU: eager, and ``torch.compile`` with each of ``modes``, all as CUDA graphs, channels last. A mode that ends
    in ``+flash3`` has FlashAttention-3 in PyTorch's place, for all attention."""
    device = torch.device("cuda")
    module = network(model, device)
    kwargs = example(module, device, height, width, batch)
    count = 20 if height * width < 100_000 else 5

    def eager() -> Any:
        return module(**kwargs, return_dict=False)[0]

    cast(Any, module).to(memory_format=torch.channels_last)
    kwargs["sample"] = kwargs["sample"].to(memory_format=torch.channels_last)
    for mode in (m for m in modes if m != "eager"):  # first what has to be compiled, as others do meanwhile
        torch.compiler.reset()
        start = time.perf_counter()
        name, _, flash = mode.partition("+")
        compiled = torch.compile(module, fullgraph=True, dynamic=False, mode=None if name == "default" else name)

        def step(compiled: Any = compiled) -> Any:
            return compiled(**kwargs, return_dict=False)[0]

        with flash_attention() if flash else contextlib.nullcontext():
            step()
            seconds = round(time.perf_counter() - start, 1)
            with turn.alone():
                ms = median_ms(captured(step), count)
        say(figure=f"1 GPU torch.compile {mode} + CUDA graph", ms=ms, compile_s=seconds, peak_gib=peak_gib())
        gc.collect()
    if "eager" in modes:
        with turn.alone():
            say(figure="1 GPU eager + CUDA graph", ms=median_ms(captured(eager), count))


@contextlib.contextmanager
def flash_attention() -> Iterator[None]:
    """FlashAttention-3, by PyTorch's own switch for it, in what is traced or run inside."""
    from torch._functorch import config
    from torch.nn import attention

    attention.activate_flash_attention_impl("FA3")
    try:  # a cached program has the kernels of attention it was made with
        with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION), config.patch(enable_autograd_cache=False):
            yield
    finally:
        attention.restore_flash_attention_impl()


class LiveWeights:
    """A program's weights as a bundle's weight file gives them, without the file: each once on the device."""

    def __init__(self, program: Any) -> None:
        self._program = program
        self._held: dict[Any, torch.Tensor] = {}

    def spec(self, name: str) -> Any:
        return self._program.plan.weights[name]

    def tensor(self, name: str, device: torch.device, memory_format: Any = torch.contiguous_format) -> torch.Tensor:
        key = name, device, memory_format
        if key not in self._held:
            self._held[key] = self._program.weight(name).to(device).contiguous(memory_format=memory_format)
        return self._held[key]


class OneRank:
    """The engines of one rank and phase, fed with what others would send: a step whose transfers cost nothing."""

    def __init__(self, program: Any, phase: str, rank: int, backend: Any, device: torch.device, folder: Path) -> None:
        from districompile.backends.build import build_segments
        from districompile.ir.plan import Keep

        self.plan, self.rank, self.device = program.plan, rank, device
        self.phase = program.plan.phases[phase]
        wanted = {(phase, name, int(s.engines[rank])) for name, s in self.phase.segments.items()}
        self.segments = {key[1]: s for key, s in program.segments(phase) if key in wanted}
        weights = cast(Any, LiveWeights(program))
        files = build_segments(backend, self.segments.items(), weights, folder)
        self.weights = weights
        self.engines = {
            name: backend.load(folder / files[name], s.outputs, weights, device)
            for name, s in self.phase.segments.items()
        }
        generator = torch.Generator(device).manual_seed(2)
        self.received = {}
        for name, collective in program.plan.collectives.items():
            spec = collective.results[rank]
            self.received[name] = _random(spec, device, generator, collective.kind == "norm")
        self.state: dict[str, torch.Tensor] = {}
        norms = {c.source for c in program.plan.collectives.values() if c.kind == "norm"}
        kept = {s.state for s in self.phase.steps if isinstance(s, Keep) and s.value in norms}
        for segment in self.segments.values():
            for name, spec in segment.inputs:
                if name.endswith(".previous"):
                    self.state[name] = _random(spec, device, generator, name in kept)

    def step(self, inputs: Mapping[str, torch.Tensor], run: Callable[..., Any] | None = None) -> dict[str, Any]:
        """All steps of the phase but the transfers; ``run(segment, inputs)`` stands in for the engines if given."""
        from districompile.ir.plan import Run, Take, Wait

        values = {**self.state, **inputs}
        for step in self.phase.steps:
            if isinstance(step, Take):
                sides = [0, 0] * (values[step.source].ndim - 1 - step.dim) + [step.above, step.below]
                padded = torch.nn.functional.pad(values[step.source], sides, value=step.fill)
                start = step.starts[self.rank]
                values[step.value] = padded.narrow(step.dim, start, step.stops[self.rank] - start).contiguous()
            elif isinstance(step, Wait):
                values.update((name, self.received[name]) for name in step.collectives)
            elif isinstance(step, Run):
                plan = self.phase.segments[step.segment]
                given = {name: values[name] for name in plan.inputs}
                if run is not None:
                    values.update(run(step.segment, given))
                else:
                    values.update(self.engines[step.segment].run(given, plan.outputs))
        return values

    def errors(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Each segment against the eager oracle on the same inputs: largest |a - b| / |b| (2-norms) of its outputs."""
        from districompile.backends.eager import EagerEngine
        from districompile.compare import relative_error
        from districompile.ir.serialize import graph_from_json, graph_to_json

        found: dict[str, float] = {}

        def run(name: str, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            segment, plan = self.segments[name], self.phase.segments[name]
            weights = [self.weights.tensor(n, self.device) for n, _ in segment.weights]
            graph = graph_from_json(graph_to_json(segment.graph), self.device)
            want = EagerEngine(graph, dict(segment.inputs), weights, plan.outputs).run(given, plan.outputs)
            got = self.engines[name].run(given, plan.outputs)
            for output in plan.outputs:
                error = relative_error(got[output], want[output])
                found[name] = max(found.get(name, 0.0), error if error == error else float("inf"))
            return want

        self.step(inputs, run)
        return found


def _random(spec: Any, device: torch.device, generator: torch.Generator, statistics: bool = False) -> torch.Tensor:
    """Values between 0 and 1; statistics of norms are alike, as a correction by their difference needs: of others, a
    variance may come out as nothing, and then an error is as large as one likes."""
    if not spec.dtype.is_floating_point:
        return torch.zeros(spec.shape, dtype=spec.dtype, device=device)
    drawn = torch.rand(spec.shape, device=device, generator=generator, dtype=torch.float32)
    return (1 + drawn / 10 if statistics else drawn).to(spec.dtype)


@torch.no_grad()
def free(
    say: Say, turn: Turn, model: str, height: int, width: int, ranks: int, rank: int, phases: tuple[str, ...],
    options: Mapping[str, Any], folder: Path, check: bool = True, profile: Path | None = None,
    optimise: str = "", segments: int = 4, batch: int = 1, groupnorm: str = "forecast",
) -> None:  # fmt: skip
    """One rank's step with transfers free, as one CUDA graph: the upper bound, and the compute part of a prediction."""
    import districompile as dc
    from districompile.backends.inductor import InductorBackend

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    module = network(model, device)
    kwargs = example(module, device, height, width, batch)
    start = time.perf_counter()
    program = dc.convert(
        module, kwargs=kwargs, ranks=ranks, rows={"sample": 2}, optimise=optimise, segments=segments,
        groupnorm=groupnorm,
    )  # fmt: skip
    converted = time.perf_counter()
    leaves = {"sample": kwargs["sample"], "timestep": kwargs["timestep"],
              "encoder_hidden_states": kwargs["encoder_hidden_states"],
              **{f"added_cond_kwargs.{k}": v for k, v in kwargs.get("added_cond_kwargs", {}).items()}}  # fmt: skip
    inputs = {i.value: leaves[i.path] for i in program.plan.inputs}
    report = program.report()
    for phase in phases:
        began = time.perf_counter()
        backend = InductorBackend(device.type, **options)
        one = OneRank(program, phase, rank, backend, device, folder / f"{phase}-{ranks}-{height}x{width}")
        built = time.perf_counter()
        packages = len({p for p in folder.rglob("*.pt2") if phase in str(p.parent)})
        facts = {"ranks": ranks, "rank": rank, "convert_s": round(converted - start, 1), "optimise": optimise,
                 "groupnorm": groupnorm,
                 "build_s": round(built - began, 1), "packages": packages, "segments": len(one.engines),
                 "sent_mb": round(report.sent(cast(Any, phase))[rank] / 1e6, 1), "options": dict(options)}  # fmt: skip
        if check:
            say(figure=f"{phase} against eager, largest error of a segment", errors=one.errors(inputs), **facts)
            torch.cuda.empty_cache() if device.type == "cuda" else None
        with turn.alone():
            step = functools.partial(one.step, inputs)
            ms = median_ms(captured(step), 20 if height * width < 100_000 else 5)
            say(figure=f"{phase} step, transfers free", ms=ms, peak_gib=peak_gib(), **facts)
            if profile is not None:
                _profile(step, profile.with_name(f"{profile.name}-{phase}-{ranks}-{height}x{width}.txt"))
        del one, backend, step
        gc.collect()


def _profile(step: Callable[[], Any], path: Path) -> None:
    """The kernels of one step, by time."""
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=110)
    total = sum(e.self_device_time_total for e in found.key_averages())
    count = sum(e.count for e in found.key_averages())
    path.write_text(f"{count} device activities, {total / 1e3:.2f} ms\n{table}\n")
