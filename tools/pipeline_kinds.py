# SPDX-License-Identifier: Apache-2.0
"""Kinds of diffusers pipelines as small random ones, each with what draws one picture, for tests and the matrix.

A kind is a function that makes a pipeline and returns it with a function ``draw(steps)``, whose result is a tensor of
pictures or latents. Everything is seeded: two calls of a kind are the same pipeline, and draw the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from pipeline_parts import (
    WIDE,
    ddim,
    movq,
    noise,
    picture,
    pooled,
    quiet,
    randomise,
    stable_diffusion,
    text,
    text_encoder,
    tokenizer,
    unet,
    xl,
)
from torch import Tensor

Draw = Callable[[int], Tensor]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of pipeline. ``family`` is for the table.

    ``components``: those to enable, by default all. ``refused``: a part of the message that has to refuse the kind.
    """

    name: str
    family: str
    make: Callable[[], tuple[Any, Draw]]
    components: tuple[str, ...] | None = None
    refused: str = ""


KINDS: dict[str, Kind] = {}


def kind(family: str, **more: Any) -> Callable[[Callable[[], tuple[Any, Draw]]], Kind]:
    def add(make: Callable[[], tuple[Any, Draw]]) -> Kind:
        name = make.__name__
        KINDS[name] = Kind(name, family, make, **more)
        return KINDS[name]

    return add


def drawing(pipe: Any, **given: Any) -> tuple[Any, Draw]:
    """Return the pipeline and the function that calls it with ``given``."""

    def draw(steps: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        found = pipe(num_inference_steps=steps, generator=generator, output_type="pt", **given)
        return tensor_of(found)

    return pipe, draw


def tensor_of(output: Any) -> Tensor:
    found = next(iter(output.values())) if hasattr(output, "values") else output[0]
    if isinstance(found, list):
        found = torch.stack([torch.as_tensor(f) for f in found])
    return torch.as_tensor(found).detach().float()


_TEXT = "text to image"
_IMAGE = "image to image"
_CONTROL = "control"
_GUIDANCE = "guidance"
_VIDEO = "video"
_SIZE: dict[str, int] = {"height": 16, "width": 16}


@kind(_TEXT)
def text_to_image() -> tuple[Any, Draw]:
    return drawing(stable_diffusion("StableDiffusionPipeline"), **text(), **_SIZE)


@kind(_TEXT)
def several_images() -> tuple[Any, Draw]:
    return drawing(stable_diffusion("StableDiffusionPipeline"), num_images_per_prompt=2, **text(), **_SIZE)


@kind(_TEXT)
def several_prompts() -> tuple[Any, Draw]:
    return drawing(stable_diffusion("StableDiffusionPipeline"), **text(batch=2), **_SIZE)


@kind(_TEXT)
def prompt_of_154() -> tuple[Any, Draw]:
    return drawing(stable_diffusion("StableDiffusionPipeline"), **text(154), **_SIZE)


@kind(_TEXT)
def prompt_of_231() -> tuple[Any, Draw]:
    return drawing(stable_diffusion("StableDiffusionPipeline"), **text(231), **_SIZE)


@kind(_TEXT)
def textual_inversion() -> tuple[Any, Draw]:
    import copy

    known = copy.deepcopy(tokenizer())
    pipe = stable_diffusion("StableDiffusionPipeline", text_encoder=text_encoder(), tokenizer=known)
    pipe.load_textual_inversion({"<mine>": noise(5, WIDE)}, token="<mine>")
    return drawing(pipe, prompt="a red circle like <mine>", **_SIZE)


@kind(_TEXT)
def sdxl() -> tuple[Any, Draw]:
    pipe = stable_diffusion(
        "StableDiffusionXLPipeline", unet=xl(), text_encoder_2=text_encoder(True), tokenizer_2=tokenizer()
    )
    return drawing(pipe, **text(), **pooled(), **_SIZE)


@kind(_TEXT)
def sdxl_turbo() -> tuple[Any, Draw]:
    """One or a few steps without guidance."""
    pipe = stable_diffusion(
        "StableDiffusionXLPipeline", unet=xl(), text_encoder_2=text_encoder(True), tokenizer_2=tokenizer(),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing"),
    )  # fmt: skip
    return drawing(pipe, guidance_scale=0.0, **text(negative=False), **pooled(negative=False), **_SIZE)


@kind(_TEXT)
def sdxl_lightning() -> tuple[Any, Draw]:
    pipe = stable_diffusion(
        "StableDiffusionXLPipeline", unet=xl(), text_encoder_2=text_encoder(True), tokenizer_2=tokenizer(),
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="trailing"),
    )  # fmt: skip
    return drawing(pipe, guidance_scale=0.0, **text(negative=False), **pooled(negative=False), **_SIZE)


