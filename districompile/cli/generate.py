# SPDX-License-Identifier: Apache-2.0
"""Generate images with a diffusers pipeline whose network may be a compiled program, on one rank or on several."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from districompile.cli import pictures
from districompile.cli.checks import LARGEST_SEED
from districompile.cli.common import UsageError
from districompile.models.sources import network_name
from districompile.plan.options import PlanOptions
from districompile.progress import Progress, tasks
from districompile.quality.cases import Case
from districompile.runtime.module import image

if TYPE_CHECKING:
    from PIL.Image import Image

GUIDED = ("batch", "split")


@dataclasses.dataclass(frozen=True)
class Request:
    """A request for the images of one call.

    ``guidance`` None is the pipeline's own scale; ``options`` are those of the plan, which fix the number of images.
    ``cases`` are the prompts and seeds of the images; None: ``prompt`` alone, and the seeds from ``seed`` on. Each
    image has a random generator of its own. ``start`` and ``mask`` are the pictures to start from, of the size that
    :func:`start_size` gives.
    """

    prompt: str | None
    negative_prompt: str | None
    steps: int
    guidance: float | None
    seed: int
    options: PlanOptions
    cases: tuple[Case, ...] | None = None
    start: Image | None = None
    mask: Image | None = None
    strength: float | None = None

    @property
    def images(self) -> tuple[Case, ...]:
        """Prompt and seed of each image of the call."""
        if self.cases is not None:
            return self.cases
        seeds = ((self.seed + i) % (LARGEST_SEED + 1) for i in range(self.options.images))
        return tuple(Case(self.prompt, seed) for seed in seeds)


@dataclasses.dataclass(frozen=True)
class Picture:
    """``pixels`` (B, 3, H, W) in 0..1 as float32, where they were decoded, or None where only latents were asked for;
    ``latents`` after the last step, or None where the pipeline does not show them; ``calls`` of the network and the
    ``seconds`` they took together with the sampler."""

    pixels: Tensor | None
    latents: Tensor | None
    calls: int
    seconds: float


def check_guidance(options: PlanOptions, guidance: float | None, *, is_input: bool = False) -> None:
    """Raise :class:`UsageError` for a guidance scale that the bundle was not compiled for.

    ``is_input``: the network takes the scale as an input, so that any will do.
    """
    mode = options.guidance or "none"
    if guidance is None or is_input:
        return
    if mode in GUIDED and guidance <= 1:
        raise UsageError(f"the bundle was made with --cfg {mode}: --guidance must be above 1, not {guidance:g}")
    if mode not in GUIDED and guidance > 1:
        raise UsageError(
            "the bundle was made with --cfg none: --guidance above 1 needs --cfg batch or split at convert"
        )


def parameters_of(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a pipeline's call."""
    return inspect.signature(pipe.__call__).parameters


def control_nets(pipe: Any) -> int:
    """Return the number of ControlNets of a pipeline."""
    net = getattr(pipe, "controlnet", None)
    return 0 if net is None else len(getattr(net, "nets", (net,)))


def starts_from_image(pipe: Any) -> bool:
    """Return whether a pipeline starts from a picture. The only picture of some is that of their ControlNet."""
    accepted = parameters_of(pipe)
    return "image" in accepted and (not control_nets(pipe) or "control_image" in accepted)


def control_arguments(pipe: Any, images: Sequence[Any], scales: Sequence[float]) -> dict[str, Any]:
    """Return the arguments of a pipeline's call for the pictures of its ControlNets, and their scales."""
    if not images:
        return {}
    name = "control_image" if "control_image" in parameters_of(pipe) else "image"
    several = len(images) > 1
    return {
        name: list(images) if several else images[0],
        "controlnet_conditioning_scale": list(scales) if several else scales[0],
    }


def with_start(pipe: Any, image: bool, mask: bool) -> Any:
    """Return the form of a pipeline that starts from an image, or from an image and a mask.

    The parts are shared. Raises :class:`UsageError` where there is no such form.
    """
    from districompile.models.sources import import_diffusers

    name, accepted = type(pipe).__name__, parameters_of(pipe)
    form = pipe
    if mask and "mask_image" not in accepted:
        form = _form(import_diffusers().AutoPipelineForInpainting, pipe, "--mask")
    elif image and not starts_from_image(pipe):
        form = _form(import_diffusers().AutoPipelineForImage2Image, pipe, "--image")
    found = parameters_of(form)
    if starts_from_image(form) and not image:
        raise UsageError(f"--image is needed: the pipeline {name} starts from a picture")
    if "mask_image" in found and not mask:
        raise UsageError(f"--mask is needed: the pipeline {name} draws a part of a picture anew")
    return form


