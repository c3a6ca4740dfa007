"""Test a pipeline that draws from image embeddings: its folder converts, and the bundle draws in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers_pipelines import write_pipeline
from pipeline_kinds import KINDS, tensor_of
from pipeline_parts import noise

import districompile as dc
from districompile.cli.common import UsageError
from districompile.cli.generate import Request, draw
from districompile.cli.main import main
from districompile.errors import BundleError, InputError


def test_kandinsky_folder(tmp_path: Path) -> None:
    pipe, _ = KINDS["kandinsky_2_2"].make()
    pipe.save_pretrained(tmp_path / "model")
    given = {
        "image_embeds": noise(1, 1, 20), "negative_image_embeds": noise(2, 1, 20), "height": 16, "width": 16,
        "num_inference_steps": 2, "latents": noise(3, 1, 4, 8, 8), "output_type": "pt",
    }  # fmt: skip
    want = tensor_of(pipe(**given))
    out = tmp_path / "bundle"
    size = ["--height", "16", "--width", "16"]
    assert (
        main(["convert", str(tmp_path / "model"), *size, "--gpus", "2", "--backend", "eager", "--out", str(out)]) == 0
    )
    compiled = dc.load_pipeline(out, lockstep=True)
    compiled.unet.phase = "exact"
    compiled.set_progress_bar_config(disable=True)
    assert (tensor_of(compiled(**given)) - want).abs().max() <= 1e-4 * want.abs().max()
    request = Request(None, None, 2, None, 0, compiled.unet.plan.options)
    with pytest.raises(UsageError, match="KandinskyV22Pipeline needs image_embeds, negative_image_embeds, which this"):
        draw(compiled, request)


def test_a_bundle_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="none"):
        dc.load_pipeline(tmp_path / "none", lockstep=True)


@pytest.mark.slow
def test_guidance_that_stops_midway(tmp_path: Path) -> None:
    """The call without guidance is another shape, which the message and ``shapes="auto"`` know."""
    model = write_pipeline(tmp_path / "model")

    def stop(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 0.0
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[1]
        return values

    def draw(pipe: Any) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        tensors = ["latents", "prompt_embeds"]
        return tensor_of(
            pipe(
                "a", num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="latent",
                callback_on_step_end=stop, callback_on_step_end_tensor_inputs=tensors,
            )
        )  # fmt: skip

    want = draw(diffusers.DiffusionPipeline.from_pretrained(model, dtype=torch.float32))
    out = tmp_path / "bundle"
    assert main(["convert", str(model), "--gpus", "2", "--backend", "eager", "--cfg", "batch", "--out", str(out)]) == 0
    with pytest.raises(InputError, match="a call without its guidance half: load the bundle with shapes='auto'"):
        draw(dc.load_pipeline(out, lockstep=True))
    pipe = dc.load_pipeline(out, lockstep=True, shapes="auto")
    pipe.unet.phase = "exact"
    assert (draw(pipe) - want).abs().max() <= 1e-4 * want.abs().max()
    assert len(pipe.unet.shapes) == 2
