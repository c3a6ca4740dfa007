"""diffusers' UNets over frames, and those over a sequence."""

from __future__ import annotations

from typing import Any

import torch

from tests.families.base import Call, family, randn, randomise

GROUP = "diffusers UNets over frames and sequences"
SHARE = 0.98
_SMALL: dict[str, Any] = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
}
FRAMES = 3


@family(GROUP, share=SHARE)
def unet3d(h: int, w: int) -> Call:
    import diffusers

    module = randomise(
        diffusers.UNet3DConditionModel(
            **_SMALL,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        )
    )
    return Call(
        module,
        {
            "sample": randn(1, 4, FRAMES, h, w),
            "timestep": torch.tensor(5.0),
            "encoder_hidden_states": randn(1, 7, 12),
        },
    )


@family(GROUP, share=SHARE)
def svd(h: int, w: int) -> Call:
    import diffusers

    module = randomise(
        diffusers.UNetSpatioTemporalConditionModel(
            sample_size=16,
            in_channels=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=12,
            num_attention_heads=(2, 4),
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
            num_frames=FRAMES,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        )
    )
    return Call(
        module,
        {
            "sample": randn(1, FRAMES, 8, h, w),
            "timestep": torch.tensor(5.0),
            "encoder_hidden_states": randn(1, 1, 12),
            "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]),
        },
    )


def _motion(h: int, w: int, **config: Any) -> Call:
    import diffusers

    module = randomise(
        diffusers.UNetMotionModel(
            **{
                **_SMALL,
                "num_attention_heads": 2,
                "motion_num_attention_heads": 2,
                "motion_max_seq_length": 8,
                "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
                "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
                **config,
            }
        )
    )
    return Call(
        module,
        {
            "sample": randn(1, 4, FRAMES, h, w),
            "timestep": torch.tensor(5.0),
            "encoder_hidden_states": randn(FRAMES, 7, 12),
        },
    )


@family(GROUP, share=SHARE)
def animatediff(h: int, w: int) -> Call:
    return _motion(h, w)


@family(GROUP, share=SHARE)
def animatediff_xl(h: int, w: int) -> Call:
    call = _motion(
        h,
        w,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=60,
        use_motion_mid_block=False,
    )
    call.kwargs["added_cond_kwargs"] = {"text_embeds": randn(1, 12), "time_ids": randn(1, 6) * 100}
    return call


@family(GROUP, share=SHARE)
def i2vgen_xl(h: int, w: int) -> Call:
    import diffusers

    module = randomise(
        diffusers.I2VGenXLUNet(
            sample_size=(16, 16),
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=2,
            cross_attention_dim=16,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        )
    )
    return Call(
        module,
        {
            "sample": randn(1, 4, FRAMES, h, w),
            "timestep": torch.tensor(5.0),
            "fps": torch.tensor([8]),
            "image_latents": randn(1, 4, FRAMES, h, w, seed=1),
            "image_embeddings": randn(1, 16),
            "encoder_hidden_states": randn(1, 7, 16),
        },
    )


@family(GROUP, share=SHARE, sizes=((72, 1), (64, 1)))
def unet1d(h: int, w: int) -> Call:
    """Dance Diffusion: the sequence is sharded."""
    import diffusers

    module = randomise(
        diffusers.UNet1DModel(
            sample_size=h,
            in_channels=2,
            out_channels=2,
            extra_in_channels=64,
            block_out_channels=(32, 32, 64),
            time_embedding_type="fourier",
        )
    )
    return Call(module, {"sample": randn(2, 2, h), "timestep": torch.tensor([3.0, 3.0])})


@family(GROUP, share=SHARE, sizes=((36, 1), (32, 1)))
def unet1d_rl(h: int, w: int) -> Call:
    """The planner's UNet: residual blocks over time steps."""
    import diffusers

    module = randomise(
        diffusers.UNet1DModel(
            sample_size=h,
            in_channels=14,
            out_channels=14,
            time_embedding_type="positional",
            flip_sin_to_cos=False,
            use_timestep_embedding=True,
            freq_shift=1,
            block_out_channels=(32, 32),
            layers_per_block=1,
            act_fn="mish",
            down_block_types=("DownResnetBlock1D", "DownResnetBlock1D"),
            up_block_types=("UpResnetBlock1D",),
            mid_block_type="MidResTemporalBlock1D",
            out_block_type="OutConv1DBlock",
            norm_num_groups=8,
        )
    )
    return Call(module, {"sample": randn(2, 14, h), "timestep": torch.tensor(3)})
