# SPDX-License-Identifier: Apache-2.0
"""Draw pictures with a diffusers pipeline, whose UNet is the original or a compiled program."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from districompile.models.sources import network_name
from districompile.plan.options import PlanOptions
from districompile.progress import Task
from districompile.quality.cases import Case, QualityError


@dataclasses.dataclass(frozen=True)
class Setting:
    """How pictures are drawn.

    ``guidance``: the scale, None for the pipeline's default. ``options``: the plan's size, guidance mode and images a
    call.
    """

    steps: int
    guidance: float | None
    options: PlanOptions

    @property
    def images(self) -> int:
        """The number of pictures of one call."""
        return self.options.images


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Pictures, and how they came about.

    ``pixels``: (B, 3, H, W) in 0 to 1. ``latents``: after each step, (steps, B, ...); None where the pipeline does not
    show them. ``exact``: the number of exact calls of each picture; None for the original. ``rates``: the largest rate
    of each picture's displaced calls (:mod:`districompile.runtime.calls.drift`).
    """

    pixels: Tensor
    latents: Tensor | None
    exact: tuple[int, ...] | None = None
    rates: tuple[float | None, ...] | None = None


def draw(pipe: Any, unet: Any, cases: Sequence[Case], setting: Setting, task: Task) -> Drawn:
    """Draw ``cases``, ``setting.images`` of them in one call.

    Each picture has a random generator of its own, so that it does not depend on the others.

    Raises :class:`QualityError` where the pipeline refuses a case.
    """
    batches = [cases[i : i + setting.images] for i in range(0, len(cases), setting.images)]
    pixels: list[Tensor] = []
    latents: list[Tensor] = []
    exact: list[int] = []
    rates: list[float | None] = []
    for batch in batches:
        full = [*batch, *[batch[-1]] * (setting.images - len(batch))]  # the batch size of a call is fixed
        drawn = _draw_batch(pipe, unet, full, setting, task)
        pixels.append(drawn.pixels[: len(batch)])
        if drawn.latents is not None:
            latents.append(drawn.latents[:, : len(batch)])
        calls = getattr(unet, "image_calls", None)
        if calls is not None:
            exact += [int(calls["exact"])] * len(batch)
            rates += [unet.image_drift] * len(batch)
    whole = torch.cat(latents, 1) if len(latents) == len(batches) else None
    return Drawn(torch.cat(pixels), whole, tuple(exact) or None, tuple(rates) or None)


def _draw_batch(pipe: Any, unet: Any, batch: Sequence[Case], setting: Setting, task: Task) -> Drawn:
    """Draw the pictures of one call."""
    setattr(pipe, network_name(pipe), unet)
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
    prompts = [c.prompt for c in batch]
    offered = {
        "prompt": None if None in prompts else prompts,
        "num_inference_steps": setting.steps,
        "guidance_scale": setting.guidance if options.guidance in ("batch", "split") else 1.0,
        "height": options.height,
        "width": options.width,
        "batch_size": len(batch),
        "generator": [torch.Generator("cpu").manual_seed(c.seed) for c in batch],
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
        raise QualityError(f"the pipeline {type(pipe).__name__} refused {batch[0]}: {e}") from e
    if not isinstance(images, Tensor):  # arrays (B, H, W, 3), of pipelines without tensor output
        images = torch.as_tensor(images).permute(0, 3, 1, 2)
    return Drawn(images.detach().float().cpu(), torch.stack(latents) if latents else None)
