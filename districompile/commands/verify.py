"""``districompile verify``: a bundle against the original model.

The exact phase is compared call by call on random inputs. The drift of the displaced phase is measured over a whole
sampling run from the same seed: with the pipeline where the source has one, otherwise with a plain DDIM loop around the
UNet. All ranks run in this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from districompile.api import convert
from districompile.backends.base import get_backend
from districompile.bundle import Bundle
from districompile.commands.checks import check_steps
from districompile.commands.common import UsageError, chosen_dtype, console, print_json, quiet_libraries, source_of
from districompile.commands.drawing import Request, draw, place
from districompile.compare import relative_error
from districompile.ir.plan import Plan, dtype_name
from districompile.ir.walk import replace
from districompile.models.inputs import Example
from districompile.models.sources import LoadedModel, import_diffusers, load_source
from districompile.progress import Progress, terminal_progress
from districompile.runtime.module import DistributedModule, check_device, check_native_code, load
from districompile.structure import OutputNamespace

PROMPT = "a red circle above a blue square at sunset"
# Largest |difference| / largest |value| of the exact phase; other backends than eager reorder sums.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
EAGER_TOLERANCES = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
CHECKED_CALLS = 2


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of ``verify``."""

    bundle: Path
    prompt: str | None = None
    steps: int = 50
    seed: int = 0
    tolerance: float | None = None
    drift: bool = True
    nodes: bool = False
    backend: str | None = None
    model: str | None = None
    device: str | None = None
    native_code: bool = True


def main(settings: Settings, as_json: bool) -> int:
    """Print the comparison; 1 where the exact phase is off by more than the tolerance."""
    if settings.tolerance is not None and settings.tolerance < 0:
        raise UsageError("--tolerance must be 0 or more")
    bundle = Bundle.open(settings.bundle)
    if settings.backend is None:
        check_device(bundle, settings.device)
        check_native_code(bundle, settings.native_code)
    quiet_libraries()
    progress = terminal_progress()
    found = compare(settings, bundle.plan, bundle.manifest, progress)
    ok = bool(found["exact"]["ok"])
    if as_json:
        print_json(found)
        return 0 if ok else 1
    terminal = console()
    exact = found["exact"]
    terminal.print(
        f"exact phase: largest relative error {exact['max_relative_error']:.2e} over {exact['calls']} calls "
        f"({'within' if ok else 'ABOVE'} the tolerance of {exact['tolerance']:g})",
        highlight=False,
    )
    nodes = found.get("nodes")
    if nodes is not None:
        terminal.print(f"{nodes['compared']} operators compared; the worst:", highlight=False)
        for e in nodes["worst"]:
            terminal.print(f"  {e['error']:.2e}  {e['node']} ({e['op']}) {e['source']}", highlight=False, markup=False)
    drift = found["drift"]
    if drift is not None:
        psnr = "identical" if drift["psnr_db"] is None else f"PSNR {drift['psnr_db']:.1f} dB"
        terminal.print(
            f"displaced phase: {drift['steps']} steps, {drift['exact_steps']} of them exact; relative error of the "
            f"result {drift['relative_error']:.2e}, {drift['of']} {psnr}",
            highlight=False,
        )
    return 0 if ok else 1


