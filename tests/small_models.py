"""Small configurations of the networks that people use, every parameter random and none left zero."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel

import districompile as dc
from districompile.ir.captured import CapturedModule
from districompile.models.autoencoder import VaeDecoder

Call = tuple[nn.Module, dict[str, Any]]


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter: many UNets start with their last convolution at zero, which would hide any error before
    it."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        std = 0.3 if p.ndim < 2 else 1.0 / math.sqrt(p[0].numel())
        p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype) * std + (0.7 if p.ndim < 2 else 0.0)
    return module.eval()


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


_SD = {
    "sample_size": 16, "layers_per_block": 1, "block_out_channels": (16, 32, 32, 32), "norm_num_groups": 4,
    "cross_attention_dim": 24, "attention_head_dim": 4,
}  # fmt: skip


def _condition(batch: int, h: int, w: int, **config: Any) -> Call:
    module: Any = randomise(UNet2DConditionModel(**{**_SD, **config}))
    cross = int(module.config["cross_attention_dim"])
    return module, {
        "sample": _randn(batch, int(module.config["in_channels"]), h, w),
        "timestep": torch.tensor(521.0),
        "encoder_hidden_states": _randn(batch, 7, cross),
    }


def sd15(batch: int, h: int, w: int) -> Call:
    return _condition(batch, h, w)


def sd21(batch: int, h: int, w: int) -> Call:
    return _condition(
        batch,
        h,
        w,
        use_linear_projection=True,
        attention_head_dim=(2, 4, 4, 4),
        upcast_attention=True,
        dual_cross_attention=False,
    )


def inpainting(batch: int, h: int, w: int) -> Call:
    return _condition(batch, h, w, in_channels=9)


def instruct_pix2pix(batch: int, h: int, w: int) -> Call:
    return _condition(batch, h, w, in_channels=8)


def _xl(batch: int, h: int, w: int, ids: int, **config: Any) -> Call:
    module, kwargs = _condition(
        batch, h, w, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=12 + 8 * ids, **config,
    )  # fmt: skip
    kwargs["added_cond_kwargs"] = {"text_embeds": _randn(batch, 12), "time_ids": _randn(batch, ids) * 100}
    return module, kwargs


def sdxl(batch: int, h: int, w: int) -> Call:
    return _xl(
        batch, h, w, 6, block_out_channels=(16, 32, 32), attention_head_dim=[2, 4, 4],
        transformer_layers_per_block=[1, 1, 2],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def refiner(batch: int, h: int, w: int) -> Call:
    return _xl(
        batch, h, w, 5, block_out_channels=(16, 32, 32, 32), attention_head_dim=[2, 4, 4, 4],
        transformer_layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def unet2d(batch: int, h: int, w: int) -> Call:
    module = randomise(
        UNet2DModel(
            sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32, 32),
            norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
        )
    )  # fmt: skip
    return module, {"sample": _randn(batch, 3, h, w), "timestep": torch.tensor(10)}


def vae_decoder(batch: int, h: int, w: int) -> Call:
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16), norm_num_groups=4, layers_per_block=1, latent_channels=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    return randomise(VaeDecoder(vae)), {"z": _randn(batch, 4, h, w)}


MODELS: dict[str, Callable[[int, int, int], Call]] = {
    f.__name__: f for f in (sd15, sd21, sdxl, refiner, inpainting, instruct_pix2pix, unet2d, vae_decoder)
}


@functools.lru_cache(maxsize=2)
def reference(name: str, batch: int, h: int, w: int) -> tuple[nn.Module, dict[str, Any], Tensor]:
    """A model, its arguments and what it computes on one device."""
    module, kwargs = MODELS[name](batch, h, w)
    with torch.no_grad():
        return module, kwargs, first(module(**kwargs))


@functools.lru_cache(maxsize=2)
def captured(name: str, batch: int, h: int, w: int) -> CapturedModule:
    """The graph of that model, which takes longer than to cut it: conversions leave it as it is."""
    module, kwargs, _ = reference(name, batch, h, w)
    return dc.capture(module, kwargs=kwargs)


def first(output: Any) -> Tensor:
    """The tensor of an output."""
    return output if isinstance(output, Tensor) else output[0]


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())
