"""Small random diffusers pipelines on disk, with the demo's text encoder, whose VAE halves maps once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch

DEMO = Path(__file__).resolve().parents[1] / "models" / "demo"
SIZE = 32  # pixels


def write_pipeline(folder: Path, name: str = "StableDiffusionPipeline", channels: int = 4) -> Path:
    """Write a pipeline of the class ``name``, whose UNet takes ``channels`` channels. Weights are float32."""
    torch.manual_seed(0)
    unet: Any = diffusers.UNet2DConditionModel(
        sample_size=SIZE // 2, in_channels=channels, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=8, cross_attention_dim=128,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    unet.save_pretrained(folder / "unet")
    vae: Any = diffusers.AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8, sample_size=SIZE,
    )  # fmt: skip
    vae.save_pretrained(folder / "vae")
    for part in ("text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(DEMO / part, folder / part)
    index = json.loads((DEMO / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
    return folder
