"""Networks of MONAI, where it is installed."""

from __future__ import annotations

from typing import Any

import torch

from tests.families.base import Call, Decoder, family, import_network, randn, randomise

MONAI = "MONAI"


def _monai() -> Any:
    return import_network("monai.networks.nets")


def _diffusion(spatial: int, **more: Any) -> Any:
    config = {
        "spatial_dims": spatial,
        "in_channels": 2,
        "out_channels": 2,
        "num_res_blocks": 1,
        "channels": (8, 16),
        "attention_levels": (False, True),
        "norm_num_groups": 4,
        "num_head_channels": 4,
        **more,
    }
    return randomise(_monai().DiffusionModelUNet(**config))


@family(MONAI, needs="monai")
def monai_unet(h: int, w: int) -> Call:
    return Call(_diffusion(2), {"x": randn(2, 2, h, w), "timesteps": torch.tensor([3, 3])})


@family(MONAI, needs="monai")
def monai_unet_conditioned(h: int, w: int) -> Call:
    module = _diffusion(2, with_conditioning=True, cross_attention_dim=6, resblock_updown=True)
    return Call(module, {"x": randn(2, 2, h, w), "timesteps": torch.tensor([3, 3]), "context": randn(2, 5, 6)})


@family(MONAI, needs="monai", sizes=((12, 8), (16, 8)))
def monai_unet_3d(h: int, w: int) -> Call:
    """A volume, sharded in its first spatial dim."""
    return Call(_diffusion(3), {"x": randn(1, 2, h, w, 8), "timesteps": torch.tensor([3])}, {"x": 2})


@family(MONAI, needs="monai", sizes=((12, 8), (16, 8)))
def monai_unet_3d_inner(h: int, w: int) -> Call:
    """A volume, sharded in its middle spatial dim."""
    return Call(_diffusion(3), {"x": randn(1, 2, 4, h, w), "timesteps": torch.tensor([3])})


@family(MONAI, needs="monai")
def monai_spade(h: int, w: int) -> Call:
    """Norms modulated by a segmentation map, resized to every level."""
    module = randomise(
        _monai().SPADEDiffusionModelUNet(
            spatial_dims=2,
            in_channels=2,
            out_channels=2,
            label_nc=3,
            num_res_blocks=1,
            channels=(8, 16),
            attention_levels=(False, True),
            norm_num_groups=4,
            num_head_channels=4,
            spade_intermediate_channels=8,
        )
    )
    return Call(module, {"x": randn(2, 2, h, w), "timesteps": torch.tensor([3, 3]), "seg": randn(2, 3, h, w)})


@family(MONAI, needs="monai")
def monai_controlnet(h: int, w: int) -> Call:
    module = randomise(
        _monai().ControlNet(
            spatial_dims=2,
            in_channels=2,
            num_res_blocks=1,
            channels=(8, 16),
            attention_levels=(False, True),
            norm_num_groups=4,
            num_head_channels=4,
            conditioning_embedding_in_channels=1,
            conditioning_embedding_num_channels=(4,),
        )
    )
    return Call(module, {"x": randn(1, 2, h, w), "timesteps": torch.tensor([3]), "controlnet_cond": randn(1, 1, h, w)})


@family(MONAI, needs="monai", sizes=((14, 6), (16, 8)))
def monai_vae(h: int, w: int) -> Call:
    vae = randomise(
        _monai().AutoencoderKL(
            spatial_dims=2,
            num_res_blocks=1,
            channels=(8, 16),
            attention_levels=(False, True),
            latent_channels=3,
            norm_num_groups=4,
        )
    )
    return Call(Decoder(vae), {"z": randn(1, 3, h, w)})


@family(MONAI, needs="monai", sizes=((14, 6), (16, 8)))
def monai_vqvae(h: int, w: int) -> Call:
    vae = randomise(
        _monai().VQVAE(
            spatial_dims=2,
            in_channels=1,
            out_channels=1,
            channels=(8, 8),
            num_res_layers=1,
            num_res_channels=(8, 8),
            downsample_parameters=((2, 4, 1, 1),) * 2,
            upsample_parameters=((2, 4, 1, 1, 0),) * 2,
            num_embeddings=8,
            embedding_dim=4,
        )
    )
    return Call(Decoder(vae), {"z": randn(1, 4, h, w)})


@family(MONAI, needs="monai", sizes=((96, 8), (64, 8)))
def monai_segmentation(h: int, w: int) -> Call:
    """A residual UNet with transposed convolutions and PReLU."""
    module = randomise(
        _monai().UNet(
            spatial_dims=2, in_channels=1, out_channels=2, channels=(4, 8, 8), strides=(2, 2), num_res_units=1
        )
    )
    return Call(module, {"x": randn(1, 1, h, w)})


@family(MONAI, needs="monai", sizes=((32, 16), (48, 16)))
def monai_attention_unet(h: int, w: int) -> Call:
    module = randomise(
        _monai().AttentionUnet(spatial_dims=2, in_channels=1, out_channels=2, channels=(4, 8, 8), strides=(2, 2))
    )
    return Call(module, {"x": randn(1, 1, h, w)})


@family(MONAI, needs="monai", sizes=((32, 32), (48, 32)))
def monai_basic_unet(h: int, w: int) -> Call:
    module = randomise(_monai().BasicUNet(spatial_dims=2, in_channels=1, out_channels=2, features=(4, 4, 4, 8, 8, 4)))
    return Call(module, {"x": randn(1, 1, h, w)})


@family(MONAI, needs="monai", sizes=((64, 64), (96, 64)))
def monai_swin_unetr(h: int, w: int) -> Call:
    """Windowed attention with shifts, patch merging."""
    module = randomise(
        _monai().SwinUNETR(
            in_channels=1,
            out_channels=2,
            feature_size=12,
            spatial_dims=2,
            num_heads=(1, 1, 2, 2),
            depths=(2, 2, 1, 1),
            window_size=4,
        )
    )
    return Call(module, {"x_in": randn(1, 1, h, w)})
