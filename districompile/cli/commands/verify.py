# SPDX-License-Identifier: Apache-2.0
"""``districompile verify``: compare a bundle with the original model.

The exact phase is compared call by call on random inputs. The drift of the displaced phase is measured over a whole
sampling run from the same seed: with the pipeline where the source has one, otherwise with a plain DDIM loop around the
UNet. All ranks run in this process.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from districompile.api import convert
from districompile.backends.registry import get_backend
from districompile.bundle.bundle import Bundle
from districompile.cli.checks import check_steps
from districompile.cli.common import (
    UsageError,
    chosen_dtype,
    console,
    example_of,
    full_precision,
    load_extensions,
    print_json,
    quiet_libraries,
    source_of,
)
from districompile.cli.generate import (
    Request,
    control_arguments,
    control_nets,
    draw,
    parameters_of,
    place,
    start_size,
    starts_from_image,
)
from districompile.cli.options import DEFAULT_PROMPT
from districompile.cli.shapes import at_shape
from districompile.cli.verify import Settings
from districompile.frontend.call_tree import OutputNamespace, flatten_call
from districompile.ir.spec import dtype_name
from districompile.models.imports import add_current_folder
from districompile.models.sources import LoadedModel, import_diffusers, load_source, network_name
from districompile.passes.choose_displaced import ChooseDisplaced
from districompile.passes.quantise import wanted_db
from districompile.plan.options import PlanOptions
from districompile.plan.plan import ExecutionPlan
from districompile.plan.shapes import input_shapes
from districompile.progress import Progress, terminal_progress
from districompile.runtime.load import check_device, check_native_code, load
from districompile.runtime.module import DistributedModule
from districompile.sharding.compare import relative_error

# Largest |difference| / largest |value| of the exact phase; other backends than eager reorder sums.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
EAGER_TOLERANCES = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
CHECKED_CALLS = 2
_MEASURES = {"max_relative_error": "largest relative error", "relative_error": "relative error (2-norm)"}


def main(settings: Settings) -> int:
    """Print the comparison. Return 1 where the exact phase differs by more than the tolerance, else 0."""
    if settings.tolerance is not None and settings.tolerance < 0:
        raise UsageError("--tolerance must be 0 or more")
    if settings.rules and not settings.nodes:
        raise UsageError("--rules: only with --nodes, which compares operator by operator")
    load_extensions(settings.extension)
    bundle = Bundle.open(settings.bundle)
    if settings.backend is None:
        check_device(bundle, settings.device)
        check_native_code(bundle, settings.native_code)
    quiet_libraries()
    progress = terminal_progress()
    if settings.shape is not None:
        bundle = at_shape(bundle, settings.shape)
    source = source_of(bundle.manifest, settings.model)
    if settings.drift:
        check_steps(source, settings.steps)
    with progress.task(f"loading {source}"):
        loaded = load_source(source, chosen_dtype(bundle.plan))
    found = {
        name: compare(settings, name, plan, bundle.manifest, loaded, progress) for name, plan in bundle.plans.items()
    }
    ok = all(bool(f["exact"]["ok"]) for f in found.values())
    if settings.as_json:
        first, *others = found.values()
        print_json(first if not others else {**first, "shapes": list(found.values())})
        return 0 if ok else 1
    for name, figures in found.items():
        if len(found) > 1:
            console().print(f"{name}:", markup=False, highlight=False)
        _print(figures, settings.drift)
    return 0 if ok else 1


def _print(found: Mapping[str, Any], wanted: bool) -> None:
    """Print the comparison of one shape. ``wanted``: the drift was to be measured."""
    terminal = console()
    exact = found["exact"]
    ok = bool(exact["ok"])
    terminal.print(
        f"exact phase: {_MEASURES[exact['measure']]} {exact[exact['measure']]:.2e} over {exact['calls']} calls "
        f"({'within' if ok else 'ABOVE'} the tolerance of {exact['tolerance']:g})",
        highlight=False,
        markup=False,
    )
    if exact["inexact_passes"]:
        listed = f"the pass{'es' * (len(exact['inexact_passes']) > 1)} {', '.join(exact['inexact_passes'])}"
        terminal.print(
            f"a difference is expected: the bundle was converted with {listed}, which changes numerics (exact = False)",
            highlight=False,
            markup=False,
        )
    nodes = found.get("nodes")
    if nodes is not None:
        terminal.print(f"{nodes['compared']} operators compared; the worst:", highlight=False)
        for e in nodes["worst"]:
            terminal.print(f"  {e['error']:.2e}  {e['node']} ({e['op']}) {e['source']}", highlight=False, markup=False)
    drift = found["drift"]
    if drift is None and wanted:
        terminal.print("displaced phase: not measured, because the model has no sampling run of its own")
    if drift is not None:
        psnr = "identical" if drift["psnr_db"] is None else f"PSNR {drift['psnr_db']:.1f} dB"
        reused = f", {drift['reused_steps']} reused" if "reused_steps" in drift else ""
        terminal.print(
            f"displaced phase: {drift['steps']} steps, {drift['exact_steps']} of them exact{reused}; relative error of "
            f"the result {drift['relative_error']:.2e}, {drift['of']} {psnr}",
            highlight=False,
        )


def compare(
    settings: Settings, shape: str, plan: ExecutionPlan, manifest: Mapping[str, Any], loaded: LoadedModel,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Return the comparison of one shape as plain data: ``exact`` and ``drift`` (None without a sampling run)."""
    dtype = plan.options.dtype or _weight_dtype(plan)
    quantised = plan.options.quantise != "none"
    with progress.task(f"loading {settings.bundle}"):
        compiled = _load(settings, shape, manifest)
    tolerance = settings.tolerance
    if tolerance is None:
        table = EAGER_TOLERANCES if manifest.get("backend") == "eager" else TOLERANCES
        tolerance = table.get(dtype, 1e-4)
        if quantised:  # the noise that was asked for, of calls that are no calls of a calibration
            tolerance = max(tolerance, 3 * 10 ** (-wanted_db(plan.options.quantise) / 20))
    nodes = node_errors(loaded, plan, settings, progress) if settings.nodes else None
    loaded.module.to(compiled.device)
    with full_precision():
        largest, mean = exact_errors(loaded, compiled, settings.seed, progress)
    drift = None
    if settings.drift and has_run(loaded):
        drift = measure_drift(loaded, compiled, settings, progress)
    compiled.close()
    return {
        "bundle": str(settings.bundle),
        "model": loaded.source,
        "shape": shape,
        "exact": {
            "max_relative_error": largest,
            "relative_error": mean,
            "tolerance": tolerance,
            # Written so that a NaN is not ok. Rounding to 8 bits is noise, whose largest value says little.
            "ok": (mean if quantised else largest) <= tolerance,
            "measure": "relative_error" if quantised else "max_relative_error",
            "calls": CHECKED_CALLS,
            "inexact_passes": inexact_passes(plan),
        },
        "drift": drift,
        **({} if nodes is None else {"nodes": nodes}),
    }


