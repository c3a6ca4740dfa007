# SPDX-License-Identifier: Apache-2.0
"""Write folders of small random pipelines around a diffusion transformer, with the text parts of the demo model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from districompile.models.sources import DEMO
from tests.families.base import randomise

HEADS: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 2}
TEXT = {"vocab_size": 350, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 24, "projection_dim": 12, "bos_token_id": 348,
        "eos_token_id": 349}  # fmt: skip


def vae(channels: int) -> Any:
    """An autoencoder of 8 pixels a latent row, whose latents are scaled and shifted."""
    import diffusers

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), norm_num_groups=2, layers_per_block=1, latent_channels=channels,
        scaling_factor=0.5, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False, **kinds,
    )  # fmt: skip


def t5(width: int) -> tuple[Any, Any]:
    """A text encoder and its tokenizer, which knows letters."""
    import transformers

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), *((c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz▁")]
    config = transformers.T5Config(vocab_size=32, d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config).eval(), transformers.T5Tokenizer(vocab=pieces, extra_ids=0)


def flux(folder: Path, *, guided: bool = True) -> Path:
    """Write a FLUX pipeline: CLIP's pooled text, T5's 512 tokens, guidance as an input or none."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(DEMO / "tokenizer"))
    encoder, pieces = t5(8)
    network = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=8, pooled_projection_dim=16,
        guidance_embeds=guided, axes_dims_rope=(4, 6, 6), **HEADS,
    )  # fmt: skip
    diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guided),
        vae=vae(4).eval(),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=pieces,
        transformer=randomise(network),
    ).save_pretrained(str(folder))
    return folder


def sd3(folder: Path) -> Path:
    """Write an SD 3 pipeline: the tokens of two CLIPs and T5, and both guidance halves in a call."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(DEMO / "tokenizer"))
    network = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, joint_attention_dim=32, caption_projection_dim=32,
        pooled_projection_dim=24, out_channels=4, pos_embed_max_size=24, **HEADS,
    )  # fmt: skip
    encoder, pieces = t5(32)
    encoders = [transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**TEXT)).eval() for _ in range(2)]
    diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4).eval(),
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=encoder,
        tokenizer_3=pieces,
        transformer=randomise(network),
    ).save_pretrained(str(folder))
    return folder
