"""Networks of denoising-diffusion-pytorch and its relatives, and of k-diffusion, where they are installed."""

from __future__ import annotations

from typing import Any

import torch

from tests.families.base import Call, family, import_network, randn, randomise

LUCID = "denoising-diffusion-pytorch and relatives"
# What these packages import for training alone.
UNUSED = (
    "torchvision",
    "ema_pytorch",
    "accelerate",
    "datasets",
    "pytorch_warmup",
    "lightning",
    "fsspec",
    "PIL",
    "scipy",
    "dctorch",
    "clip",
    "cleanfid",
    "pytorch_fid",
    "skimage",
    "torchsde",
    "resize_right",
    "kornia",
    "jsonmerge",
    "webdataset",
    "tokenizers",
    "sentencepiece",
    "torchdiffeq",
    "pkg_resources",
    "ftfy",
    "regex",
    "open_clip",
)


def _lucid(name: str) -> Any:
    return import_network(name, UNUSED)


@family(LUCID, needs="denoising_diffusion_pytorch")
def ddpm(h: int, w: int) -> Call:
    """Linear attention with memory keys, full attention in the middle, RMS norm."""
    package = _lucid("denoising_diffusion_pytorch")
    return Call(
        randomise(package.Unet(dim=8, dim_mults=(1, 2), attn_dim_head=4, attn_heads=2)),
        {"x": randn(2, 3, h, w), "time": torch.tensor([3, 3])},
    )


@family(LUCID, needs="denoising_diffusion_pytorch")
def ddpm_flash(h: int, w: int) -> Call:
    package = _lucid("denoising_diffusion_pytorch")
    module = package.Unet(
        dim=8,
        dim_mults=(1, 2, 4),
        attn_dim_head=4,
        attn_heads=2,
        flash_attn=True,
        self_condition=True,
        full_attn=(False, True, True),
    )
    return Call(
        randomise(module),
        {"x": randn(2, 3, h, w), "time": torch.tensor([3, 3]), "x_self_cond": randn(2, 3, h, w, seed=1)},
    )


@family(LUCID, needs="denoising_diffusion_pytorch", sizes=((28, 1), (32, 1)))
def ddpm_1d(h: int, w: int) -> Call:
    package = _lucid("denoising_diffusion_pytorch")
    return Call(
        randomise(package.Unet1D(dim=8, dim_mults=(1, 2), channels=3, attn_dim_head=4, attn_heads=2)),
        {"x": randn(2, 3, h), "time": torch.tensor([3, 3])},
    )


@family(LUCID, needs="denoising_diffusion_pytorch")
def karras(h: int, w: int) -> Call:
    """Magnitude-preserving: weights normalised in the graph, pixel norm, cosine attention."""
    package = _lucid("denoising_diffusion_pytorch")
    module = package.KarrasUnet(
        image_size=32,
        dim=8,
        dim_max=16,
        num_downsamples=2,
        num_blocks_per_stage=1,
        attn_res=(16, 8),
        attn_dim_head=4,
        channels=3,
    )
    return Call(randomise(module), {"x": randn(2, 3, 32, 32), "time": torch.tensor([3.0, 3.0])})


@family(LUCID, needs="denoising_diffusion_pytorch", sizes=((32, 1), (64, 1)))
def karras_1d(h: int, w: int) -> Call:
    package = _lucid("denoising_diffusion_pytorch")
    module = package.KarrasUnet1D(
        seq_len=h,
        dim=8,
        dim_max=16,
        num_downsamples=2,
        num_blocks_per_stage=1,
        attn_res=(16, 8),
        attn_dim_head=4,
        channels=3,
    )
    return Call(randomise(module), {"x": randn(2, 3, h), "time": torch.tensor([3.0, 3.0])})


@family(LUCID, needs="denoising_diffusion_pytorch", sizes=((16, 16),))
def karras_3d(h: int, w: int) -> Call:
    package = _lucid("denoising_diffusion_pytorch")
    module = package.KarrasUnet3D(
        frames=4,
        image_size=h,
        dim=8,
        dim_max=16,
        num_downsamples=2,
        num_blocks_per_stage=1,
        attn_dim_head=4,
        channels=3,
        attn_res=(8,),
        factorize_space_time_attn=True,
    )
    return Call(randomise(module), {"x": randn(1, 3, 4, h, h), "time": torch.tensor([3.0])})


@family(LUCID, needs="denoising_diffusion_pytorch")
def simple_diffusion(h: int, w: int) -> Call:
    """A UNet around a transformer with axial rotary positions."""
    package = _lucid("denoising_diffusion_pytorch.simple_diffusion")
    module = package.UViT(dim=8, dim_mults=(1, 2), vit_depth=1, attn_dim_head=8, attn_heads=2, downsample_factor=2)
    return Call(randomise(module), {"x": randn(2, 3, h, w), "time": torch.tensor([3, 3])})


@family(LUCID, needs="denoising_diffusion_pytorch")
def classifier_free(h: int, w: int) -> Call:
    package = _lucid("denoising_diffusion_pytorch.classifier_free_guidance")
    module = package.Unet(dim=8, dim_mults=(1, 2), num_classes=5, attn_dim_head=4, attn_heads=2, cond_drop_prob=0.0)
    return Call(
        randomise(module),
        {"x": randn(2, 3, h, w), "time": torch.tensor([3, 3]), "classes": torch.tensor([1, 4]), "cond_drop_prob": 0.0},
    )


