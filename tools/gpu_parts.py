# SPDX-License-Identifier: Apache-2.0
"""Measure one GPU, and the engines of one rank without transfers, for ``bench_gpu.py``."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import importlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from bench_convert import SD15, SDXL

from districompile.cost.one_rank import OneRank
from districompile.cost.timing import captured, median_ms

MODELS: dict[str, dict[str, Any]] = {"sdxl": SDXL, "sd15": SD15}
Say = Callable[..., None]


def network(model: str, device: torch.device, dtype: torch.dtype = torch.float16) -> torch.nn.Module:
    """Build the UNet with small random weights. ``model`` is a name of ``MODELS``, or a JSON configuration."""
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
    """Make the arguments of one call for a latent of this height and width. Guidance needs a batch of two."""
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
    """A lock on the file ``path``: processes share it while they compile, and hold it alone while they measure."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else path.open("a")
        self._lock(fcntl.LOCK_SH)

    def _lock(self, kind: int) -> None:
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)
            fcntl.flock(self._file, kind)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock exclusively: no other process of the run compiles or measures."""
        self._lock(fcntl.LOCK_EX)
        try:
            yield
        finally:
            torch.cuda.synchronize() if torch.cuda.is_available() else None
            self._lock(fcntl.LOCK_SH)


def peak_gib() -> float | None:
    """Return the peak of PyTorch's memory on the GPU so far."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None


@torch.no_grad()
def single(say: Say, turn: Turn, model: str, height: int, width: int, modes: tuple[str, ...], batch: int = 1) -> None:
    """Time one GPU: eager and ``torch.compile`` with each of ``modes``, as CUDA graphs, channels last.

    A mode that ends in ``+flash3`` uses FlashAttention-3 for all attention. ``+fp8`` has linear layers in 8 bits by
    torchao, with scales by row, which it has for bfloat16 alone: what has no multiple of 16 channels stays.
    """
    device = torch.device("cuda")
    module = network(model, device)
    kwargs = example(module, device, height, width, batch)
    count = 20 if height * width < 100_000 else 5

    def eager() -> Any:
        return module(**kwargs, return_dict=False)[0]

    cast(Any, module).to(memory_format=torch.channels_last)
    kwargs["sample"] = kwargs["sample"].to(memory_format=torch.channels_last)
    for mode in (m for m in modes if m != "eager"):  # compile first, while other processes compile
        torch.compiler.reset()
        start = time.perf_counter()
        name, _, way = mode.partition("+")
        own, given = _in_8_bits(model, device, height, width, batch) if way == "fp8" else (module, kwargs)
        compiled = torch.compile(own, fullgraph=True, dynamic=False, mode=None if name == "default" else name)

        def step(compiled: Any = compiled, given: dict[str, Any] = given) -> Any:
            return compiled(**given, return_dict=False)[0]

        with flash_attention() if way == "flash3" else contextlib.nullcontext():
            step()
            seconds = round(time.perf_counter() - start, 1)
            with turn.alone():
                ms = median_ms(captured(step), count)
        say(figure=f"1 GPU torch.compile {mode} + CUDA graph", ms=ms, compile_s=seconds, peak_gib=peak_gib())
        gc.collect()
    if "eager" in modes:
        with turn.alone():
            say(figure="1 GPU eager + CUDA graph", ms=median_ms(captured(eager), count))


def _in_8_bits(
    model: str, device: torch.device, height: int, width: int, batch: int
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Return the network in bfloat16 with its linear layers in fp8 by torchao, and the arguments of a call."""
    library = importlib.import_module("torchao.quantization")
    module = network(model, device, torch.bfloat16)
    cast(Any, module).to(memory_format=torch.channels_last)
    kwargs = example(module, device, height, width, batch)
    kwargs["sample"] = kwargs["sample"].to(memory_format=torch.channels_last)

    def fits(layer: torch.nn.Module, _: str) -> bool:
        return isinstance(layer, torch.nn.Linear) and layer.in_features % 16 == layer.out_features % 16 == 0

    way = library.Float8DynamicActivationFloat8WeightConfig(granularity=library.PerRow())
    library.quantize_(module, way, filter_fn=fits)
    return module, kwargs


@contextlib.contextmanager
def flash_attention() -> Iterator[None]:
    """Use FlashAttention-3 for everything traced or run inside this context, by PyTorch's own switch."""
    from torch._functorch import config
    from torch.nn import attention

    attention.activate_flash_attention_impl("FA3")
    try:  # cached programs contain the kernels they were compiled with
        with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION), config.patch(enable_autograd_cache=False):
            yield
    finally:
        attention.restore_flash_attention_impl()


