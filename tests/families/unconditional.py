"""diffusers' UNets without conditions."""

from __future__ import annotations

from typing import Any

import torch

from tests.families.base import Call, family, randn, randomise
from tests.families.condition import GROUP, SHARE


def _unet2d(h: int, w: int, **config: Any) -> Call:
    import diffusers

    module = randomise(
        diffusers.UNet2DModel(
            **{
                "sample_size": 16,
                "in_channels": 3,
                "out_channels": 3,
                "layers_per_block": 1,
                "block_out_channels": (8, 16, 16),
                "norm_num_groups": 4,
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
                "attention_head_dim": 4,
                **config,
            }
        )
    )
    return Call(module, {"sample": randn(2, 3, h, w), "timestep": torch.tensor(10)})


@family(GROUP, share=SHARE)
def unet2d(h: int, w: int) -> Call:
    return _unet2d(h, w)


@family(GROUP, share=SHARE)
def ncsnpp(h: int, w: int) -> Call:
    """Score SDE: FIR resampling, skips of the image itself at every level."""
    return _unet2d(
        h,
        w,
        block_out_channels=(32, 32),
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        time_embedding_type="fourier",
        norm_num_groups=None,
        mid_block_scale_factor=1.414,
        norm_eps=1e-6,
        freq_shift=0,
        center_input_sample=False,
    )


@family(GROUP, share=SHARE)
def resnet_resampling(h: int, w: int) -> Call:
    """ADM: residual blocks that resample, scale-shift norms, attention over every level."""
    return _unet2d(
        h,
        w,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
        num_class_embeds=None,
    )


@family(GROUP, share=SHARE)
def spatial_group_norm(h: int, w: int) -> Call:
    return _unet2d(h, w, resnet_time_scale_shift="default", downsample_padding=0, add_attention=False)
