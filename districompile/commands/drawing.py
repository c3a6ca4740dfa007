"""Drawing with a diffusers pipeline whose UNet is a compiled program: in one process, or as one rank of several."""

from __future__ import annotations

import dataclasses
import inspect
import io
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from districompile.commands.common import UsageError
from districompile.outputs import write_file
from districompile.progress import Progress, tasks
from districompile.runtime.module import image

GUIDED = ("batch", "split")


@dataclasses.dataclass(frozen=True)
class Request:
    """What to draw. ``guidance`` None is the pipeline's own scale; ``options`` are the plan's, made by ``convert``."""

    prompt: str | None
    negative_prompt: str | None
    steps: int
    guidance: float | None
    seed: int
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Picture:
    """``pixels`` (B, 3, H, W) in 0..1, or None where only latents were asked for; ``latents`` after the last step, or
    None where the pipeline does not show them; ``calls`` of the UNet and the ``seconds`` they took together with the
    sampler."""

    pixels: Tensor | None
    latents: Tensor | None
    calls: int
    seconds: float


def check_guidance(options: Mapping[str, Any], guidance: float | None) -> None:
    """Refuse a guidance scale that the bundle's batch was not compiled for."""
    mode = options.get("guidance", "none")
    if guidance is None:
        return
    if mode in GUIDED and guidance <= 1:
        raise UsageError(f"the bundle was made with --cfg {mode}: --guidance must be above 1, not {guidance:g}")
    if mode not in GUIDED and guidance > 1:
        raise UsageError(
            "the bundle was made with --cfg none: --guidance above 1 needs --cfg batch or split at convert"
        )


def place(pipe: Any, device: torch.device) -> None:
    """Move what computes around the UNet, text encoders and the like, to where the UNet is."""
    for name, part in pipe.components.items():
        if name != "unet" and isinstance(part, nn.Module):
            part.to(device)


def draw(pipe: Any, request: Request, progress: Progress | None = None, decode: bool = True) -> Picture:
    """Run the pipeline once, with its own scheduler: one image, or one batch of them.

    Raises :class:`UsageError` where the pipeline refuses the request.
    """
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    latents: list[Tensor] = []

    def keep_latents(_pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents[:] = [values["latents"].detach().clone()]
        return values

    options = request.options
    guidance = request.guidance if options.get("guidance") in GUIDED else 1.0
    images = int(options.get("images", 1))
    offered = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "num_inference_steps": request.steps,
        "guidance_scale": guidance,
        "height": options.get("height"),
        "width": options.get("width"),
        "num_images_per_prompt": images,
        "batch_size": images,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        "output_type": "pt" if decode else "latent",
        "callback_on_step_end": keep_latents,
    }
    accepted = inspect.signature(pipe.__call__).parameters
    given = {name: value for name, value in offered.items() if name in accepted and value is not None}
    calls = 0
    started = time.perf_counter()
    with tasks(progress).task("sampling", request.steps) as task:

        def count(*_: Any) -> None:
            nonlocal calls, started
            if not calls:
                started = time.perf_counter()
            calls += 1
            counts = getattr(pipe.unet, "image_calls", None)  # not of the original
            phase = "" if counts is None else f", {counts['exact']} exact"
            rate = (calls - 1) / max(time.perf_counter() - started, 1e-9)
            task.advance()
            task.describe(f"step {calls}/{request.steps}{phase}" + (f", {rate:.2f} it/s" if calls > 1 else ""))

        hook: Callable[[], None] = pipe.unet.register_forward_hook(count).remove
        begin = time.perf_counter()
        try:
            with torch.no_grad(), image(pipe.unet):  # inference tensors would be compared by value at each step
                result = pipe(**given)
        except (ValueError, TypeError, IndexError) as e:
            raise UsageError(f"the pipeline {type(pipe).__name__} refused: {e}") from e
        finally:
            hook()
    seconds = time.perf_counter() - begin
    return Picture(_pixels(result.images) if decode else None, latents[0] if latents else None, calls, seconds)


def _pixels(images: Any) -> Tensor:
    """Tensors as they are; arrays (B, H, W, 3), which pipelines without tensor output give, to (B, 3, H, W)."""
    if isinstance(images, Tensor):
        return images.detach().float().cpu()
    if isinstance(images, list) and images and isinstance(images[0], Tensor):
        return torch.stack(images).detach().float().cpu()
    return torch.as_tensor(images).float().permute(0, 3, 1, 2)


def image_format(path: Path) -> str:
    """Pillow's name of the format that ``path`` ends in; :class:`UsageError` for an ending it cannot write."""
    try:
        from PIL import Image
    except ImportError as e:
        raise UsageError("writing images needs Pillow: pip install 'districompile[diffusers]'") from e
    known = Image.registered_extensions()
    name = known.get(path.suffix.lower())
    if name is None or name not in Image.SAVE:
        raise UsageError(
            f"--out {path}: the ending {path.suffix or '(none)'!r} is no image format; use .png, .jpg or .webp"
        )
    return name


def save_images(pixels: Tensor, path: Path) -> list[Path]:
    """Write (B, 3, H, W) in 0..1 to ``path``, and to ``NAME-1``, ``NAME-2``, ... for further images. What is NaN or
    infinite becomes black.

    Each file appears whole or not at all: it is written beside its place and renamed.
    """
    from PIL import Image

    kind = image_format(path)
    written = []
    array = (pixels.nan_to_num(0.0, 0.0, 0.0).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for i, values in enumerate(array):
        target = path if i == 0 else path.with_name(f"{path.stem}-{i}{path.suffix}")
        data = io.BytesIO()
        Image.fromarray(values.squeeze()).save(data, format=kind)
        write_file(target, data.getvalue())
        written.append(target)
    return written