def _load(settings: Settings, shape: str, manifest: Mapping[str, Any]) -> DistributedModule:
    """Load all ranks of one shape in this process.

    The backend is the bundle's own, or ONNX Runtime with its ONNX files.
    """
    if settings.backend is None:
        return load(
            settings.bundle, lockstep=True, device=settings.device, native_code=settings.native_code, verify="quick",
            shapes=[shape],
        )  # fmt: skip
    own = str(manifest.get("backend"))
    if own not in (settings.backend, "tensorrt"):
        raise UsageError(f"--backend {settings.backend}: only what tensorrt engines are built from can be run by it")
    backend = get_backend(settings.backend)
    return load(
        settings.bundle, lockstep=True, device="cpu", backend=backend, native_code=settings.native_code, verify="quick",
        shapes=[shape],
    )  # fmt: skip


def inexact_passes(plan: ExecutionPlan) -> list[str]:
    """Return the names of the passes that changed numerics in the exact phase, in order.

    The built-in passes of later phases are left out: the exact phase does not run through them.
    """
    passes = [p for p in plan.report.passes if not p.exact and p.phase in (None, "exact")]
    found = [p.name for p in passes if p.name != ChooseDisplaced.name]
    return list(dict.fromkeys(found))


def node_errors(loaded: LoadedModel, plan: ExecutionPlan, settings: Settings, progress: Progress) -> dict[str, Any]:
    """Compare the partitioned graph with the original, operator by operator: the number compared, and the worst.

    ``--rules`` modules are imported first, so that their rules partition the graph.
    """
    if plan.options.cfg == "split":
        raise UsageError("--nodes works on one guidance half: convert with --cfg batch to look for a wrong operator")
    if settings.rules:
        add_current_folder()
    example = example_of(loaded, plan, settings.seed)
    rows = {i.path: i.rows for i in plan.inputs if i.rows is not None}
    with progress.task("comparing every operator"):
        program = convert(
            loaded.module, example.args, example.kwargs, ranks=plan.ranks, rows=rows, rules=settings.rules
        )
        found = program.compare_nodes(*example.args, **example.kwargs)
    worst = sorted(found, key=lambda e: -e.error)[:5]
    return {"compared": len(found), "rules": list(settings.rules), "worst": [dataclasses.asdict(e) for e in worst]}


