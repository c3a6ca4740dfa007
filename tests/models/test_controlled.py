"""Test UNets with ControlNets inside: their bundle draws what diffusers' ControlNet pipelines draw."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from pipeline_parts import text_encoder, tokenizer  # noqa: E402
from small_models import randomise  # noqa: E402

import districompile as dc  # noqa: E402
from districompile.cli.main import main  # noqa: E402
from districompile.models.inputs import ModelError  # noqa: E402
from districompile.models.sources import load_source  # noqa: E402

_SMALL: dict[str, Any] = {
    "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 24,
    "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
}  # fmt: skip


def controlnet(seed: int, **config: Any) -> Any:
    net = diffusers.ControlNetModel(**{**_SMALL, "conditioning_embedding_out_channels": (4, 8), **config})
    return randomise(net, seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, with two ControlNets beside it."""
    path = tmp_path_factory.mktemp("controlled")
    unet = randomise(
        diffusers.UNet2DConditionModel(sample_size=8, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **_SMALL)
    )
    vae = randomise(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        unet=unet, vae=vae, text_encoder=text_encoder(), tokenizer=tokenizer(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(path / "pipe")  # fmt: skip
    controlnet(1).save_pretrained(path / "first")
    controlnet(2).save_pretrained(path / "second")
    controlnet(2, cross_attention_dim=32).save_pretrained(path / "other")
    return path


def _draw(pipe: Any, **given: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(0)
    text = {"prompt_embeds": torch.randn(1, 24, 24, generator=g), "negative_prompt_embeds": torch.zeros(1, 24, 24)}
    return pipe(**text, num_inference_steps=4, generator=g, output_type="latent", height=16, width=16, **given).images


def _original(folder: Path, *names: str) -> Any:
    nets = [diffusers.ControlNetModel.from_pretrained(folder / n) for n in names]
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder / "pipe")
    return diffusers.StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=nets if len(nets) > 1 else nets[0])


def _compiled(folder: Path, out: Path, *names: str) -> tuple[Any, Any]:
    options = [arg for name in names for arg in ("--controlnet", str(folder / name))]
    assert (
        main(["convert", str(folder / "pipe"), *options, "--gpus", "2", "--backend", "eager", "--out", str(out)]) == 0
    )
    weights = folder / "pipe" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(folder / "away")  # the pipeline is loaded without them
    try:
        pipe = dc.load_pipeline(out, lockstep=True)
    finally:
        (folder / "away").rename(weights)
    pipe.unet.phase = "exact"
    return pipe, json.loads((out / "manifest.json").read_text())["source"]


def _close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((got - want).abs().max() <= 1e-4 * want.abs().max())


PICTURE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def test_one_controlnet(folder: Path, tmp_path: Path) -> None:
    pipe, _ = _compiled(folder, tmp_path / "bundle", "first")
    original = _original(folder, "first")
    for given in (
        {},
        {"controlnet_conditioning_scale": 0.4},
        {"guess_mode": True},
        {"control_guidance_start": 0.3, "control_guidance_end": 0.8},
    ):
        assert _close(_draw(pipe, image=PICTURE, **given), _draw(original, image=PICTURE, **given)), given
    assert not _close(_draw(pipe, image=PICTURE), _draw(pipe, image=PICTURE, guess_mode=True))


@pytest.mark.slow
def test_two_controlnets(folder: Path, tmp_path: Path) -> None:
    pipe, source = _compiled(folder, tmp_path / "bundle", "first", "second")
    given = {"image": [PICTURE, 1 - PICTURE], "controlnet_conditioning_scale": [0.7, 0.3]}
    assert _close(_draw(pipe, **given), _draw(_original(folder, "first", "second"), **given))
    assert main(["verify", str(tmp_path / "bundle"), "--no-drift"]) == 0
    assert source.count("+controlnet:") == 2


def test_what_does_not_fit_is_refused(folder: Path) -> None:
    pipe = str(folder / "pipe")
    with pytest.raises(ModelError, match="other is for another UNet: its cross_attention_dim is 32, and .* is 24"):
        load_source(f"{pipe}+controlnet:{folder / 'other'}")
    with pytest.raises(ModelError, match="none holds no ControlNetModel: it has no config.json"):
        load_source(f"{pipe}+controlnet:{folder / 'none'}")
    with pytest.raises(ModelError, match="unet holds a 'UNet2DConditionModel', and a ControlNetModel is needed"):
        load_source(f"{pipe}+controlnet:{folder / 'pipe' / 'unet'}")
    with pytest.raises(ModelError, match="vae is a AutoencoderKL"):
        load_source(f"{pipe}/vae+controlnet:{folder / 'first'}")