def _form(auto: Any, pipe: Any, option: str) -> Any:
    try:
        return auto.from_pipe(pipe)
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UsageError(f"{option}: diffusers has no such form of the pipeline {type(pipe).__name__}") from e


def start_size(pipe: Any, options: PlanOptions) -> tuple[int, int] | None:
    """Return the width and height of the picture to start from; None where the plan does not say.

    An upscaler's UNet reads the small picture beside the latents, so that both have one size.
    """
    if options.height is None or options.width is None:
        return None
    channels = getattr(getattr(getattr(pipe, network_name(pipe)), "config", None), "in_channels", None)
    latent = getattr(getattr(getattr(pipe, "vae", None), "config", None), "latent_channels", None)
    factor = int(getattr(pipe, "vae_scale_factor", 1))
    small = isinstance(channels, int) and isinstance(latent, int) and channels - latent == 3
    return (options.width // factor, options.height // factor) if small else (options.width, options.height)


def place(pipe: Any, device: torch.device) -> None:
    """Move the other networks of a pipeline, such as text encoders, to the device of the compiled one."""
    for name, part in pipe.components.items():
        if name != network_name(pipe) and isinstance(part, nn.Module):
            part.to(device)


def draw(
    pipe: Any, request: Request, progress: Progress | None = None, decode: bool = True, *,
    title: str = "", extra: Mapping[str, Any] | None = None, on_step: Callable[[int, Tensor], None] | None = None,
) -> Picture:  # fmt: skip
    """Run the pipeline once, with its scheduler: one image, or one batch of them. ``title`` begins the progress line.

    ``extra`` are more arguments of the pipeline. ``on_step`` is called after each step with the number of steps done
    and the latents.

    Raises :class:`UsageError` where the pipeline refuses the request.
    """
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    latents: list[Tensor] = []

    def keep_latents(_pipe: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents[:] = [values["latents"].detach().clone()]
        if on_step is not None:
            on_step(step + 1, latents[0])
        return values

    given = _arguments(pipe, request, decode, {"callback_on_step_end": keep_latents, **(extra or {})})
    network = getattr(pipe, network_name(pipe))
    total = request.steps if "strength" not in given else max(1, int(request.steps * given["strength"]))
    calls = 0
    started = time.perf_counter()
    with tasks(progress).task("sampling", total) as task:

        def count(*_: Any) -> None:
            nonlocal calls, started
            if not calls:
                started = time.perf_counter()
            calls += 1
            counts = getattr(network, "image_calls", None)  # not of the original
            phase = "" if counts is None else f", {counts['exact']} exact"
            phase += f", {counts['reused']} reused" if counts is not None and "reused" in counts else ""
            rate = (calls - 1) / max(time.perf_counter() - started, 1e-9)
            task.advance()
            task.describe(f"{title}step {calls}/{total}{phase}" + (f", {rate:.2f} it/s" if calls > 1 else ""))

        hook: Callable[[], None] = network.register_forward_hook(count).remove
        begin = time.perf_counter()
        try:
            with (
                torch.no_grad(),
                image(network),
            ):  # inference tensors have no version, so each step would compare values
                result = pipe(**given)
        except (ValueError, TypeError, IndexError) as e:
            raise UsageError(f"the pipeline {type(pipe).__name__} refused: {e}") from e
        finally:
            hook()
    seconds = time.perf_counter() - begin
    return Picture(_pixels(result) if decode else None, latents[0] if latents else None, calls, seconds)


def _arguments(pipe: Any, request: Request, decode: bool, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the pipeline's call: of what is offered, what it accepts."""
    options, cases = request.options, request.images
    # Some distilled networks take the scale as an input: it needs no second half of the batch
    network = getattr(pipe, network_name(pipe))
    scaled = options.guidance in GUIDED or getattr(network, "config", {}).get("guidance_embeds")
    count = len(cases)
    same = len({c.prompt for c in cases}) == 1
    generators = [torch.Generator("cpu").manual_seed(c.seed) for c in cases]
    negative = request.negative_prompt
    offered = {
        "prompt": cases[0].prompt if same else [c.prompt for c in cases],
        "negative_prompt": negative if same or negative is None else [negative] * count,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance if scaled else 1.0,
        "height": options.height,
        "width": options.width,
        "num_images_per_prompt": count if same else 1,
        "batch_size": count,
        "generator": generators if count > 1 else generators[0],
        "output_type": "pt" if decode else "latent",
        "image": request.start,
        "mask_image": request.mask,
        "strength": request.strength,
        **extra,
    }
    accepted = parameters_of(pipe)
    lacking = [n for n, p in accepted.items() if n not in ("self", *offered) and p.default is p.empty and _is_named(p)]
    if lacking:
        raise UsageError(
            f"{type(pipe).__name__} needs {', '.join(lacking)}, which this command does not make: load the pipeline in "
            "Python with districompile.load_pipeline, and pass them"
        )
    return {name: value for name, value in offered.items() if name in accepted and value is not None}


def _is_named(parameter: inspect.Parameter) -> bool:
    return parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)


def can_preview(pipe: Any) -> bool:
    """Return whether :func:`decoded` can show the latents that a pipeline gives after each step."""
    if "callback_on_step_end" not in parameters_of(pipe):
        return False
    vae = getattr(pipe, "vae", None)
    return vae is not None and hasattr(vae, "decode") and getattr(vae.config, "scaling_factor", None) is not None


def decoded(pipe: Any, latents: Tensor) -> Tensor:
    """Decode latents (B, C, h, w) as the pipeline does. Return pixels (B, 3, H, W) in 0..1, float32 on the CPU."""
    vae = pipe.vae
    config = vae.config
    scaled = latents / getattr(config, "scaling_factor", 1.0)
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        shape = (1, -1, *[1] * (latents.ndim - 2))
        scaled = scaled * scaled.new_tensor(std).view(shape) + scaled.new_tensor(mean).view(shape)
    scaled = scaled + (getattr(config, "shift_factor", None) or 0.0)
    dtype = next(vae.parameters()).dtype
    raised = dtype == torch.float16 and bool(getattr(config, "force_upcast", False))
    if raised:
        vae.to(torch.float32)
    try:
        with torch.no_grad():
            pixels: Tensor = vae.decode(scaled.to(torch.float32 if raised else dtype), return_dict=False)[0]
    finally:
        if raised:
            vae.to(dtype)
    return (pixels.detach().float().cpu() / 2 + 0.5).clamp(0, 1)


def _pixels(result: Any) -> Tensor:
    """Return the images, or the frames, of a pipeline's output as float32: (B, 3, H, W), or (B, F, 3, H, W).

    They stay where they are. Arrays of pipelines have the colours last."""
    found = getattr(result, "images", None)
    found = getattr(result, "frames", None) if found is None else found
    if isinstance(found, list) and found and isinstance(found[0], Tensor):
        found = torch.stack(found)
    if isinstance(found, Tensor):
        return found.detach().float()
    return torch.as_tensor(found).float().movedim(-1, -3)


def as_bytes(pixels: Tensor) -> Tensor:
    """Convert images (B, 3, H, W) with values in 0..1 to 8 bits (B, H, W, 3) on the CPU.

    A GPU does it before they are copied. NaN and infinite values become black. Raises :class:`UsageError` for videos.
    """
    if pixels.ndim != 4:
        raise UsageError("the pipeline draws videos, and run writes pictures: call the pipeline from Python")
    values = (pixels.nan_to_num(0.0, 0.0, 0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    return values.permute(0, 2, 3, 1).contiguous().cpu()


def as_pictures(images: Tensor) -> list[Image]:
    """Convert images in 8 bits (B, H, W, 3) to pictures (:func:`as_bytes`)."""
    from PIL import Image

    return [Image.fromarray(values.squeeze()) for values in images.numpy()]


def save_images(images: Tensor, paths: Sequence[Path], records: Sequence[Mapping[str, Any]]) -> list[Image]:
    """Write images in 8 bits (B, H, W, 3) to ``paths``, each atomically and with its record. Return the pictures."""
    made = as_pictures(images)
    for picture, path, record in zip(made, paths, records, strict=True):
        pictures.write_picture(path, picture, record)
    return made
