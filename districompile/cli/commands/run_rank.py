# SPDX-License-Identifier: Apache-2.0
"""``districompile run`` on one rank: check what depends on the bundle and the pipeline, then draw."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from districompile.bundle.bundle import Bundle
from districompile.cli import pictures
from districompile.cli.checks import check_steps, parse_size
from districompile.cli.common import UsageError, load_extensions, quiet_libraries
from districompile.cli.drawing import Drawn, Job, Refused, Report
from districompile.cli.generate import (
    Request,
    as_bytes,
    as_pictures,
    can_preview,
    check_guidance,
    control_arguments,
    control_nets,
    decoded,
    draw,
    parameters_of,
    save_images,
    start_size,
    with_start,
)
from districompile.cli.pipeline import MEETING, attach, chosen_vae, open_pipeline
from districompile.cli.schedulers import scheduler_class
from districompile.cli.shapes import of_size
from districompile.errors import Error
from districompile.models.sources import pipeline_location
from districompile.plan.options import PlanOptions
from districompile.plan.plan import ExecutionPlan
from districompile.plan.plan_report import PlanReport
from districompile.plan.report import Report as PlanText
from districompile.plan.shapes import find_shape
from districompile.progress import Silent, terminal_progress
from districompile.quality.cases import Case
from districompile.runtime.load import check_device, check_native_code
from districompile.runtime.processes.liveness import check_timeout
from districompile.runtime.transports.select import check_transport
from districompile.shapes import AddShapes

if TYPE_CHECKING:
    from PIL.Image import Image


def draw_all(job: Job) -> Report | Refused | None:
    """Run the unmodified pipeline around the compiled UNet on one rank, once for each batch of pictures.

    Rank 0 shows progress, writes each picture when it is finished, and returns the figures. A job that cannot be done
    is refused by all ranks before they connect.
    """
    quiet_libraries()
    try:
        load_extensions(job.extensions)
        ready = _prepare(job)
        shapes, plan, pipe, notes = ready.shapes, ready.plan, ready.pipe, ready.notes
        extra = _controls(job, pipe, plan.options)
    except Error as e:
        return Refused(str(e))
    first = int(os.environ.get("RANK", "0")) == 0
    progress = terminal_progress() if first else Silent()
    compiled = attach(
        pipe,
        job.bundle,
        ready.vae,
        transport=job.transport,
        cuda_graph=job.cuda_graph,
        device=job.device,
        native_code=job.native_code,
        timeout=job.timeout,
        start_timeout=max(60.0, MEETING * job.timeout),
        shapes=list(shapes) if shapes else AddShapes(job.model, progress=progress),
    )
    together = ready.vae is not None  # then all ranks decode
    drawn: list[Drawn] = []
    with _Writer(keep=job.targets.grid is not None) as writer:
        for number, cases in _batches(job.cases, plan.options.images):
            full = (*cases, *[cases[-1]] * (plan.options.images - len(cases)))  # the batch size of a call is fixed
            request = Request(
                cases[0].prompt, job.negative_prompt, job.steps, job.guidance, cases[0].seed, plan.options, full,
                ready.start, ready.mask, job.strength,
            )  # fmt: skip
            of = f"{number + 1} of {len(job.cases)}: " if len(job.cases) > 1 else ""
            picture = draw(
                pipe,
                request,
                progress,
                decode=first or together,
                title=of,
                extra=extra,
                on_step=_previewer(job, pipe, cases, first, together) if first or together else None,
            )
            if not first or picture.pixels is None:
                continue
            pixels, files = picture.pixels[: len(cases)], job.targets.pictures[number : number + len(cases)]
            writer.write(as_bytes(pixels), files, [_record(job, pipe, case, plan) for case in cases])
            drawn.append(
                Drawn(
                    cases, files, round(picture.seconds, 3), round(picture.calls / picture.seconds, 3),
                    dict(compiled.image_calls), compiled.image_drift,
                    not_finite({"latents": picture.latents, "image": pixels}),
                )
            )  # fmt: skip
        made = writer.finish()
    if not first:
        return None
    if job.targets.grid is not None:
        sheet = pictures.grid_of(made, job.columns)
        pictures.write_picture(job.targets.grid, sheet, {**job.record, "pictures": [_of(c) for c in job.cases]})
    if plan.ranks > 1:
        notes += _all_exact(drawn)
    return Report(tuple(drawn), compiled.transport, tuple(notes), tuple(_warnings(drawn, plan)))


class _Writer:
    """Write pictures in a thread, while the ranks draw the next ones: a PNG file takes as long as several steps.

    An error is raised behind the next picture, or by :meth:`finish`. Leaving the context waits for what is being
    written, whatever happened. ``keep``: whether the pictures are asked for afterwards.
    """

    def __init__(self, keep: bool) -> None:
        self._keep = keep
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[list[Image]] | None = None
        self._made: list[Image] = []

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def write(self, images: Tensor, files: Sequence[Path], records: Sequence[Mapping[str, Any]]) -> None:
        self.finish()
        self._pending = self._pool.submit(save_images, images, files, records)

    def finish(self) -> list[Image]:
        """Wait for what is being written. Return the pictures so far, if they are kept."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._made += pending.result() if self._keep or pending.exception() else []
        return self._made


