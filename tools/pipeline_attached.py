# SPDX-License-Identifier: Apache-2.0
"""More kinds of pipelines: what is attached to a UNet, guidance of other forms, DeepFloyd IF, and video."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from pipeline_kinds import _CONTROL, _GUIDANCE, _SIZE, _VIDEO, Draw, drawing, kind, tensor_of
from pipeline_parts import (
    WIDE,
    controlnet,
    ddim,
    feature_extractor,
    image_encoder,
    noise,
    picture,
    quiet,
    randomise,
    stable_diffusion,
    text,
    text_encoder,
    tokenizer,
    unet,
    vae,
)
from torch import Tensor


def _if_unet(**config: Any) -> Any:
    return unet(**{
        "in_channels": 3, "out_channels": 6, "sample_size": 8, "act_fn": "gelu", "block_out_channels": (16, 16),
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "cross_attention_norm": "group_norm",
        "cross_attention_dim": 32, "addition_embed_type": "text", "addition_embed_type_num_heads": 4,
        "encoder_hid_dim": WIDE, "encoder_hid_dim_type": "text_proj", "resnet_time_scale_shift": "scale_shift",
        **config,
    })  # fmt: skip


def _ddpm() -> Any:
    return diffusers.DDPMScheduler(variance_type="learned_range", thresholding=True)


@kind("DeepFloyd IF")
def deepfloyd() -> tuple[Any, Draw]:
    parts = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
    pipe = diffusers.IFPipeline(**parts, unet=_if_unet(), scheduler=_ddpm(), requires_safety_checker=False)
    return drawing(quiet(pipe), height=8, width=8, **text())


@kind("DeepFloyd IF")
def deepfloyd_upscaler() -> tuple[Any, Draw]:
    parts = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
    net = _if_unet(in_channels=6, class_embed_type="timestep")
    pipe = diffusers.IFSuperResolutionPipeline(
        **parts, unet=net, scheduler=_ddpm(), image_noising_scheduler=diffusers.DDPMScheduler(),
        requires_safety_checker=False,
    )  # fmt: skip
    return drawing(quiet(pipe), image=picture(1, 8), height=16, width=16, **text())


def _with_controlnet(nets: Any, **given: Any) -> tuple[Any, Draw]:
    pipe = stable_diffusion("StableDiffusionControlNetPipeline", controlnet=nets)
    return drawing(pipe, **text(), **_SIZE, **given)


@kind(_CONTROL)
def controlnet_one() -> tuple[Any, Draw]:
    return _with_controlnet(controlnet(), image=picture(1))


@kind(_CONTROL)
def controlnet_two() -> tuple[Any, Draw]:
    images = [picture(1), picture(2)]
    return _with_controlnet([controlnet(), controlnet(1)], image=images, controlnet_conditioning_scale=[0.7, 0.3])


@kind(_CONTROL)
def controlnet_guess() -> tuple[Any, Draw]:
    return _with_controlnet(controlnet(), image=picture(1), guess_mode=True)


@kind(_CONTROL)
def controlnet_in_part() -> tuple[Any, Draw]:
    """A ControlNet that starts late and ends early."""
    return _with_controlnet(controlnet(), image=picture(1), control_guidance_start=0.3, control_guidance_end=0.7)


@kind(_CONTROL)
def t2i_adapter() -> tuple[Any, Draw]:
    adapter = randomise(diffusers.T2IAdapter(in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2))
    pipe = stable_diffusion("StableDiffusionAdapterPipeline", adapter=adapter)
    return drawing(pipe, image=picture(1), **text(), **_SIZE)


@kind(_CONTROL)
def gligen() -> tuple[Any, Draw]:
    """Grounding by boxes, switched off after a part of the steps."""
    pipe = stable_diffusion(
        "StableDiffusionGLIGENPipeline", unet=unet(attention_type="gated"), tokenizer=tokenizer(),
        text_encoder=text_encoder(),
    )  # fmt: skip

    def draw(steps: int) -> Tensor:
        found = pipe(
            "a red circle", gligen_phrases=["a circle"], gligen_boxes=[[0.1, 0.2, 0.7, 0.8]],
            gligen_scheduled_sampling_beta=0.5, num_inference_steps=steps, output_type="pt",
            generator=torch.Generator().manual_seed(0), **_SIZE,
        )  # fmt: skip
        return tensor_of(found)

    return pipe, draw


def _ip_weights(net: Any, tokens: int = 4) -> dict[str, Any]:
    """Return random weights of an image prompt adapter for ``net``, in the names that files of them have."""
    layers: dict[str, Tensor] = {}
    number = 1
    for name in net.attn_processors:
        if "attn2" not in name:
            continue
        block = name.split(".")
        wide = (
            16
            if block[0] == "mid_block"
            else net.config.block_out_channels[:: -1 if block[0] == "up_blocks" else 1][int(block[1])]
        )
        for part in ("k", "v"):
            layers[f"{number}.to_{part}_ip.weight"] = noise(number, wide, WIDE) * 0.2
        number += 2
    projection = {
        "proj.weight": noise(7, tokens * WIDE, WIDE) * 0.2, "proj.bias": noise(8, tokens * WIDE),
        "norm.weight": noise(9, WIDE), "norm.bias": noise(10, WIDE),
    }  # fmt: skip
    return {"image_proj": projection, "ip_adapter": layers}


@kind(_CONTROL)
def ip_adapter() -> tuple[Any, Draw]:
    pipe = stable_diffusion(
        "StableDiffusionPipeline", image_encoder=image_encoder(), feature_extractor=feature_extractor()
    )
    pipe.load_ip_adapter(_ip_weights(pipe.unet), subfolder="", weight_name="", low_cpu_mem_usage=False)
    pipe.set_ip_adapter_scale(0.6)
    embeds = torch.cat([torch.zeros(1, 1, WIDE), noise(11, 1, 1, WIDE)])
    return drawing(pipe, ip_adapter_image_embeds=[embeds], **text(), **_SIZE)


@kind(_GUIDANCE)
def pag() -> tuple[Any, Draw]:
    """Perturbed attention beside guidance: three halves in a call."""
    pipe = stable_diffusion("StableDiffusionPAGPipeline", pag_applied_layers=["mid"])
    return drawing(pipe, pag_scale=2.0, **text(), **_SIZE)


def _sag() -> tuple[Any, Draw]:
    return drawing(stable_diffusion("StableDiffusionSAGPipeline"), sag_scale=0.7, **text(), **_SIZE)


@kind(_GUIDANCE, refused="forward hook")
def sag() -> tuple[Any, Draw]:
    """Self-attention guidance: it reads attention maps by hooks, which no engine has."""
    return _sag()


@kind(_GUIDANCE, components=("vae",))
def sag_without_unet() -> tuple[Any, Draw]:
    """The way out of the error: each rank computes the UNet."""
    return _sag()


@kind(_GUIDANCE)
def guidance_rescaled() -> tuple[Any, Draw]:
    return drawing(stable_diffusion("StableDiffusionPipeline"), guidance_rescale=0.7, **text(), **_SIZE)


@kind(_GUIDANCE)
def guidance_that_stops() -> tuple[Any, Draw]:
    """Guidance for the first half of the steps: the batch is halved midway."""
    pipe = stable_diffusion("StableDiffusionPipeline")

    def stop(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == pipe.num_timesteps // 2 - 1:
            pipe._guidance_scale = 0.0
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[1]
        return values

    return drawing(
        pipe, callback_on_step_end=stop, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"], **text(),
        **_SIZE,
    )  # fmt: skip


@kind(_GUIDANCE)
def guidance_in_two_calls() -> tuple[Any, Draw]:
    """Each half of guidance in a call of its own, as a sampler written by hand does."""
    pipe = stable_diffusion("StableDiffusionPipeline")

    @torch.no_grad()
    def draw(steps: int) -> Tensor:
        given = text()
        torch.manual_seed(0)  # some schedulers add noise
        pipe.scheduler.set_timesteps(steps)
        x = noise(0, 1, 4, 8, 8)
        for t in pipe.scheduler.timesteps:
            plain = pipe.unet(x, t, encoder_hidden_states=given["negative_prompt_embeds"]).sample
            guided = pipe.unet(x, t, encoder_hidden_states=given["prompt_embeds"]).sample
            x = pipe.scheduler.step(plain + 3.0 * (guided - plain), t, x).prev_sample
        return x

    return pipe, draw


@kind("features")
def freeu() -> tuple[Any, Draw]:
    net = unet(
        block_out_channels=(8, 16, 16), down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
    )  # fmt: skip
    pipe = stable_diffusion("StableDiffusionPipeline", unet=net)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return drawing(pipe, **text(), **_SIZE)


def lora_of(net: Any, seed: int = 20, rank: int = 2) -> dict[str, Tensor]:
    """Return a random LoRA of attention's and convolutions' layers, in diffusers' names."""
    found: dict[str, Tensor] = {}
    for name, module in net.named_modules():
        shape: tuple[int, ...] = tuple(getattr(getattr(module, "weight", None), "shape", ()))
        if len(shape) not in (2, 4) or not any(part in name for part in ("to_q", "to_v", "conv1")):
            continue
        down, up = (rank, *shape[1:]), (shape[0], rank, *[1] * (len(shape) - 2))
        found[f"unet.{name}.lora_A.weight"] = noise(seed, *down) * 0.3
        found[f"unet.{name}.lora_B.weight"] = noise(seed + 1, *up) * 0.3
        seed += 2
    return found


