# SPDX-License-Identifier: Apache-2.0
"""Shapes on the command line: ``--size``, ``--batch``, ``--tokens``, ``--input``, and the examples that they make."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence

from districompile.bundle.bundle import Bundle
from districompile.cli import convert
from districompile.cli.checks import parse_size
from districompile.cli.common import UsageError
from districompile.cli.examples import resized
from districompile.models.inputs import Example
from districompile.models.sources import LoadedModel
from districompile.plan.plan import ExecutionPlan
from districompile.plan.shapes import find_shape

_MOST = 64  # shapes of one conversion
Sizes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Shape:
    """One shape to convert for. None: the model's own. ``inputs`` are shapes of a plain module's inputs, by path."""

    height: int | None = None
    width: int | None = None
    batch: int = 1
    tokens: int | None = None
    inputs: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def example(self, loaded: LoadedModel, cfg: str | None, seed: int = 0) -> Example:
        """Return inputs of ``loaded`` in this shape."""
        example = loaded.example(self.height, self.width, self.batch, cfg, seed, self.tokens)
        return resized(loaded.module, example, dict(self.inputs), seed) if self.inputs else example


def shapes_of(settings: convert.Settings) -> list[Shape]:
    """Return the shapes that the options of ``convert`` ask for, the first one first.

    Raises :class:`UsageError` for a text that is no shape, and for options that contradict each other.
    """
    if settings.size and (settings.height is not None or settings.width is not None):
        raise UsageError("--size gives height and width: leave --height and --width out")
    batches, tokens = _numbers(settings.batch), _numbers(settings.tokens or "")
    inputs = [_inputs(text) for text in settings.input]
    if inputs and (settings.size or settings.height or settings.width or settings.tokens or batches != [1]):
        raise UsageError("--input gives the shapes of a plain module: leave --size, --batch and --tokens out")
    if inputs:
        found = [Shape(inputs=shape) for shape in inputs]
    else:
        sizes: list[tuple[int | None, int | None]] = [(settings.width, settings.height)]
        counts: list[int | None] = [*tokens]
        every = itertools.product([parse_size(t) for t in settings.size] or sizes, batches, counts or [None])
        found = [Shape(height, width, batch, count) for (width, height), batch, count in every]
    found = list(dict.fromkeys(found))
    if len(found) > _MOST:
        raise UsageError(f"{len(found)} shapes in one conversion: ask for at most {_MOST}, and add the others later")
    return found


def _numbers(text: str) -> list[int]:
    """Read ``"1,2"``, which was checked (:func:`districompile.cli.checks.numbers`)."""
    return [int(part) for part in text.split(",") if part.strip()]


def _inputs(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Read ``"sample=1x4x48x32,context=1x77x64"``."""
    found: dict[str, tuple[int, ...]] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([^=\s]+)=(\d{1,8}(?:x\d{1,8})*)\s*", part)
        if match is None or match[1] in found or not all(map(int, match[2].split("x"))):
            raise UsageError(f"--input {text}: give names and shapes, as sample=1x4x48x32,context=1x77x64")
        found[match[1]] = tuple(map(int, match[2].split("x")))
    return tuple(found.items())


def at_shape(bundle: Bundle, shape: str | None) -> Bundle:
    """Return the bundle with one shape alone: that of ``--shape``, or its first one. Raises :class:`InputError`."""
    name = next(iter(bundle.plans)) if shape is None else find_shape(bundle.plans, shape)
    return Bundle(bundle.path, bundle.manifest, {name: bundle.plans[name]})


def of_size(plans: Mapping[str, ExecutionPlan], width: int | None, height: int | None) -> list[str]:
    """Return the shapes of a size in pixels with the fewest images: they differ in the length of the text.

    A call has the one that its text fits.
    """
    found = {n: p.options.images for n, p in plans.items() if (p.options.width, p.options.height) == (width, height)}
    return [name for name, images in found.items() if images == min(found.values())]


def unexpected_options(settings: convert.Settings) -> Sequence[str]:
    """Return the options that have no meaning with ``--add``, because those of the bundle hold."""
    fields = ("dtype", "gpus", "cfg", "segments", "groupnorm", "displace", "warmup_steps", "drift_limit", "quantise",
              "reuse", "transfer_bits", "timestep", "optimise", "backend", "collectives", "quality_floor", "out",
              "stop_after", "config", "variant")  # fmt: skip
    return ["--" + f.replace("_", "-") for f in fields if getattr(settings, f) is not None]