@torch.no_grad()
def free(
    say: Say, turn: Turn, model: str, height: int, width: int, ranks: int, rank: int, phases: tuple[str, ...],
    options: Mapping[str, Any], folder: Path, check: bool = True, profile: Path | None = None,
    optimise: str = "", segments: int = 4, batch: int = 1, groupnorm: str = "forecast", **numbers: Any,
) -> None:  # fmt: skip
    """Time the step of one rank without transfers, as one CUDA graph: an upper bound, and part of a prediction.

    ``numbers`` are options of :func:`districompile.convert` that change numbers, as ``quantise`` and ``reuse``.
    """
    import districompile as dc
    from districompile.backends.inductor.backend import InductorBackend

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    module = network(model, device)
    kwargs = example(module, device, height, width, batch)
    start = time.perf_counter()
    program = dc.convert(
        module, kwargs=kwargs, ranks=ranks, rows={"sample": 2}, optimise=optimise, segments=segments,
        groupnorm=groupnorm, faster=InductorBackend(**options).faster_in_8_bits, **numbers,
    )  # fmt: skip
    converted = time.perf_counter()
    gc.collect()
    torch.cuda.empty_cache() if device.type == "cuda" else None  # of the calls by which layers were chosen
    leaves = {"sample": kwargs["sample"], "timestep": kwargs["timestep"],
              "encoder_hidden_states": kwargs["encoder_hidden_states"],
              **{f"added_cond_kwargs.{k}": v for k, v in kwargs.get("added_cond_kwargs", {}).items()}}  # fmt: skip
    inputs = {i.value: leaves[i.path] for i in program.plan.inputs}
    report = program.report()
    for phase in phases:
        began = time.perf_counter()
        backend = InductorBackend(**options)
        one = OneRank(program, phase, rank, backend, device, folder / f"{phase}-{ranks}-{height}x{width}")
        built = time.perf_counter()
        packages = len({p for p in folder.rglob("*.pt2") if phase in str(p.parent)})
        facts = {"ranks": ranks, "rank": rank, "convert_s": round(converted - start, 1), "optimise": optimise,
                 "groupnorm": groupnorm,
                 "build_s": round(built - began, 1), "packages": packages, "segments": len(one.engines),
                 "eight_bits": sum(x.reason is None for x in program.plan.report.quantised),
                 "sent_mb": round(report.sent(cast(Any, phase))[rank] / 1e6, 1), "options": dict(options),
                 **numbers}  # fmt: skip
        if check:
            say(figure=f"{phase} against eager, largest error of a segment", errors=one.errors(inputs), **facts)
            torch.cuda.empty_cache() if device.type == "cuda" else None
        with turn.alone():
            step = functools.partial(one.step, inputs)
            ms = median_ms(captured(step), 20 if height * width < 100_000 else 5)
            say(figure=f"{phase} step, transfers free", ms=ms, peak_gib=peak_gib(), **facts)
            if profile is not None:
                write_kernels(step, profile.with_name(f"{profile.name}-{phase}-{ranks}-{height}x{width}.txt"))
        del one, backend, step
        gc.collect()


def write_kernels(step: Callable[[], Any], path: Path) -> None:
    """Write a table of the kernels of one step, by time."""
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=110)
    total = sum(e.self_device_time_total for e in found.key_averages())
    count = sum(e.count for e in found.key_averages())
    path.write_text(f"{count} device activities, {total / 1e3:.2f} ms\n{table}\n")
