# SPDX-License-Identifier: Apache-2.0
"""The calls by which ``--quantise`` chooses layers: those of a pipeline, or of a model alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from districompile.cli.generate import place
from districompile.cli.shapes import Shape
from districompile.models.sources import LoadedModel, import_diffusers
from districompile.plan.options import PlanOptions
from districompile.progress import Progress
from districompile.quality.calibration import Call, at_several_times, like_example, recorded_calls
from districompile.quality.cases import GENERAL, QualityError, demo_prompts, make_cases
from districompile.quality.draw import Setting

_STEPS = 8  # of the sampling that is recorded
_CALLS = 6  # that layers are measured by


@contextlib.contextmanager
def measured_on(loaded: LoadedModel, device: torch.device) -> Iterator[None]:
    """Have the model on ``device`` while its layers are measured: a large one takes hours on a CPU."""
    before = next((p.device for p in loaded.module.parameters()), device)
    loaded.module.to(device)
    try:
        yield
    finally:
        loaded.module.to(before)


def example_on(values: Any, device: torch.device) -> Any:
    """Return the arguments of a call, with its tensors on ``device``."""
    return pytree.tree_map(lambda v: v.to(device) if isinstance(v, torch.Tensor) else v, values)


def calibration_calls(
    loaded: LoadedModel, shape: Shape, cfg: str | None, progress: Progress, timestep: str | None = None
) -> list[Call]:
    """Return calls of ``loaded`` in ``shape``: of a few images drawn with its pipeline, where it has one that fits.

    Otherwise they are the example at several timesteps.
    """
    example = shape.example(loaded, cfg)
    device = next((p.device for p in loaded.module.parameters()), torch.device("cpu"))
    own = example_on((tuple(example.args), dict(example.kwargs)), device)
    if loaded.pipeline_loader is not None and not shape.inputs:
        found = like_example(loaded.module, own, _of_pipeline(loaded, shape, cfg, progress))
        if found:
            return found
    return at_several_times(loaded.module, own, timestep)


def _of_pipeline(loaded: LoadedModel, shape: Shape, cfg: str | None, progress: Progress) -> list[Call]:
    """Return calls of a pipeline; none where it refuses to draw without more inputs than prompts."""
    import_diffusers()
    assert loaded.pipeline_loader is not None
    pipe: Any = loaded.pipeline_loader()
    place(pipe, next((p.device for p in loaded.module.parameters()), torch.device("cpu")))
    height, width = loaded.default_size or (None, None)
    options = PlanOptions(
        images=shape.batch, guidance="none" if cfg == "none" else "batch", height=shape.height or height,
        width=shape.width or width,
    )  # fmt: skip
    prompts = demo_prompts(2) if loaded.source == "demo" else GENERAL[:2]
    cases = make_cases(list(prompts), [0])
    setting = Setting(_STEPS, None, options)
    with progress.task("drawing for the choice of bits", _STEPS * len(cases)) as task, torch.no_grad():
        try:
            return recorded_calls(pipe, loaded.module, cases, setting, _CALLS, task)
        except QualityError:
            return []
