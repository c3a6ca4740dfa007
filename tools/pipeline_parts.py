# SPDX-License-Identifier: Apache-2.0
"""Small networks of diffusers pipelines, every parameter random and none left zero."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

WIDE = 24  # of text states
DEMO = Path(__file__).resolve().parents[1] / "models" / "demo"


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(seed: int, size: int = 16, channels: int = 3, batch: int = 1) -> Tensor:
    """Return pictures with values in 0..1."""
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def randomise(module: nn.Module, seed: int = 0) -> Any:
    """Fill every parameter: networks start with layers at zero, which would hide any error before them."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        std = 0.3 if p.ndim < 2 else 0.5 / math.sqrt(max(1, p[0].numel()))
        p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype) * std + (0.7 if p.ndim < 2 else 0.0)
    return module.eval().requires_grad_(False)


def unet(**config: Any) -> Any:
    small = {
        "sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4,
        "cross_attention_dim": WIDE, "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return randomise(diffusers.UNet2DConditionModel(**{**small, **config}))


def vae(channels: int = 4, **config: Any) -> Any:
    small = {
        "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": channels,
        "sample_size": 16, "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    }  # fmt: skip
    return randomise(diffusers.AutoencoderKL(**{**small, **config}))


def movq() -> Any:
    return randomise(
        diffusers.VQModel(
            block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, vq_embed_dim=4,
            num_vq_embeddings=12, norm_type="spatial",
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        )
    )  # fmt: skip


def controlnet(seed: int = 0, **config: Any) -> Any:
    small = {
        "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": WIDE,
        "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "conditioning_embedding_out_channels": (4, 8),
    }  # fmt: skip
    return randomise(diffusers.ControlNetModel(**{**small, **config}), seed)


@functools.cache
def tokenizer() -> Any:
    import transformers

    return transformers.CLIPTokenizer.from_pretrained(str(DEMO / "tokenizer"))


def text_encoder(projected: bool = False) -> Any:
    import transformers

    known = tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(known), hidden_size=WIDE, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=WIDE, max_position_embeddings=known.model_max_length, bos_token_id=known.bos_token_id,
        eos_token_id=known.eos_token_id, pad_token_id=known.pad_token_id,
    )  # fmt: skip
    return randomise((transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config))


def image_encoder(width: int = WIDE) -> Any:
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=width,
    )  # fmt: skip
    return randomise(transformers.CLIPVisionModelWithProjection(config))


def feature_extractor() -> Any:
    import transformers

    return transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def text(tokens: int = 7, batch: int = 1, negative: bool = True, width: int = WIDE) -> dict[str, Tensor]:
    """Return the text of a prompt as its encoder would: both guidance halves."""
    found = {"prompt_embeds": noise(1, batch, tokens, width)}
    return {**found, "negative_prompt_embeds": noise(2, batch, tokens, width)} if negative else found


def pooled(batch: int = 1, negative: bool = True) -> dict[str, Tensor]:
    found = {"pooled_prompt_embeds": noise(3, batch, WIDE)}
    return {**found, "negative_pooled_prompt_embeds": noise(4, batch, WIDE)} if negative else found


def ddim(**config: Any) -> Any:
    return diffusers.DDIMScheduler(**{"clip_sample": False, **config})


def stable_diffusion(name: str, **parts: Any) -> Any:
    """Return a pipeline of the Stable Diffusion family without text encoders."""
    cls = getattr(diffusers, name)
    import inspect

    known = inspect.signature(cls.__init__).parameters
    offered: dict[str, Any] = {
        "scheduler": ddim(), "text_encoder": None, "tokenizer": None, "safety_checker": None,
        "feature_extractor": None, "requires_safety_checker": False, **parts,
    }  # fmt: skip
    if "unet" not in offered:
        offered["unet"] = unet()
    if "vae" not in offered:
        offered["vae"] = vae()
    return quiet(cls(**{k: v for k, v in offered.items() if k in known}))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def xl(ids: int = 6, **config: Any) -> Any:
    return unet(
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDE + 8 * ids, **config,
    )  # fmt: skip
