"""Drawing several pictures with a diffusers pipeline whose UNet is the original, or a compiled program."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from districompile.progress import Task
from districompile.quality.cases import Case, QualityError


@dataclasses.dataclass(frozen=True)
class Setting:
    """How pictures are drawn. ``guidance`` None is the pipeline's own scale; ``options`` are the plan's: size, guidance
    mode, images of one call."""

    steps: int
    guidance: float | None
    options: Mapping[str, Any]

    @property
    def images(self) -> int:
        """Pictures of one call."""
        return int(self.options.get("images", 1))


@dataclasses.dataclass(frozen=True)
class Drawn:
    """``pixels`` (B, 3, H, W) in 0 to 1; ``latents`` after each step, (steps, B, ...), or None where the pipeline does
    not show them; ``exact``: how many calls of each picture were exact, or None for the
    original; ``rates``: the largest drift of the others."""

    pixels: Tensor
    latents: Tensor | None
    exact: tuple[int, ...] | None = None
    rates: tuple[float | None, ...] | None = None


def draw(pipe: Any, unet: Any, cases: Sequence[Case], setting: Setting, task: Task) -> Drawn:
    """Draw ``cases``, as many in one call as ``setting.images``. Each picture has a generator of its own, so that it
    does not depend on the others.

    Raises :class:`QualityError` where the pipeline refuses a case, or gives no pictures.
    """
    lots = [cases[i : i + setting.images] for i in range(0, len(cases), setting.images)]
    pixels: list[Tensor] = []
    latents: list[Tensor] = []
    exact: list[int] = []
    rates: list[float | None] = []
    for lot in lots:
        full = [*lot, *[lot[-1]] * (setting.images - len(lot))]  # a call has one size
        drawn = _lot(pipe, unet, full, setting, task)
        pixels.append(drawn.pixels[: len(lot)])
        if drawn.latents is not None:
            latents.append(drawn.latents[:, : len(lot)])
        calls = getattr(unet, "image_calls", None)
        if calls is not None:
            exact += [int(calls["exact"])] * len(lot)
            rates += [unet.image_drift] * len(lot)
    whole = torch.cat(latents, 1) if len(latents) == len(lots) else None
    return Drawn(torch.cat(pixels), whole, tuple(exact) or None, tuple(rates) or None)


def _lot(pipe: Any, unet: Any, lot: Sequence[Case], setting: Setting, task: Task) -> Drawn:
    pipe.unet = unet
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    if hasattr(unet, "reset"):
        unet.reset()
    latents: list[Tensor] = []

    def keep(_pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents.append(values["latents"].detach().float().cpu())
        task.advance()
        return values

    options = setting.options
    prompts = [c.prompt for c in lot]
    offered = {
        "prompt": None if None in prompts else prompts,
        "num_inference_steps": setting.steps,
        "guidance_scale": setting.guidance if options.get("guidance") in ("batch", "split") else 1.0,
        "height": options.get("height"),
        "width": options.get("width"),
        "batch_size": len(lot),
        "generator": [torch.Generator("cpu").manual_seed(c.seed) for c in lot],
        "output_type": "pt",
        "callback_on_step_end": keep,
    }
    accepted = inspect.signature(pipe.__call__).parameters
    given = {name: value for name, value in offered.items() if name in accepted and value is not None}
    if "callback_on_step_end" not in accepted:
        task.advance(setting.steps)
    try:
        with torch.no_grad():  # inference tensors would be compared by value at each step
            images = pipe(**given).images
    except (ValueError, TypeError) as e:
        raise QualityError(f"the pipeline {type(pipe).__name__} refused {lot[0]}: {e}") from e
    if not isinstance(images, Tensor):  # arrays (B, H, W, 3), of pipelines without tensor output
        images = torch.as_tensor(images).permute(0, 3, 1, 2)
    return Drawn(images.detach().float().cpu(), torch.stack(latents) if latents else None)