@kind(_TEXT)
def latent_consistency() -> tuple[Any, Draw]:
    pipe = stable_diffusion(
        "LatentConsistencyModelPipeline", unet=unet(time_cond_proj_dim=32), scheduler=diffusers.LCMScheduler()
    )
    return drawing(pipe, **text(negative=False), **_SIZE)


@kind(_IMAGE)
def image_to_image() -> tuple[Any, Draw]:
    return drawing(stable_diffusion("StableDiffusionImg2ImgPipeline"), image=picture(1), strength=0.8, **text())


@kind(_IMAGE)
def sdxl_refiner() -> tuple[Any, Draw]:
    pipe = stable_diffusion(
        "StableDiffusionXLImg2ImgPipeline", unet=xl(5), text_encoder_2=text_encoder(True), tokenizer_2=tokenizer(),
        requires_aesthetics_score=True,
    )  # fmt: skip
    return drawing(pipe, image=picture(1), strength=0.6, **text(), **pooled())


@kind(_IMAGE)
def inpainting_4() -> tuple[Any, Draw]:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    pipe = stable_diffusion("StableDiffusionInpaintPipeline")
    return drawing(pipe, image=picture(1), mask_image=mask, **text(), **_SIZE)


@kind(_IMAGE)
def inpainting_9() -> tuple[Any, Draw]:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    pipe = stable_diffusion("StableDiffusionInpaintPipeline", unet=unet(in_channels=9))
    return drawing(pipe, image=picture(1), mask_image=mask, **text(), **_SIZE)


@kind(_IMAGE)
def depth_to_image() -> tuple[Any, Draw]:
    pipe = stable_diffusion("StableDiffusionDepth2ImgPipeline", unet=unet(in_channels=5), depth_estimator=None)
    return drawing(pipe, image=picture(1), depth_map=picture(2)[:, 0], strength=0.8, **text())


@kind(_IMAGE)
def instruct_pix2pix() -> tuple[Any, Draw]:
    pipe = stable_diffusion("StableDiffusionInstructPix2PixPipeline", unet=unet(in_channels=8))
    return drawing(pipe, image=picture(1), **text())


@kind(_IMAGE)
def upscaler_x4() -> tuple[Any, Draw]:
    pipe = stable_diffusion(
        "StableDiffusionUpscalePipeline", unet=unet(in_channels=7, num_class_embeds=1000),
        low_res_scheduler=diffusers.DDPMScheduler(), max_noise_level=350,
    )  # fmt: skip
    return drawing(pipe, image=picture(1, 8), **text())


@kind(_IMAGE)
def upscaler_x2() -> tuple[Any, Draw]:
    net = unet(
        in_channels=8, out_channels=5, layers_per_block=4, block_out_channels=(32, 64, 64), time_embedding_dim=64,
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
        up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
        mid_block_type=None, time_embedding_type="fourier", act_fn="gelu", conv_in_kernel=1, conv_out_kernel=1,
        resnet_time_scale_shift="scale_shift", timestep_post_act="gelu", attention_head_dim=16, norm_num_groups=None,
        time_cond_proj_dim=WIDE + 128,
    )  # fmt: skip
    pipe = stable_diffusion(
        "StableDiffusionLatentUpscalePipeline", unet=net,
        scheduler=diffusers.EulerDiscreteScheduler(prediction_type="sample"),
    )  # fmt: skip
    return drawing(pipe, image=noise(6, 1, 4, 8, 8), **text(), **pooled())