def exact_errors(
    loaded: LoadedModel, compiled: DistributedModule, seed: int, progress: Progress
) -> tuple[float, float]:
    """Return the worst errors of all outputs of :data:`CHECKED_CALLS` exact calls: largest and in the mean.

    They are max |difference| / max |value|, and the same of 2-norms.
    """
    found: list[tuple[float, float]] = [(0.0, 0.0)]
    with progress.task("exact phase", 2 * CHECKED_CALLS) as task, torch.inference_mode():
        for i in range(CHECKED_CALLS):
            example = example_of(loaded, compiled.plan, seed + i, compiled.device)
            expected = list(_leaves(loaded.module(*example.args, **example.kwargs)))
            task.advance()
            with compiled.exact():
                actual = list(_leaves(compiled(*example.args, **example.kwargs)))
            task.advance()
            if len(actual) != len(expected):
                return math.inf, math.inf
            found += [(largest_error(a, b), relative_error(a, b)) for a, b in zip(actual, expected, strict=True)]
    if any(math.isnan(largest) for largest, _ in found):
        return math.nan, math.nan
    largest, mean = zip(*found, strict=True)
    return max(largest), max(mean)


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """Return max |a - b| / max |b|, in float64; infinity where the shapes differ."""
    if actual.shape != expected.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    a, b = actual.double(), expected.double()
    scale = b.abs().max().item()
    return (a - b).abs().max().item() / (scale or 1.0)


def has_run(loaded: LoadedModel) -> bool:
    """Return whether the model can be sampled: by its pipeline, or as a UNet by a plain loop."""
    return loaded.pipeline_loader is not None or loaded.kind in ("UNet2DConditionModel", "UNet2DModel")