def _imagen_package(name: str) -> Any:
    """Import a package that reads the width of T5's embeddings from the model hub when it is imported."""
    import transformers

    real = transformers.T5Config.from_pretrained
    transformers.T5Config.from_pretrained = lambda *args, **kwargs: transformers.T5Config(d_model=10)
    try:
        return _lucid(name)
    finally:
        transformers.T5Config.from_pretrained = real


def _imagen(**more: Any) -> Any:
    package = _imagen_package("imagen_pytorch.imagen_pytorch")
    config = {
        "dim": 8,
        "text_embed_dim": 10,
        "cond_dim": 8,
        "dim_mults": (1, 2),
        "attn_dim_head": 4,
        "attn_heads": 2,
        "num_image_tokens": 2,
        "max_text_len": 8,
        "attn_pool_num_latents": 4,
        "layer_attns": (False, True),
        "layer_cross_attns": (False, True),
        **more,
    }
    return randomise(package.Unet(**config))


@family(LUCID, needs="imagen_pytorch")
def imagen(h: int, w: int) -> Call:
    """Global context by softmax pooling, multi-query attention with null keys, pixel shuffle."""
    return Call(
        _imagen(),
        {
            "x": randn(2, 3, h, w),
            "time": torch.tensor([3.0, 3.0]),
            "text_embeds": randn(2, 8, 10),
            "text_mask": torch.ones(2, 8, dtype=torch.bool),
        },
    )


@family(LUCID, needs="imagen_pytorch")
def imagen_efficient(h: int, w: int) -> Call:
    module = _imagen(
        memory_efficient=True,
        use_linear_attn=True,
        use_linear_cross_attn=True,
        layer_attns=False,
        lowres_cond=True,
        pixel_shuffle_upsample=False,
        init_conv_to_final_conv_residual=True,
    )
    return Call(
        module,
        {
            "x": randn(2, 3, h, w),
            "time": torch.tensor([3.0, 3.0]),
            "text_embeds": randn(2, 8, 10),
            "text_mask": torch.ones(2, 8, dtype=torch.bool),
            "lowres_cond_img": randn(2, 3, h, w, seed=1),
            "lowres_noise_times": torch.tensor([3.0, 3.0]),
        },
    )


@family(LUCID, needs="imagen_pytorch", sizes=((12, 8), (16, 8)))
def imagen_video(h: int, w: int) -> Call:
    package = _imagen_package("imagen_pytorch.imagen_video")
    module = randomise(
        package.Unet3D(
            dim=8,
            text_embed_dim=10,
            cond_dim=8,
            dim_mults=(1, 2),
            attn_dim_head=4,
            attn_heads=2,
            num_image_tokens=2,
            max_text_len=8,
            attn_pool_num_latents=4,
            layer_attns=(False, True),
            layer_cross_attns=(False, True),
        )
    )
    return Call(
        module,
        {
            "x": randn(1, 3, 4, h, w),
            "time": torch.tensor([3.0]),
            "text_embeds": randn(1, 8, 10),
            "text_mask": torch.ones(1, 8, dtype=torch.bool),
        },
    )


@family(LUCID, needs="make_a_video_pytorch", sizes=((12, 8), (16, 8)))
def make_a_video(h: int, w: int) -> Call:
    package = _lucid("make_a_video_pytorch.make_a_video")
    module = package.SpaceTimeUnet(
        dim=8,
        dim_mult=(1, 2),
        self_attns=(False, True),
        temporal_compression=(False, True),
        resnet_block_depths=(1, 1),
        attn_dim_head=8,
        attn_heads=2,
    )
    return Call(randomise(module), {"x": randn(1, 3, 4, h, w), "timestep": torch.tensor([3.0])})


@family(LUCID, needs="k_diffusion")
def k_diffusion(h: int, w: int) -> Call:
    """Attention written by hand over (n, c, h, w), filters assembled in the graph."""
    package = _lucid("k_diffusion.models.image_v1")
    module = package.ImageDenoiserModelV1(
        c_in=3,
        feats_in=16,
        depths=(1, 1),
        channels=(64, 64),
        self_attn_depths=(False, True),
        cross_attn_depths=(False, True),
        cross_cond_dim=6,
    )
    return Call(
        randomise(module),
        {
            "input": randn(2, 3, h, w),
            "sigma": torch.tensor([0.5, 0.5]),
            "cross_cond": randn(2, 5, 6),
            "cross_cond_padding": torch.zeros(2, 5),
        },
    )


@family(LUCID, needs="k_diffusion")
def k_diffusion_transformer(h: int, w: int) -> Call:
    """A transformer over patches, whose scales of queries and keys are clamped in forward, for training's sake."""
    package = _lucid("k_diffusion.models.image_transformer_v1")
    package.flags.get_use_compile = lambda: False  # else small functions are compiled at their first call
    module = package.ImageTransformerDenoiserModelV1(
        n_layers=2, d_model=64, d_ff=32, in_features=3, out_features=3, patch_size=(2, 2)
    )
    return Call(randomise(module), {"x": randn(2, 3, h, w), "sigma": torch.tensor([0.5, 0.5])})
