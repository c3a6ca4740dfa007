# SPDX-License-Identifier: Apache-2.0
"""Choose the pictures to draw: prompts times seeds."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

from districompile.errors import Error

GENERAL = (
    "a photograph of a red fox in fresh snow",
    "a bowl of oranges on a wooden table, soft morning light",
    "a portrait of an old fisherman, oil painting",
    "a city street at night in the rain, neon signs",
    "a small house beside a lake, mountains in the background",
    "a bicycle leaning against a yellow wall",
    "an astronaut riding a horse on the moon",
    "a plate of pasta with basil, seen from above",
)


class QualityError(Error):
    """A picture cannot be drawn or compared: a prompts file, a mode or a model does not fit."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One picture: ``prompt`` (None for a model without text) and the ``seed`` of its first latents."""

    prompt: str | None
    seed: int

    def __str__(self) -> str:
        return f"seed {self.seed}" if self.prompt is None else f"{self.prompt!r}, seed {self.seed}"


def read_prompts(path: Path) -> list[str]:
    """Read the prompts of a UTF-8 text file, one a line. Empty lines and lines that begin with ``#`` are ignored.

    Raises :class:`QualityError` where the file cannot be read or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise QualityError(f"--prompts {path} cannot be read: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise QualityError(f"--prompts {path} is not UTF-8 text: {e.reason} at byte {e.start}") from e
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise QualityError(f"--prompts {path} holds no prompt: write one a line")
    return prompts


def demo_prompts(count: int) -> list[str]:
    """Make ``count`` prompts of the demo model's grammar. A longer list begins with a shorter one."""
    from districompile.models import scenes

    generator = random.Random(0)
    prompts = [
        "a red circle above a blue square at sunset",
        "a green star left of a yellow circle at night",
        "a blue square right of a red star in the rain",
    ]
    while len(prompts) < count:
        prompts.append(scenes.random_scene(generator).caption())
    return prompts[:count]


def make_cases(prompts: Sequence[str | None], seeds: Sequence[int]) -> list[Case]:
    """Combine every prompt with every seed, seed by seed."""
    return [Case(p, s) for s in seeds for p in prompts]
