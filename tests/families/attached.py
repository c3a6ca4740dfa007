"""diffusers' image UNets with control networks, adapters, LoRA, and other attention processors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.families.base import Call, family, randn, randomise
from tests.families.condition import GROUP, SHARE, unet


@family(GROUP, share=SHARE)
def with_control_residuals(h: int, w: int) -> Call:
    """ControlNet's residuals as spatial inputs at every level."""
    call = unet(h, w)
    call.kwargs["down_block_additional_residuals"] = [
        randn(2, 8, h, w),
        randn(2, 8, h, w, seed=1),
        randn(2, 8, h // 2, w // 2),
        randn(2, 16, h // 2, w // 2),
    ]
    call.kwargs["mid_block_additional_residual"] = randn(2, 16, h // 2, w // 2, seed=1)
    return call


@family(GROUP, share=SHARE)
def with_adapter_residuals(h: int, w: int) -> Call:
    """T2I-Adapter: one residual per block."""
    call = unet(h, w)
    call.kwargs["down_intrablock_additional_residuals"] = [randn(2, 8, h, w), randn(2, 16, h // 2, w // 2)]
    return call


@family(GROUP, share=SHARE)
def gligen(h: int, w: int) -> Call:
    """Grounding tokens appended to the image's tokens and removed again."""
    call = unet(h, w, attention_type="gated")
    call.kwargs["cross_attention_kwargs"] = {
        "gligen": {"boxes": torch.rand(2, 3, 4), "positive_embeddings": randn(2, 3, 12), "masks": torch.ones(2, 3)}
    }
    return call


@family(GROUP, share=SHARE)
def ip_adapter(h: int, w: int) -> Call:
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    call = unet(h, w)
    module: Any = call.module
    processors = {}
    for name, old in module.attn_processors.items():
        if name.endswith("attn1.processor"):
            processors[name] = old
        else:
            width = module.get_submodule(name.removesuffix(".processor")).to_q.out_features
            processors[name] = IPAdapterAttnProcessor2_0(width, 12, num_tokens=(4,), scale=0.7)
    module.set_attn_processor(processors)
    module.encoder_hid_proj = MultiIPAdapterImageProjection(
        [ImageProjection(image_embed_dim=10, cross_attention_dim=12, num_image_text_embeds=4)]
    )
    module.config.encoder_hid_dim_type = "ip_image_proj"
    randomise(module)
    call.kwargs["added_cond_kwargs"] = {"image_embeds": [randn(2, 1, 10)]}
    return call


@family(GROUP, share=SHARE, needs="peft")
def lora(h: int, w: int) -> Call:
    from peft import LoraConfig

    call = unet(h, w)
    call.module.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1"]))  # type: ignore[operator]
    randomise(call.module)
    return call


@family(GROUP, share=SHARE)
def freeu(h: int, w: int) -> Call:
    """Skip connections filtered in the frequency domain: an FFT over rows and columns."""
    call = unet(h, w)
    call.module.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)  # type: ignore[operator]
    return call


@family(GROUP, share=SHARE)
def circular(h: int, w: int) -> Call:
    """Seamless tiles: all convolutions pad circularly."""
    call = unet(h, w)
    for m in call.module.modules():
        if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1):
            m.padding_mode = "circular"
            m._reversed_padding_repeated_twice = [m.padding[1]] * 2 + [m.padding[0]] * 2  # type: ignore[list-item]
    return call


@family(GROUP, share=SHARE)
def sliced_attention(h: int, w: int) -> Call:
    """Attention in slices over heads, written by baddbmm into a preallocated result."""
    call = unet(h, w)
    call.module.set_attention_slice(1)  # type: ignore[operator]
    return call


@family(GROUP, share=SHARE)
def plain_attention(h: int, w: int) -> Call:
    """The processor without scaled_dot_product_attention: baddbmm, softmax, bmm."""
    from diffusers.models.attention_processor import AttnProcessor

    call = unet(h, w)
    call.module.set_attn_processor(AttnProcessor())  # type: ignore[operator]
    return call


@family(GROUP, share=SHARE)
def controlnet(h: int, w: int) -> Call:
    """Residuals at every level as outputs; the hint is eight times as tall."""
    import diffusers

    module = randomise(
        diffusers.ControlNetModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=12,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            conditioning_embedding_out_channels=(4, 4, 8, 8),
        )
    )
    return Call(
        module,
        {
            "sample": randn(1, 4, h, w),
            "timestep": torch.tensor(5.0),
            "encoder_hidden_states": randn(1, 7, 12),
            "controlnet_cond": randn(1, 3, h * 8, w * 8),
        },
    )


class _Modulated(nn.Module):
    """SUPIR's way of control: the control network's features scale and shift normalised skip connections."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        small = {
            "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 12,
            "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        }  # fmt: skip
        import diffusers

        self.unet = diffusers.UNet2DConditionModel(**small, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
        self.control = diffusers.ControlNetModel(**small, conditioning_embedding_out_channels=(4, 4, 8, 8))
        self.shared = nn.ModuleList(nn.Conv2d(c, 8, 3, padding=1) for c in widths)
        self.scale, self.shift = (nn.ModuleList(nn.Conv2d(8, c, 3, padding=1) for c in widths) for _ in range(2))

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, hint: Tensor) -> Tensor:
        net, text = self.unet, encoder_hidden_states
        control, _ = self.control(sample, timestep, text, hint, return_dict=False)
        steps = net.time_embedding(net.time_proj(timestep.expand(sample.shape[0])).to(sample.dtype))
        x = net.conv_in(sample)
        skips = [x]
        for block in net.down_blocks:
            more = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
            x, found = block(hidden_states=x, temb=steps, **more)
            skips += found
        x = net.mid_block(x, steps, encoder_hidden_states=text)
        for i, (skip, feature) in enumerate(zip(skips, control, strict=True)):
            seen = nn.functional.silu(self.shared[i](feature))
            flat = nn.functional.group_norm(skip, 4)
            skips[i] = flat * (1 + self.scale[i](seen)) + self.shift[i](seen)
        for block in net.up_blocks:
            count = len(block.resnets)
            skips, taken = skips[:-count], tuple(skips[-count:])
            more = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
            x = block(hidden_states=x, temb=steps, res_hidden_states_tuple=taken, **more)
        return net.conv_out(net.conv_act(net.conv_norm_out(x)))  # type: ignore[no-any-return]


@family(GROUP, share=SHARE)
def modulated_control(h: int, w: int) -> Call:
    """A network of restoration, as SUPIR: control in the same call, by scales and shifts."""
    module = randomise(_Modulated([8, 8, 8, 16]))
    return Call(module, {
        "sample": randn(1, 4, h, w), "timestep": torch.tensor(521.0), "encoder_hidden_states": randn(1, 7, 12),
        "hint": randn(1, 3, h * 8, w * 8),
    })  # fmt: skip


@family(GROUP, share=SHARE)
def controlnet_xs(h: int, w: int) -> Call:
    import diffusers

    module = randomise(
        diffusers.UNetControlNetXSModel(
            sample_size=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16),
            cross_attention_dim=12,
            transformer_layers_per_block=1,
            num_attention_heads=2,
            norm_num_groups=4,
            ctrl_block_out_channels=(4, 8),
            ctrl_num_attention_heads=2,
            ctrl_max_norm_num_groups=2,
            ctrl_conditioning_embedding_out_channels=(4, 4, 8, 8),
        )
    )
    return Call(
        module,
        {
            "sample": randn(1, 4, h, w),
            "timestep": torch.tensor(5.0),
            "encoder_hidden_states": randn(1, 7, 12),
            "controlnet_cond": randn(1, 3, h * 8, w * 8),
        },
    )