@kind("features")
def lora() -> tuple[Any, Draw]:
    """Two LoRAs by name with scales of their own."""
    pipe = stable_diffusion("StableDiffusionPipeline")
    given = {"one": lora_of(pipe.unet, 20), "two": lora_of(pipe.unet, 900)}
    for name, weights in given.items():
        pipe.load_lora_weights(weights, adapter_name=name)
    pipe.set_adapters(["one", "two"], [0.8, 0.4])
    return drawing(pipe, **text(), **_SIZE)


@kind("features")
def vae_tiling() -> tuple[Any, Draw]:
    pipe = stable_diffusion("StableDiffusionPipeline")
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 16, 8
    return drawing(pipe, **text(), height=24, width=24)


@kind(_VIDEO)
def animatediff() -> tuple[Any, Draw]:
    adapter = randomise(
        diffusers.MotionAdapter(
            block_out_channels=(8, 16),
            motion_layers_per_block=1,
            motion_norm_num_groups=2,
            motion_num_attention_heads=2,
        )
    )
    pipe = quiet(
        diffusers.AnimateDiffPipeline(vae(), text_encoder(), tokenizer(), unet(), adapter, ddim(beta_schedule="linear"))
    )
    return drawing(pipe, num_frames=2, **text(), **_SIZE)


@kind(_VIDEO)
def stable_video() -> tuple[Any, Draw]:
    net = randomise(
        diffusers.UNetSpatioTemporalConditionModel(
            block_out_channels=(32, 64), layers_per_block=2, sample_size=8, in_channels=8, out_channels=4,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=32,
            num_attention_heads=2, projection_class_embeddings_input_dim=96, addition_time_embed_dim=32,
        )
    )  # fmt: skip
    coder = randomise(
        diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 64), in_channels=3, out_channels=3, latent_channels=4, layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2, sample_size=16,
        )
    )  # fmt: skip
    pipe = diffusers.StableVideoDiffusionPipeline(
        coder, image_encoder(32), net, diffusers.EulerDiscreteScheduler(
            prediction_type="v_prediction", use_karras_sigmas=True, interpolation_type="linear",
            timestep_type="continuous", sigma_min=0.002, sigma_max=700.0,
        ), feature_extractor(),
    )  # fmt: skip
    return drawing(quiet(pipe), image=picture(1), num_frames=2, **_SIZE)