@kind("cascades")
def kandinsky_2_2() -> tuple[Any, Draw]:
    pipe = quiet(diffusers.KandinskyV22Pipeline(kandinsky_unet(), ddim(), movq()))
    return drawing(pipe, image_embeds=noise(1, 1, 20), negative_image_embeds=noise(2, 1, 20), **_SIZE)


@kind("cascades")
def kandinsky_2_2_hint() -> tuple[Any, Draw]:
    net = kandinsky_unet(addition_embed_type="image_hint", in_channels=8)
    pipe = quiet(diffusers.KandinskyV22ControlnetPipeline(net, ddim(), movq()))
    given = {"image_embeds": noise(1, 1, 20), "negative_image_embeds": noise(2, 1, 20), "hint": picture(3, 64)}
    return drawing(pipe, **given, **_SIZE)


def kandinsky_unet(**config: Any) -> Any:
    return unet(**{
        "addition_embed_type": "image", "encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 20, "out_channels": 8,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "resnet_time_scale_shift": "scale_shift", **config,
    })  # fmt: skip


@kind("cascades")
def stable_cascade_prior() -> tuple[Any, Draw]:
    net = randomise(
        diffusers.StableCascadeUNet(
            in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, conditioning_dim=16,
            block_out_channels=(16, 16), num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1), clip_text_in_channels=WIDE, clip_text_pooled_in_channels=WIDE,
            clip_image_in_channels=10, clip_seq=2, switch_level=(False,), down_blocks_repeat_mappers=(1, 1),
            up_blocks_repeat_mappers=(1, 1), block_types_per_layer=(_CASCADE, _CASCADE),
        )
    )  # fmt: skip
    pipe = diffusers.StableCascadePriorPipeline(
        tokenizer(), text_encoder(True), net, diffusers.DDPMWuerstchenScheduler()
    )
    given = {
        "prompt_embeds": noise(1, 1, 7, WIDE), "negative_prompt_embeds": noise(2, 1, 7, WIDE),
        "prompt_embeds_pooled": noise(3, 1, 1, WIDE), "negative_prompt_embeds_pooled": noise(4, 1, 1, WIDE),
    }  # fmt: skip
    return drawing(quiet(pipe), height=340, width=340, **given)


_CASCADE = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")


@kind("cascades")
def stable_cascade_decoder() -> tuple[Any, Draw]:
    net = randomise(
        diffusers.StableCascadeUNet(
            in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, patch_size=2, conditioning_dim=16,
            block_out_channels=(8, 16), num_attention_heads=(0, 2), down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1), down_blocks_repeat_mappers=(1, 1), up_blocks_repeat_mappers=(2, 2),
            block_types_per_layer=(_CASCADE[:2], _CASCADE), clip_text_pooled_in_channels=WIDE, clip_seq=2,
            effnet_in_channels=4, pixel_mapper_in_channels=3, timestep_conditioning_type=("sca",), kernel_size=3,
            self_attn=True,
        )
    )  # fmt: skip
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    vqgan = randomise(PaellaVQModel(levels=1, bottleneck_blocks=1, embed_dim=8, latent_channels=4, num_vq_embeddings=8))
    pipe = diffusers.StableCascadeDecoderPipeline(
        net, tokenizer(), text_encoder(True), diffusers.DDPMWuerstchenScheduler(), vqgan, latent_dim_scale=4.0
    )
    return drawing(
        quiet(pipe), image_embeddings=noise(1, 1, 4, 4, 4), guidance_scale=2.0, prompt_embeds=noise(1, 1, 7, WIDE),
        negative_prompt_embeds=noise(2, 1, 7, WIDE), prompt_embeds_pooled=noise(3, 1, 1, WIDE),
        negative_prompt_embeds_pooled=noise(4, 1, 1, WIDE),
    )  # fmt: skip