def measure_drift(
    loaded: LoadedModel, compiled: DistributedModule, settings: Settings, progress: Progress
) -> dict[str, Any]:
    """Sample from one seed with the original and with the compiled model, and compare the results."""
    compiled.reset()
    plan, options = compiled.plan, compiled.plan.options
    if loaded.pipeline_loader is not None and _takes_prompt(loaded, plan):
        pipe = loaded.pipeline_loader()
        place(pipe, compiled.device)
        start, mask = _start(pipe, options)
        nets = control_nets(pipe)
        extra = control_arguments(pipe, [_picture(start_size(pipe, options) or (64, 64))] * nets, [1.0] * nets)
        request = Request(
            settings.prompt or DEFAULT_PROMPT, None, settings.steps, None, settings.seed, options, None, start, mask
        )
        pictures = []
        for module in (loaded.module, compiled):
            setattr(pipe, network_name(pipe), module)
            pictures.append(draw(pipe, request, progress, extra=extra))
        expected, actual = (None if p.pixels is None else p.pixels.cpu() for p in pictures)
        before, after = (p.latents if p.latents is not None else p.pixels for p in pictures)
        of, peak = "image", 1.0
    else:
        expected, actual = (
            sample(loaded, m, plan, settings, compiled.device, progress) for m in (loaded.module, compiled)
        )
        before, after = expected, actual
        of, peak = "sample", float(expected.max() - expected.min())
    assert expected is not None and actual is not None and before is not None and after is not None
    calls = compiled.image_calls
    return {
        "steps": settings.steps,
        "exact_steps": calls["exact"],
        **({"reused_steps": calls["reused"]} if "reused" in calls else {}),
        "relative_error": relative_error(after, before),
        "psnr_db": psnr(actual, expected, peak),
        "of": of,
    }


def _start(pipe: Any, options: PlanOptions) -> tuple[Any, Any]:
    """Make a picture, and a mask of its middle, for a pipeline that starts from them."""
    size = start_size(pipe, options)
    if not starts_from_image(pipe) or size is None:
        return None, None
    from PIL import Image

    start = _picture(size)
    if "mask_image" not in parameters_of(pipe):
        return start, None
    mask = Image.new("L", size, 0)
    mask.paste(255, (size[0] // 4, size[1] // 4, size[0] * 3 // 4, size[1] * 3 // 4))
    return start, mask


def _takes_prompt(loaded: LoadedModel, plan: ExecutionPlan) -> bool:
    """Return whether a prompt of the text encoder's own length fits a shape."""
    options = plan.options
    own = loaded.example(options.height, options.width, options.images, options.guidance or loaded.cfg)
    leaves = flatten_call(plan.signature, own.args, own.kwargs)
    return all(leaves[p].shape == s for p, s in input_shapes(plan).items() if len(s) > 1 and p in leaves)


def _picture(size: tuple[int, int]) -> Any:
    from PIL import Image

    image = Image.linear_gradient("L").resize(size)
    return Image.merge("RGB", (image, image.rotate(180), Image.radial_gradient("L").resize(size)))


def psnr(actual: Tensor, expected: Tensor, peak: float) -> float | None:
    """Return the peak signal-to-noise ratio in dB; None where the two are equal."""
    mse = (actual.double() - expected.double()).square().mean().item()
    return None if mse == 0 else 10 * math.log10(peak * peak / mse)


def sample(
    loaded: LoadedModel, module: nn.Module, plan: ExecutionPlan, settings: Settings, device: torch.device,
    progress: Progress,
) -> Tensor:  # fmt: skip
    """Run DDIM around a bare UNet, from the example's inputs. Both guidance halves are computed; the first one
    determines the next step."""
    trained = getattr(loaded.module, "config", {}).get("num_train_timesteps") or 1000
    if settings.steps > trained:
        raise UsageError(f"--steps {settings.steps}: the model was trained with {trained} steps; use at most as many")
    scheduler = import_diffusers().DDIMScheduler(
        num_train_timesteps=trained, beta_schedule="scaled_linear", clip_sample=False
    )
    scheduler.set_timesteps(settings.steps)
    example = example_of(loaded, plan, settings.seed, device)
    first: Tensor = example.args[0]
    images = plan.options.images
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


def _weight_dtype(plan: ExecutionPlan) -> str:
    floating = [w.dtype for w in plan.weights.values() if w.dtype.is_floating_point]
    return dtype_name(max(set(floating), key=floating.count)) if floating else "float32"