@dataclasses.dataclass(frozen=True)
class _Ready:
    """A job that was checked: the shapes and the plan of the first, the pipeline, and the pictures to start from.

    There are no shapes where one is to be added; its plan is that of the bundle's first shape with the size that is
    asked for. ``vae``: the VAE of all ranks. ``notes`` are for the user.
    """

    shapes: tuple[str, ...]
    plan: ExecutionPlan
    pipe: Any
    vae: Path | None
    notes: list[str]
    start: Image | None
    mask: Image | None


def _prepare(job: Job) -> _Ready:
    """Check the job, and load the pipeline: all that may be refused.

    The hashes of the bundle are checked when it is loaded.
    """
    check_transport(job.transport)
    check_timeout(job.timeout)
    bundle = Bundle.open(job.bundle, verify="quick")
    check_device(bundle, job.device)
    check_native_code(bundle, job.native_code)
    shapes, plan = chosen_shapes(bundle, job.size, job.shape, job.grows)
    check_guidance(plan.options, job.guidance, is_input=any(i.path == "guidance" for i in plan.inputs))
    if job.cases[0].prompt is None and any(i.path == "encoder_hidden_states" for i in plan.inputs):
        raise UsageError("--prompt is needed: the model draws from text")
    scheduler = None if job.scheduler is None else scheduler_class(job.scheduler)
    check_steps(pipeline_location(job.model), job.steps, job.scheduler)
    notes = [] if (few := PlanText(plan).few_rows()) is None else [few]
    pipe = open_pipeline(job.model, plan.options, bundle)
    if scheduler is not None:
        try:
            pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        except Exception as e:  # a constructor may raise anything for the configuration of another class
            raise UsageError(f"--scheduler {job.scheduler} does not fit this model: {e}") from e
    pipe = with_start(pipe, job.image is not None, job.mask is not None)
    vae, note = chosen_vae(job.vae, bundle, [plan], pipe, device=job.device, native_code=job.native_code)
    notes += [] if note is None else [note]
    if len(job.controls) != control_nets(pipe):
        raise UsageError(
            f"--control-image: the bundle has {control_nets(pipe)} ControlNets, and {len(job.controls)} pictures are "
            "given (convert MODEL --controlnet FOLDER puts one into a bundle)"
        )
    accepted = parameters_of(pipe)
    if job.strength is not None:
        if "strength" not in accepted:
            raise UsageError(f"--strength: the pipeline {type(pipe).__name__} has no strength")
        if int(job.steps * job.strength) < 1:
            raise UsageError(f"--strength {job.strength:g} of {job.steps} steps is less than one: raise one of them")
    if job.preview_every is not None and not can_preview(pipe):
        raise UsageError(f"--preview-every: the pipeline {type(pipe).__name__} shows no latents that can be decoded")
    _add_loras(job, pipe)
    start, mask = _start(job, pipe, plan.options, notes)
    return _Ready(shapes, plan, pipe, vae, notes, start, mask)


def chosen_shapes(
    bundle: Bundle, size: str | None, shape: str | None, grows: bool = False
) -> tuple[tuple[str, ...], ExecutionPlan]:
    """Return the names of the shapes to draw in, and the plan of the first. None: a shape that is to be added.

    They are of one size, for texts of any length. Raises :class:`UsageError` for a size that the bundle does not have,
    with the way to add it.
    """
    first = bundle.plan.options
    if shape is not None:
        name = find_shape(bundle.plans, shape)
        return (name,), bundle.plans[name]
    if size is None:
        same = of_size(bundle.plans, first.width, first.height) if first.width and first.height else []
        default = next(iter(bundle.plans))
        return (tuple(same) if default in same else (default,)), bundle.plan
    width, height = parse_size(size)
    found = of_size(bundle.plans, width, height)
    if found:
        return tuple(found), bundle.plans[found[0]]
    if grows:
        options = dataclasses.replace(first, width=width, height=height)
        return (), dataclasses.replace(bundle.plan, options=options)
    raise UsageError(
        f"{bundle.path} has no shape of {size} (it has: {', '.join(bundle.plans)}): add it with "
        f"`districompile convert --add {bundle.path} --size {size}`, or draw with --shapes auto"
    )


def _start(
    job: Job, pipe: Any, options: PlanOptions, notes: list[str]
) -> tuple[Image | None, Image | None]:  # fmt: skip
    if job.image is None:
        return None, None
    image = pictures.read_picture(job.image, "--image")
    size = start_size(pipe, options) or image.size
    if image.size != size:
        given = "x".join(map(str, image.size))
        notes.append(f"{job.image} is {given}, and is scaled and cropped to {size[0]}x{size[1]}")
    mask = None if job.mask is None else pictures.fitted(pictures.read_picture(job.mask, "--mask"), size, "L")
    return pictures.fitted(image, size, "RGB"), mask


