# SPDX-License-Identifier: Apache-2.0
"""Diffusion transformers for pictures and videos, of which most attend to text tokens and image tokens together."""

from __future__ import annotations

from typing import Any

import torch

from tests.families.base import Call, family, randn, randomise

GROUP = "transformers for text and video"
SIZES = ((28, 12), (32, 16))
VIDEO = ((20, 8), (16, 8))
TOKENS = 10  # of the text
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}


@family(GROUP, sizes=SIZES)
def qwen_image(h: int, w: int) -> Call:
    """Packed patches, the text first; rotary positions follow from the shapes."""
    import diffusers

    module = diffusers.QwenImageTransformer2DModel(
        in_channels=8, out_channels=2, num_layers=2, joint_attention_dim=12, axes_dims_rope=(4, 6, 6), **HEADS
    )
    return Call(
        randomise(module),
        {
            "hidden_states": randn(2, h * w, 8),
            "encoder_hidden_states": randn(2, TOKENS, 12),
            "timestep": torch.tensor([0.3, 0.3]),
            "img_shapes": [[(1, h, w)]] * 2,
        },
        {"hidden_states": 1},
    )


@family(GROUP, sizes=SIZES)
def chroma(h: int, w: int) -> Call:
    import diffusers

    module = diffusers.ChromaTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, joint_attention_dim=12, axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1, **HEADS,
    )  # fmt: skip
    ids = torch.stack([torch.zeros(h * w), torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)], 1).float()
    mask = torch.ones(1, TOKENS + h * w, dtype=torch.bool)
    mask[:, 7:TOKENS] = False
    return Call(
        randomise(module),
        {
            "hidden_states": randn(1, h * w, 8),
            "encoder_hidden_states": randn(1, TOKENS, 12),
            "timestep": torch.tensor([0.3]),
            "img_ids": ids,
            "txt_ids": torch.zeros(TOKENS, 3),
            "attention_mask": mask,
        },
        {"hidden_states": 1, "img_ids": 0},
    )


@family(GROUP, sizes=SIZES)
def aura_flow(h: int, w: int) -> Call:
    """Registers stand before the text."""
    import diffusers

    module = diffusers.AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        joint_attention_dim=12, caption_projection_dim=32, out_channels=4, pos_embed_max_size=256, **HEADS,
    )  # fmt: skip
    return Call(
        randomise(module),
        {
            "hidden_states": randn(2, 4, h, w),
            "encoder_hidden_states": randn(2, TOKENS, 12),
            "timestep": torch.tensor([0.3, 0.3]),
        },
    )


@family(GROUP, sizes=SIZES)
def hunyuan_dit(h: int, w: int) -> Call:
    """The text is in cross-attention alone."""
    import diffusers

    module = diffusers.HunyuanDiT2DModel(
        in_channels=4, patch_size=2, sample_size=16, hidden_size=32, num_layers=2, mlp_ratio=2.0,
        cross_attention_dim=12, cross_attention_dim_t5=16, pooled_projection_dim=8, text_len=4, text_len_t5=6,
        activation_fn="gelu-approximate", use_style_cond_and_image_meta_size=False, **HEADS,
    )  # fmt: skip
    positions = h // 2 * (w // 2)
    return Call(
        randomise(module),
        {
            "hidden_states": randn(2, 4, h, w),
            "timestep": torch.tensor([3.0, 3.0]),
            "encoder_hidden_states": randn(2, 4, 12),
            "text_embedding_mask": torch.ones(2, 4, dtype=torch.int64),
            "encoder_hidden_states_t5": randn(2, 6, 16),
            "text_embedding_mask_t5": torch.ones(2, 6, dtype=torch.int64),
            "image_rotary_emb": (randn(positions, 16), randn(positions, 16, seed=1)),
        },
        {"hidden_states": 2, "image_rotary_emb.0": 0, "image_rotary_emb.1": 0},
    )


@family(GROUP, sizes=VIDEO)
def wan(h: int, w: int) -> Call:
    """The text is in cross-attention alone."""
    import diffusers

    module = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=10, freq_dim=16,
        ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    return Call(
        randomise(module),
        {
            "hidden_states": randn(1, 4, 2, h, w),
            "timestep": torch.tensor([3.0]),
            "encoder_hidden_states": randn(1, TOKENS, 10),
        },
    )


@family(GROUP, sizes=VIDEO)
def cogvideox(h: int, w: int) -> Call:
    """Text and video are joined when they are embedded; each block splits and joins them."""
    import diffusers

    module = diffusers.CogVideoXTransformer3DModel(
        in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=12, num_layers=2, sample_width=w,
        sample_height=h, sample_frames=5, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=TOKENS,
        **HEADS,
    )  # fmt: skip
    return Call(
        randomise(module),
        {
            "hidden_states": randn(1, 2, 4, h, w),
            "encoder_hidden_states": randn(1, TOKENS, 12),
            "timestep": torch.tensor([3]),
        },
    )


@family(GROUP, sizes=VIDEO)
def hunyuan_video(h: int, w: int) -> Call:
    """Refiners of the text alone, which depend on the timestep; a mask of the text."""
    import diffusers

    module = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1, mlp_ratio=2.0,
        patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=12, pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6), **HEADS,
    )  # fmt: skip
    mask = torch.ones(1, TOKENS, dtype=torch.int64)
    mask[:, 7:] = 0
    return Call(
        randomise(module),
        {
            "hidden_states": randn(1, 4, 2, h, w),
            "timestep": torch.tensor([3.0]),
            "encoder_hidden_states": randn(1, TOKENS, 12),
            "encoder_attention_mask": mask,
            "pooled_projections": randn(1, 8),
            "guidance": torch.tensor([4000.0]),
        },
    )
