"""What a resident rank does around a drawing: when previews are shown, what they show, and the files it makes."""

from __future__ import annotations

import base64
import inspect
import io
import types
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers_bundles import make
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import districompile as dc
from districompile.cli.generate import as_bytes, decoded
from districompile.serve.session import _decodes_together, _estimates, encoded, preview_at


@given(st.integers(1, 60), st.integers(0, 3))
def test_previews_are_numbered_in_order_and_come_before_the_end(total: int, count: int) -> None:
    found = [number for done in range(1, total + 1) if (number := preview_at(done, total, count)) is not None]
    assert found == list(range(len(found))) and len(found) == min(count, total - 1)
    assert preview_at(total, total, count) is None


@pytest.mark.parametrize(("kind", "name"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_files_are_of_the_format_and_black_where_nothing_is_known(kind: Any, name: str) -> None:
    pixels = torch.ones(2, 3, 8, 16)
    pixels[1] = torch.nan
    files = [Image.open(io.BytesIO(base64.b64decode(text))) for text in encoded(as_bytes(pixels), kind, 90)]
    assert [f.format for f in files] == [name] * 2 and files[0].size == (16, 8)
    assert [f.convert("RGB").getpixel((3, 3)) for f in files] == [(255,) * 3, (0,) * 3]


def test_a_samplers_estimate_is_kept_without_changing_its_step() -> None:
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(4)
    x, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    t = scheduler.timesteps[1]
    want = scheduler.step(noise, t, x)
    with _estimates(scheduler) as kept:
        assert "eta" in inspect.signature(scheduler.step).parameters  # which pipelines look for
        assert torch.equal(scheduler.step(noise, t, x, return_dict=False)[0], want.prev_sample)
        assert torch.equal(kept[0], want.pred_original_sample)
        assert torch.equal(scheduler.step(noise, t, x).prev_sample, want.prev_sample)
    assert "step" not in vars(scheduler)
    with _estimates(None) as kept:
        assert kept == []


def test_previews_are_decoded_as_pictures_are() -> None:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, scaling_factor=0.3)
    processor = diffusers.image_processor.VaeImageProcessor()
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        want = processor.postprocess(vae.decode(latents / 0.3).sample, output_type="pt")
    assert torch.equal(decoded(types.SimpleNamespace(vae=vae), latents), want)


def test_a_sharded_network_besides_the_unet_is_found(tmp_path: Path) -> None:
    """No rank can decode alone then: the others would not come to its transfers."""
    make(tmp_path / "b")
    sharded = dc.load(tmp_path / "b", lockstep=True)
    plain = torch.nn.Sequential(torch.nn.Linear(1, 1))
    for vae, found in ((plain, False), (torch.nn.Sequential(sharded), True)):
        assert _decodes_together(types.SimpleNamespace(components={"unet": sharded, "vae": vae, "tag": 1})) is found