def _controls(job: Job, pipe: Any, options: PlanOptions) -> dict[str, Any]:
    found = [pictures.read_picture(path, "--control-image") for path, _ in job.controls]
    size = start_size(pipe, options)
    fitted = [pictures.fitted(picture, size or picture.size, "RGB") for picture in found]
    return control_arguments(pipe, fitted, [scale for _, scale in job.controls])


def _add_loras(job: Job, pipe: Any) -> None:
    """Add the changes that LoRAs make to text encoders. Those of the UNet are in the bundle's weights."""
    for path, scale in job.loras:
        if not hasattr(pipe, "lora_state_dict"):
            continue
        state, alphas = pipe.lora_state_dict(str(path))[:2]
        for name in ("text_encoder", "text_encoder_2"):
            if not any(key.startswith(f"{name}.") for key in state):
                continue
            encoder = getattr(pipe, name, None)
            if encoder is None:
                raise UsageError(f"--lora {path} changes {name}, which the pipeline {type(pipe).__name__} lacks")
            try:
                pipe.load_lora_into_text_encoder(
                    state, network_alphas=alphas, text_encoder=encoder, prefix=name, lora_scale=scale
                )
            except Exception as e:  # of PEFT, or for its absence
                raise UsageError(f"--lora {path} cannot be added to {name}: {str(e).splitlines()[0]}") from e


def _batches(cases: tuple[Case, ...], size: int) -> Iterator[tuple[int, tuple[Case, ...]]]:
    for i in range(0, len(cases), size):
        yield i, cases[i : i + size]


def _previewer(
    job: Job, pipe: Any, cases: tuple[Case, ...], writes: bool, whole: bool
) -> Callable[[int, torch.Tensor], None] | None:
    """Return a function that decodes the unfinished pictures of a call after every few steps.

    Where it ``writes``, it writes them as one picture. ``whole``: the VAE is a bundle, which may know the pictures of
    a whole call alone.
    """
    target, every = job.targets.preview, job.preview_every
    if target is None or every is None:
        return None

    def show(steps: int, latents: torch.Tensor) -> None:
        if steps % every:
            return
        pixels = decoded(pipe, latents if whole else latents[: len(cases)])[: len(cases)]
        if not writes:
            return
        found = as_pictures(as_bytes(pixels))
        record = {**job.record, "preview": True, "pictures": [_of(c) for c in cases]}
        with contextlib.suppress(Error):  # a full disk must not end the image
            pictures.write_picture(target, pictures.grid_of(found, len(found)), record)

    return show


def _of(case: Case) -> dict[str, Any]:
    return {"prompt": case.prompt, "seed": case.seed}


def _record(job: Job, pipe: Any, case: Case, plan: ExecutionPlan) -> dict[str, Any]:
    scheduler = {"scheduler": type(pipe.scheduler).__name__} if hasattr(pipe, "scheduler") else {}
    options = {k: v for k, v in dataclasses.asdict(plan.options).items() if k in ("dtype", "height", "width")}
    return {**_of(case), **job.record, **scheduler, **{k: v for k, v in options.items() if v is not None}}


def not_finite(tensors: Mapping[str, torch.Tensor | None]) -> dict[str, float]:
    """Return the share of values that are NaN or infinite, for each tensor that has any."""
    shares = {n: 1 - t.isfinite().double().mean().item() for n, t in tensors.items() if t is not None}
    return {name: share for name, share in shares.items() if share > 0}


def _all_exact(drawn: list[Drawn]) -> Iterator[str]:
    if any(d.calls["exact"] and d.calls["exact"] == sum(d.calls.values()) for d in drawn):
        yield (
            "all steps were exact, because an image begins with exact steps and this one had no more: more --steps, or "
            "a lower --warmup-steps at convert, give displaced ones"
        )


def _warnings(drawn: list[Drawn], plan: ExecutionPlan) -> Iterator[str]:
    shares: dict[str, float] = {}
    for d in drawn:
        shares |= {name: max(share, shares.get(name, 0.0)) for name, share in d.not_finite.items()}
    for name, share in shares.items():
        yield (
            f"{share:.1%} of the {name} is NaN or infinite, and black in the image: convert with --dtype float32 or "
            "bfloat16"
        )
    drifts = [d.drift for d in drawn if d.drift is not None]
    warning = drift_warning({"drift": max(drifts, default=None)}, plan.options, plan.report)
    if warning is not None:
        yield warning


def drift_warning(figures: Mapping[str, Any], options: PlanOptions, report: PlanReport) -> str | None:
    """Return a warning where the image may differ from one device's, else None.

    That is so where the image changed faster than the limit during displaced steps, and faster than in the images that
    ``--quality-floor`` measured.
    """
    drift, limit = figures.get("drift"), options.drift_limit
    trials = () if report.quality is None else report.quality.trials
    seen = [t.drift for t in trials if t.good and t.drift is not None]
    if drift is None or limit <= 0:
        return None
    beyond = max([2 * limit, *seen])
    if drift <= beyond:
        return None
    return (
        f"during displaced steps the image changed up to {drift:.1f} times as fast as the sampler moved it "
        f"({beyond:.1f} was expected at most); the steps after that were exact. "
        "Lower --drift-limit or raise --warmup-steps at convert"
    )
