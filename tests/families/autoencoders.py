"""Decoders (and one encoder) of autoencoders."""

from __future__ import annotations

from typing import Any

import torch

from tests.families.base import Call, Decoder, Wrapped, family, randn, randomise

GROUP = "diffusers autoencoders"
SHARE = 0.98
SIZES = ((14, 6), (16, 8))
_KL: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "sample_size": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


@family(GROUP, share=SHARE, sizes=SIZES)
def vae_kl(h: int, w: int) -> Call:
    import diffusers

    return Call(Decoder(randomise(diffusers.AutoencoderKL(**_KL))), {"z": randn(1, 4, h, w)})


def _encode(vae: Any, sample: torch.Tensor) -> torch.Tensor:
    moments: torch.Tensor = vae._encode(sample)
    return moments


@family(GROUP, share=SHARE)
def vae_kl_encoder(h: int, w: int) -> Call:
    import diffusers

    return Call(Wrapped(randomise(diffusers.AutoencoderKL(**_KL)), _encode), {}, None, (randn(1, 3, h, w),))


@family(GROUP, share=SHARE, sizes=SIZES)
def vae_tiny(h: int, w: int) -> Call:
    import diffusers

    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    return Call(Decoder(randomise(vae)), {"z": randn(1, 4, h, w)})


@family(GROUP, share=SHARE, sizes=SIZES)
def vae_asymmetric(h: int, w: int) -> Call:
    """The inpainting decoder: image and mask are encoded on the side and merged at every level."""
    import diffusers

    vae = randomise(
        diffusers.AsymmetricAutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            down_block_out_channels=(8, 16),
            layers_per_down_block=1,
            up_block_types=("UpDecoderBlock2D",) * 2,
            up_block_out_channels=(8, 16),
            layers_per_up_block=1,
            norm_num_groups=4,
            sample_size=32,
        )
    )

    def decode(inner: Any, z: torch.Tensor, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = inner.decode(z, image=image, mask=mask).sample
        return out

    mask = (torch.rand(1, 1, h * 2, w * 2, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    return Call(Wrapped(vae, decode), {}, None, (randn(1, 4, h, w), randn(1, 3, h * 2, w * 2), mask))


@family(GROUP, share=SHARE, sizes=SIZES)
def vae_temporal(h: int, w: int) -> Call:
    import diffusers

    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1, sample_size=32
    )
    return Call(Decoder(randomise(vae), num_frames=2), {"z": randn(2, 4, h, w)})


@family(GROUP, share=SHARE, sizes=SIZES)
def vq(h: int, w: int) -> Call:
    import diffusers

    vae = diffusers.VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=3,
        num_vq_embeddings=16,
    )
    return Call(Decoder(randomise(vae)), {"z": randn(1, 3, h, w)})


@family(GROUP, share=SHARE, sizes=SIZES)
def movq(h: int, w: int) -> Call:
    """Kandinsky 2: norms modulated by the latents, resized to every level."""
    import diffusers

    vae = diffusers.VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
        num_vq_embeddings=16,
        norm_type="spatial",
        vq_embed_dim=4,
    )
    return Call(Decoder(randomise(vae), force_not_quantize=True), {"z": randn(1, 4, h, w)})


@family(GROUP, share=SHARE, sizes=SIZES)
def dc_ae(h: int, w: int) -> Call:
    """Deep compression: pixel shuffle, linear attention at several scales."""
    import diffusers

    vae = diffusers.AutoencoderDC(
        latent_channels=8,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
    )
    return Call(Decoder(randomise(vae)), {"z": randn(1, 8, h, w)})


@family(GROUP, share=SHARE, sizes=((34, 1), (32, 1)))
def oobleck(h: int, w: int) -> Call:
    """Stable Audio: a sequence, transposed convolutions, snake activations."""
    import diffusers

    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
    )
    return Call(Decoder(randomise(vae)), {"z": randn(1, 4, h)}, {"z": 2})


@family(GROUP, share=SHARE, sizes=SIZES)
def vae_cogvideox(h: int, w: int) -> Call:
    import diffusers

    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_height=32,
        sample_width=32,
    )
    return Call(Decoder(randomise(vae)), {"z": randn(1, 4, 2, h, w)})


@family(GROUP, share=SHARE, sizes=SIZES)
def vae_wan(h: int, w: int) -> Call:
    import diffusers

    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return Call(Decoder(randomise(vae)), {"z": randn(1, 4, 2, h, w)})
