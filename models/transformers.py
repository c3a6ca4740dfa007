# SPDX-License-Identifier: Apache-2.0
"""Make example inputs of diffusion transformers from their configuration, as their pipelines in diffusers make them.

Lengths of texts are the defaults of these pipelines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from districompile.models.inputs import Context, Example, ModelError, Size, latent_size, whole
from districompile.models.inputs import Random as Random

_FLUX_TOKENS = 512  # of T5, in FluxPipeline
_SD3_TOKENS = 256  # of T5, behind the 77 of CLIP, in StableDiffusion3Pipeline
_PIXELS = 1024  # the size that FluxPipeline draws by default: 128 latent rows of 8 pixels


def flux(config: Mapping[str, Any], context: Context, size: Size, dtype: torch.dtype, seed: int) -> Example:
    """Make inputs of a ``FluxTransformer2DModel``: packed patches of 2 x 2 latents, row by row, and their positions.

    Ranks divide the packed sequence, so that a rank has whole rows of patches wherever the rows allow it.
    """
    random = Random(seed, dtype)
    rows, columns = (n // 2 for n in latent_size(size, context.factor, 2))
    b = size.batch
    positions = torch.zeros(rows, columns, 3)
    positions[..., 1] += torch.arange(rows)[:, None]
    positions[..., 2] += torch.arange(columns)[None]
    kwargs: dict[str, Any] = {
        "hidden_states": random(b, rows * columns, whole(config, "in_channels", 64)),
        "encoder_hidden_states": random(b, _FLUX_TOKENS, whole(config, "joint_attention_dim", 4096)),
        "pooled_projections": random(b, whole(config, "pooled_projection_dim", 768)),
        "timestep": torch.full((b,), 0.5, dtype=dtype),
        "img_ids": positions.reshape(-1, 3).to(dtype),
        "txt_ids": torch.zeros(_FLUX_TOKENS, 3, dtype=dtype),
    }
    if config.get("guidance_embeds"):
        kwargs["guidance"] = torch.full((b,), 3.5)
    return Example((), kwargs, {"hidden_states": 1, "img_ids": 0})


def sd3(config: Mapping[str, Any], context: Context, size: Size, dtype: torch.dtype, seed: int) -> Example:
    """Make inputs of an ``SD3Transformer2DModel``: latents, and the texts of CLIP and T5 one after the other."""
    random = Random(seed, dtype)
    patch = whole(config, "patch_size", 2)
    rows, columns = latent_size(size, context.factor, patch)
    most = whole(config, "pos_embed_max_size", 96)
    if max(rows, columns) > most * patch:
        raise ModelError(
            f"height {size.height} and width {size.width} do not work: the model knows {most} positions a side, which "
            f"are {most * patch * context.factor} pixels"
        )
    b = size.batch
    kwargs = {
        "hidden_states": random(b, whole(config, "in_channels", 16), rows, columns),
        "encoder_hidden_states": random(b, context.tokens + _SD3_TOKENS, whole(config, "joint_attention_dim", 4096)),
        "pooled_projections": random(b, whole(config, "pooled_projection_dim", 2048)),
        "timestep": torch.full((b,), 500.0),
    }
    return Example((), kwargs, {"hidden_states": 2})


def default_size(config: Mapping[str, Any], factor: int) -> tuple[int, int]:
    """Return the height and width in pixels that a pipeline draws by default around a transformer without a size."""
    pixels = _PIXELS // 8 * factor
    return pixels, pixels
