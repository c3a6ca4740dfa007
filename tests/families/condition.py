"""diffusers' image UNets with text or other conditions, and what is attached to them."""

from __future__ import annotations

from typing import Any

import torch

from tests.families.base import Call, family, randn, randomise

GROUP = "diffusers UNets"
SHARE = 0.98

_SMALL: dict[str, Any] = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def unet(h: int, w: int, batch: int = 2, **config: Any) -> Call:
    import diffusers

    torch.manual_seed(0)
    module = randomise(diffusers.UNet2DConditionModel(**{**_SMALL, **config}))
    wide = module.config["encoder_hid_dim"] or module.config["cross_attention_dim"]
    kwargs = {
        "sample": randn(batch, int(module.config["in_channels"]), h, w),
        "timestep": torch.tensor(521.0),
        "encoder_hidden_states": randn(batch, 7, int(wide)),
    }
    return Call(module, kwargs)


def _xl(h: int, w: int, ids: int, **config: Any) -> Call:
    call = unet(
        h,
        w,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=12 + 8 * ids,
        **config,
    )
    call.kwargs["added_cond_kwargs"] = {"text_embeds": randn(2, 12), "time_ids": randn(2, ids) * 100}
    return call


@family(GROUP, share=SHARE)
def sd15(h: int, w: int) -> Call:
    return unet(
        h,
        w,
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )


@family(GROUP, share=SHARE)
def sd21(h: int, w: int) -> Call:
    return unet(h, w, use_linear_projection=True, upcast_attention=True)


@family(GROUP, share=SHARE)
def sdxl(h: int, w: int) -> Call:
    return _xl(
        h,
        w,
        6,
        transformer_layers_per_block=[1, 2],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


@family(GROUP, share=SHARE)
def refiner(h: int, w: int) -> Call:
    return _xl(h, w, 5, transformer_layers_per_block=2)


@family(GROUP, share=SHARE)
def deepfloyd(h: int, w: int) -> Call:
    """DeepFloyd IF: added keys and values of the text in front, scale-shift blocks that resample, text embedding by
    attention pooling."""
    return unet(
        h,
        w,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        cross_attention_norm="group_norm",
        act_fn="gelu",
        cross_attention_dim=32,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        encoder_hid_dim=20,
        encoder_hid_dim_type="text_proj",
        resnet_time_scale_shift="scale_shift",
        conv_in_kernel=5,
        only_cross_attention=False,
        time_embedding_act_fn="gelu",
    )


@family(GROUP, share=SHARE)
def deepfloyd_upscaler(h: int, w: int) -> Call:
    call = unet(
        h,
        w,
        in_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        class_embed_type="timestep",
        cross_attention_dim=16,
        block_out_channels=(16, 16),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        cross_attention_norm="layer_norm",
        act_fn="gelu",
        resnet_time_scale_shift="scale_shift",
        resnet_skip_time_act=True,
        resnet_out_scale_factor=1.414,
        only_cross_attention=True,
        mid_block_only_cross_attention=True,
    )
    call.kwargs["class_labels"] = torch.tensor([20.0, 250.0])
    return call


@family(GROUP, share=SHARE)
def kandinsky22(h: int, w: int) -> Call:
    call = unet(
        h,
        w,
        addition_embed_type="image",
        encoder_hid_dim_type="image_proj",
        encoder_hid_dim=20,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        resnet_time_scale_shift="scale_shift",
    )
    call.kwargs["added_cond_kwargs"] = {"image_embeds": randn(2, 20)}
    return call


@family(GROUP, share=SHARE)
def kandinsky_hint(h: int, w: int) -> Call:
    call = unet(
        h, w, in_channels=8, addition_embed_type="image_hint", encoder_hid_dim_type="image_proj", encoder_hid_dim=20
    )
    call.kwargs["sample"] = randn(2, 4, h, w)
    call.kwargs["added_cond_kwargs"] = {"image_embeds": randn(2, 20), "hint": randn(2, 3, h * 8, w * 8)}
    return call


@family(GROUP, share=SHARE, sizes=((40, 16), (64, 16)))
def kandinsky3(h: int, w: int) -> Call:
    import diffusers

    module = randomise(
        diffusers.Kandinsky3UNet(
            in_channels=4,
            time_embedding_dim=16,
            groups=2,
            attention_head_dim=4,
            layers_per_block=3,
            block_out_channels=(8, 16, 32, 64),
            cross_attention_dim=8,
            encoder_hid_dim=20,
        )
    )
    mask = torch.ones(2, 7)
    mask[1, 5:] = 0
    return Call(
        module,
        {
            "sample": randn(2, 4, h, w),
            "timestep": torch.tensor(5.0),
            "encoder_hidden_states": randn(2, 7, 20),
            "encoder_attention_mask": mask,
        },
    )


@family(GROUP, share=SHARE)
def k_upscaler(h: int, w: int) -> Call:
    """The latent upscaler: blocks of k-diffusion with resampling by filters."""
    return unet(
        h,
        w,
        in_channels=8,
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
        up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
        block_out_channels=(32, 64, 64),
        time_embedding_dim=64,
        cross_attention_dim=12,
        mid_block_type=None,
        time_embedding_type="fourier",
        act_fn="gelu",
        conv_in_kernel=1,
        conv_out_kernel=1,
        resnet_time_scale_shift="scale_shift",
        timestep_post_act="gelu",
        attention_head_dim=16,
        norm_num_groups=None,
        only_cross_attention=False,
        resnet_skip_time_act=False,
        time_cond_proj_dim=None,
        layers_per_block=4,
    )


@family(GROUP, share=SHARE)
def x4_upscaler(h: int, w: int) -> Call:
    """Stable Diffusion's upscaler: a small picture beside the latents, and its noise as a class."""
    call = unet(
        h, w, in_channels=7, num_class_embeds=20, only_cross_attention=(True, False), use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    call.kwargs["class_labels"] = torch.tensor([13, 13])
    return call


@family(GROUP, share=SHARE)
def audioldm2(h: int, w: int) -> Call:
    import diffusers

    module = randomise(
        diffusers.AudioLDM2UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=([None, 12, 16], [None, 12, 16]),
            attention_head_dim=4,
            transformer_layers_per_block=1,
        )
    )
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 4:] = False
    return Call(
        module,
        {
            "sample": randn(2, 4, h, w),
            "timestep": torch.tensor(5.0),
            "encoder_hidden_states": randn(2, 5, 12),
            "encoder_hidden_states_1": randn(2, 6, 16),
            "encoder_attention_mask_1": mask,
        },
    )


