# SPDX-License-Identifier: Apache-2.0
"""What the server, the supervisor and the ranks tell each other, as plain data that both ends check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Format = Literal["png", "jpeg", "webp"]
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class GroupOptions(_Data):
    """How the ranks load a bundle, and that of a VAE: what ``--vae`` says, and for the ranks, what was chosen.

    ``loras`` are the files of the LoRAs that requests may name, with their scales."""

    bundle: Path
    vae: str | None = None
    model: str | None = None
    transport: str = "auto"
    cuda_graph: bool = True
    device: str | None = None
    native_code: bool = True
    timeout: float = 30.0
    extensions: tuple[str, ...] = ()
    loras: dict[str, tuple[Path, float]] = {}
    log_dir: Path | None = None


class Start(_Data):
    """The supervisor's orders. ``address`` is the server's socket; ``secret`` names this start of the group."""

    address: str
    secret: str
    options: GroupOptions


class Facts(_Data):
    """What rank 0 tells of the bundle once it is loaded.

    ``sizes``: width and height in pixels; None where the pipeline has a size of its own alone. ``images``: pictures of
    one drawing. ``guidance``: how the bundle computes guidance, "none", "batch" or "split". ``most_steps``: of the
    scheduler. ``text``: whether a prompt is needed. ``edits`` and ``inpaints``: whether the pipeline has a form that
    starts from a picture, and one that takes a mask. ``previews``: whether latents can be shown between two steps.
    """

    world_size: int = Field(ge=1)
    backend: str
    sizes: tuple[tuple[int, int], ...]
    images: int = Field(ge=1)
    guidance: str
    most_steps: int = Field(ge=1)
    text: bool
    negative: bool
    edits: bool
    inpaints: bool
    previews: bool


class Drawing(_Data):
    """One call of the pipeline. ``image`` and ``mask`` are PNG files in base64. ``previews``: how many."""

    id: str
    prompt: str | None
    negative_prompt: str | None = None
    steps: int = Field(ge=1)
    guidance: float | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 64)]
    size: tuple[int, int]
    image: str | None = None
    mask: str | None = None
    strength: float | None = None
    lora: str | None = None
    previews: int = Field(default=0, ge=0)
    format: Format = "png"
    compression: int = Field(default=100, ge=0, le=100)


class Drawn(_Data):
    """The pictures of a drawing, as files in base64.

    ``seconds`` of the pipeline, and ``encoding`` seconds of the files. ``exact``: steps that were exact.
    ``reused``: None for a bundle without reuse.
    """

    images: tuple[str, ...]
    seconds: float
    encoding: float
    exact: int | None = None
    displaced: int | None = None
    reused: int | None = None
    not_finite: tuple[str, ...] = ()