def compare(settings: Settings, plan: Plan, manifest: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """The comparison as plain data: ``exact`` and ``drift`` (None where there is nothing to sample)."""
    source = source_of(manifest, settings.model)
    dtype = str(plan.options.get("dtype") or _weight_dtype(plan))
    if settings.drift:
        check_steps(source, settings.steps)
    with progress.task(f"loading {source}"):
        loaded = load_source(source, chosen_dtype(plan))
        compiled = _load(settings, manifest)
    tolerance = settings.tolerance
    if tolerance is None:
        table = EAGER_TOLERANCES if manifest.get("backend") == "eager" else TOLERANCES
        tolerance = table.get(dtype, 1e-4)
    nodes = node_errors(loaded, plan, settings.seed, progress) if settings.nodes else None
    loaded.module.to(compiled.device)
    with _full_precision():
        error = exact_error(loaded, compiled, plan.options, settings.seed, progress)
    drift = None
    if settings.drift and loaded.kind in ("UNet2DConditionModel", "UNet2DModel"):
        drift = measure_drift(loaded, compiled, plan.options, settings, progress)
    return {
        "bundle": str(settings.bundle),
        "model": source,
        "exact": {
            "max_relative_error": error,
            "tolerance": tolerance,
            # Written so that a NaN is not ok.
            "ok": error <= tolerance,
            "calls": CHECKED_CALLS,
        },
        "drift": drift,
        **({} if nodes is None else {"nodes": nodes}),
    }


def _load(settings: Settings, manifest: Mapping[str, Any]) -> DistributedModule:
    """All ranks in this process, by the bundle's own backend or by ONNX Runtime from the files it was built from."""
    if settings.backend is None:
        return load(settings.bundle, lockstep=True, device=settings.device, native_code=settings.native_code)
    own = str(manifest.get("backend"))
    if own not in (settings.backend, "tensorrt"):
        raise UsageError(f"--backend {settings.backend}: only what tensorrt engines are built from can be run by it")
    backend = get_backend(settings.backend)
    return load(settings.bundle, lockstep=True, device="cpu", backend=backend, native_code=settings.native_code)


def node_errors(loaded: LoadedModel, plan: Plan, seed: int, progress: Progress) -> dict[str, Any]:
    """The cut graph, operator by operator, against the original: how many were compared, and the worst."""
    if plan.options.get("cfg") == "split":
        raise UsageError("--nodes works on one guidance half: convert with --cfg batch to look for a wrong operator")
    example = _example(loaded, plan.options, seed)
    rows = {i.path: i.rows for i in plan.inputs if i.rows is not None}
    with progress.task("comparing every operator"):
        program = convert(loaded.module, example.args, example.kwargs, ranks=plan.ranks, rows=rows)
        found = program.compare_nodes(*example.args, **example.kwargs)
    worst = sorted(found, key=lambda e: -e.error)[:5]
    return {"compared": len(found), "worst": [dataclasses.asdict(e) for e in worst]}


def exact_error(
    loaded: LoadedModel, compiled: DistributedModule, options: Mapping[str, Any], seed: int, progress: Progress
) -> float:
    """Largest |difference| / largest |value| over all outputs of :data:`CHECKED_CALLS` calls in the exact phase."""
    worst = 0.0
    with progress.task("exact phase", 2 * CHECKED_CALLS) as task, torch.inference_mode():
        for i in range(CHECKED_CALLS):
            example = _example(loaded, options, seed + i, compiled.device)
            expected = list(_leaves(loaded.module(*example.args, **example.kwargs)))
            task.advance()
            with compiled.exact():
                actual = list(_leaves(compiled(*example.args, **example.kwargs)))
            task.advance()
            if len(actual) != len(expected):
                return math.inf
            for a, b in zip(actual, expected, strict=True):
                error = largest_error(a, b)
                worst = error if math.isnan(error) else max(worst, error)
                if math.isnan(worst):
                    return worst
    return worst


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """max |a - b| / max |b|, in float64; infinite for another shape."""
    if actual.shape != expected.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    a, b = actual.double(), expected.double()
    scale = b.abs().max().item()
    return (a - b).abs().max().item() / (scale or 1.0)


def measure_drift(
    loaded: LoadedModel, compiled: DistributedModule, options: Mapping[str, Any], settings: Settings, progress: Progress
) -> dict[str, Any]:
    """Sample twice from one seed, with the original and with the compiled model, and compare what comes out."""
    compiled.reset()
    if loaded.pipeline_loader is not None:
        pipe = loaded.pipeline_loader()
        place(pipe, compiled.device)
        request = Request(settings.prompt or PROMPT, None, settings.steps, None, settings.seed, options)
        pictures = []
        for module in (loaded.module, compiled):
            pipe.unet = module
            pictures.append(draw(pipe, request, progress))
        expected, actual = (p.pixels for p in pictures)
        before, after = (p.latents if p.latents is not None else p.pixels for p in pictures)
        of, peak = "image", 1.0
    else:
        expected, actual = (
            sample(loaded, m, options, settings, compiled.device, progress) for m in (loaded.module, compiled)
        )
        before, after = expected, actual
        of, peak = "sample", float(expected.max() - expected.min())
    assert expected is not None and actual is not None and before is not None and after is not None
    return {
        "steps": settings.steps,
        "exact_steps": compiled.image_calls["exact"],
        "relative_error": relative_error(after, before),
        "psnr_db": psnr(actual, expected, peak),
        "of": of,
    }


def psnr(actual: Tensor, expected: Tensor, peak: float) -> float | None:
    """Peak signal-to-noise ratio in dB; None where the two are equal."""
    mse = (actual.double() - expected.double()).square().mean().item()
    return None if mse == 0 else 10 * math.log10(peak * peak / mse)


def sample(
    loaded: LoadedModel, module: nn.Module, options: Mapping[str, Any], settings: Settings, device: torch.device,
    progress: Progress,
) -> Tensor:  # fmt: skip
    """A DDIM run around a bare UNet, from the example's inputs; guidance halves are computed, and the first is
    followed."""
    trained = getattr(loaded.module, "config", {}).get("num_train_timesteps") or 1000
    if settings.steps > trained:
        raise UsageError(f"--steps {settings.steps}: the model was trained with {trained} steps, and takes no more")
    scheduler = import_diffusers().DDIMScheduler(
        num_train_timesteps=trained, beta_schedule="scaled_linear", clip_sample=False
    )
    scheduler.set_timesteps(settings.steps)
    example = _example(loaded, options, settings.seed, device)
    first: Tensor = example.args[0]
    images = int(options.get("images", 1))
    x = first[:images].clone()
    with progress.task("sampling", settings.steps) as task, torch.inference_mode():
        for t in scheduler.timesteps:
            batch = x.repeat(first.shape[0] // images, *[1] * (x.dim() - 1))
            out = module(batch, t, *example.args[2:], **example.kwargs)[0][:images]
            # Inpainting takes more channels than it gives, learned variances give more than they take.
            c = min(out.shape[1], x.shape[1])
            x = torch.cat([scheduler.step(out[:, :c], t, x[:, :c]).prev_sample, x[:, c:]], dim=1)
            task.advance()
    return x


def _example(loaded: LoadedModel, options: Mapping[str, Any], seed: int, device: torch.device | None = None) -> Example:
    """Inputs as the bundle was made for, drawn on the CPU whatever ``device`` they are moved to."""
    if loaded.kind == "factory":
        example = loaded.example(seed=seed)
    else:
        cfg = options.get("guidance", loaded.cfg)
        images = int(options.get("images", 1))
        example = loaded.example(options.get("height"), options.get("width"), images, cfg, seed)
    if device is None or device.type == "cpu":
        return example
    args, kwargs = replace((example.args, example.kwargs), Tensor, lambda t: t.to(device))
    return dataclasses.replace(example, args=args, kwargs=kwargs)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32: the tolerances are those of float32."""
    switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    earlier = [s.allow_tf32 for s in switches]
    try:
        for s in switches:
            s.allow_tf32 = False
        yield
    finally:
        for s, before in zip(switches, earlier, strict=True):
            s.allow_tf32 = before


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from _leaves(v)
    elif isinstance(value, list | tuple):
        for v in value:
            yield from _leaves(v)
    elif isinstance(value, OutputNamespace):
        for v in vars(value).values():
            yield from _leaves(v)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from _leaves(getattr(value, f.name))


def _weight_dtype(plan: Plan) -> str:
    floating = [w.dtype for w in plan.weights.values() if w.dtype.is_floating_point]
    return dtype_name(max(set(floating), key=floating.count)) if floating else "float32"
