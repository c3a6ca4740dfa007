"""Test a bundle of a UNet with an image prompt adapter in its pipeline, which asks the UNet for the adapter's parts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import pipeline_attached
import pipeline_kinds
from pipeline_parts import noise, picture, text

import districompile as dc
from districompile.errors import UnsupportedError

assert pipeline_attached


def test_a_pipeline_encodes_its_picture(tmp_path: Path) -> None:
    from diffusers.models.embeddings import ImageProjection
    from PIL import Image

    pipe, _ = pipeline_kinds.KINDS["ip_adapter"].make()
    prompt = Image.fromarray((picture(1)[0].permute(1, 2, 0) * 255).byte().numpy())

    def draw() -> torch.Tensor:
        g = torch.Generator().manual_seed(0)
        given = {"ip_adapter_image": prompt, "height": 16, "width": 16, **text()}
        return pipe(num_inference_steps=2, generator=g, output_type="latent", **given).images  # type: ignore[no-any-return]

    want = draw()
    kwargs = {
        "sample": noise(0, 2, 4, 8, 8), "timestep": torch.tensor(1.0), "encoder_hidden_states": noise(1, 2, 7, 24),
        "added_cond_kwargs": {"image_embeds": [noise(2, 2, 1, 24)]},
    }  # fmt: skip
    dc.convert(pipe.unet, kwargs=kwargs, ranks=2).save(tmp_path / "bundle", "eager")
    pipe.unet = dc.load(tmp_path / "bundle", lockstep=True)
    assert isinstance(pipe.unet.encoder_hid_proj.image_projection_layers[0], ImageProjection)
    assert (draw() - want).abs().max() <= 1e-4 * want.abs().max()
    with pytest.raises(UnsupportedError, match="processor.scale is not part of a converted module"):
        pipe.set_ip_adapter_scale(0.3)
