"""Diffusion transformers."""

from __future__ import annotations

import torch

from tests.families.base import Call, family, randn, randomise

GROUP = "transformers"


@family(GROUP)
def pixart(h: int, w: int) -> Call:
    import diffusers

    module = randomise(
        diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=16,
            sample_size=16,
            patch_size=2,
            caption_channels=10,
            norm_num_groups=4,
        )
    )
    return Call(
        module,
        {
            "hidden_states": randn(2, 4, h, w),
            "encoder_hidden_states": randn(2, 7, 10),
            "timestep": torch.tensor([3.0, 3.0]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    )


@family(GROUP)
def dit(h: int, w: int) -> Call:
    import diffusers

    module = randomise(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            num_layers=2,
            sample_size=h,
            patch_size=2,
            num_embeds_ada_norm=10,
            norm_num_groups=4,
        )
    )
    return Call(
        module,
        {
            "hidden_states": randn(2, 4, h, h),
            "timestep": torch.tensor([3, 3]),
            "class_labels": torch.tensor([1, 2]),
        },
    )


@family(GROUP)
def sd3(h: int, w: int) -> Call:
    """Text tokens and image tokens in one attention."""
    import diffusers

    module = randomise(
        diffusers.SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            caption_projection_dim=16,
            pooled_projection_dim=10,
            out_channels=4,
            pos_embed_max_size=24,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
    )
    return Call(
        module,
        {
            "hidden_states": randn(2, 4, h, w),
            "encoder_hidden_states": randn(2, 7, 12),
            "pooled_projections": randn(2, 10),
            "timestep": torch.tensor([3.0, 3.0]),
        },
    )


@family(GROUP)
def flux(h: int, w: int) -> Call:
    """Packed patches: the sequence is sharded; rotary positions are inputs."""
    import diffusers

    module = randomise(
        diffusers.FluxTransformer2DModel(
            in_channels=8,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
    )
    ids = torch.stack([torch.zeros(h * w), torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)], 1).float()
    return Call(
        module,
        {
            "hidden_states": randn(1, h * w, 8),
            "encoder_hidden_states": randn(1, 7, 12),
            "pooled_projections": randn(1, 10),
            "timestep": torch.tensor([0.3]),
            "img_ids": ids,
            "txt_ids": torch.zeros(7, 3),
            "guidance": torch.tensor([3.5]),
        },
        {"hidden_states": 1, "img_ids": 0},
    )


@family(GROUP)
def sana(h: int, w: int) -> Call:
    """Linear attention over the image."""
    import diffusers

    module = randomise(
        diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=10,
            sample_size=16,
            patch_size=1,
        )
    )
    return Call(
        module,
        {
            "hidden_states": randn(2, 4, h, w),
            "encoder_hidden_states": randn(2, 7, 10),
            "timestep": torch.tensor([3.0, 3.0]),
        },
    )