@family(GROUP, share=SHARE)
def stable_cascade_prior(h: int, w: int) -> Call:
    import diffusers

    module = randomise(
        diffusers.StableCascadeUNet(
            in_channels=4,
            out_channels=4,
            timestep_ratio_embedding_dim=8,
            conditioning_dim=16,
            block_out_channels=(16, 16),
            num_attention_heads=(2, 2),
            down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1),
            clip_text_in_channels=12,
            clip_text_pooled_in_channels=12,
            clip_image_in_channels=10,
            clip_seq=2,
            switch_level=(False,),
        )
    )
    return Call(
        module,
        {
            "sample": randn(2, 4, h, w),
            "timestep_ratio": torch.tensor([0.6, 0.6]),
            "clip_text_pooled": randn(2, 1, 12),
            "clip_text": randn(2, 5, 12),
            "clip_img": randn(2, 1, 10),
        },
        {"sample": 2},
    )


@family(GROUP, share=SHARE)
def stable_cascade_decoder(h: int, w: int) -> Call:
    import diffusers

    module = randomise(
        diffusers.StableCascadeUNet(
            in_channels=4,
            out_channels=4,
            timestep_ratio_embedding_dim=8,
            patch_size=2,
            conditioning_dim=16,
            block_out_channels=(8, 16),
            num_attention_heads=(0, 2),
            down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1),
            down_blocks_repeat_mappers=(1, 1),
            up_blocks_repeat_mappers=(2, 2),
            block_types_per_layer=(
                ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
                ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
            ),
            clip_text_pooled_in_channels=12,
            clip_seq=2,
            effnet_in_channels=6,
            pixel_mapper_in_channels=3,
            timestep_conditioning_type=("sca",),
            kernel_size=3,
            self_attn=True,
        )
    )
    return Call(
        module,
        {
            "sample": randn(2, 4, h, w),
            "timestep_ratio": torch.tensor([0.6, 0.6]),
            "clip_text_pooled": randn(2, 1, 12),
            "effnet": randn(2, 6, 12, 5),
            "pixels": randn(2, 3, 8, 8),
        },
    )


@family(GROUP, share=SHARE)
def dreamlite(h: int, w: int) -> Call:
    from diffusers.models.unets.unet_dreamlite import DreamLiteUNetModel

    module = randomise(
        DreamLiteUNetModel(
            sample_size=16,
            layers_per_block=1,
            block_out_channels=(8, 16, 16),
            norm_num_groups=4,
            cross_attention_dim=12,
            attention_head_dim=4,
        )
    )
    return Call(
        module,
        {
            "sample": randn(2, 4, h, w),
            "timestep": torch.tensor(5.0),
            "encoder_hidden_states": randn(2, 7, 12),
        },
    )


@family(GROUP, share=SHARE)
def sd15_odd(h: int, w: int) -> Call:
    """A height that the strides do not divide: upsampling is by fractions."""
    return unet(
        h + 1,
        w + 1,
        block_out_channels=(8, 16, 16),
        down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
    )
