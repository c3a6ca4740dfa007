"""Example inputs of the known model classes, read off their configuration: no model is known by its name.

``convert`` captures a model with these tensors (only their shapes and dtypes matter there); ``verify`` computes with
them. Names and defaults of the configuration keys are diffusers'. ``return_dict`` stays at its default, the output
object: a program made so can give both that and a tuple.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from districompile.errors import Error


class ModelError(Error):
    """A model is unknown, cannot be loaded, or does not work at the size asked for."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One call of a model: ``module(*args, **kwargs)``. ``rows`` names the inputs that are cut, and in which dim."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: dict[str, int] | None


@dataclasses.dataclass(frozen=True)
class Context:
    """What the folder around a component says about its inputs. All optional: a bare component has none.

    ``factor``: pixels per latent row (1: the model works on pixels). ``tokens``: text length. ``pooled``: width of the
    pooled text embedding. ``aesthetic``: five size conditions instead of six. ``guidance``: parts of a guided call.
    """

    factor: int = 1
    tokens: int = 77
    pooled: int | None = None
    aesthetic: bool | None = None
    guidance: int = 2


@dataclasses.dataclass(frozen=True)
class Size:
    """``height`` x ``width`` pixels, ``batch`` rows of the batch dimension (guidance included)."""

    height: int
    width: int
    batch: int


def latent_size(size: Size, factor: int, multiple: int = 1) -> tuple[int, int]:
    """Pixels to latent rows and columns. Raises :class:`ModelError` naming the nearest sizes that work, where
    ``factor * multiple`` does not divide them."""
    for name, pixels in (("height", size.height), ("width", size.width)):
        step = factor * multiple
        if pixels > 0 and pixels % step == 0:
            continue
        below = max(pixels, 0) // step * step
        near = f"{below} or {below + step}" if below else f"{step}"
        why = "it must be above 0 and" if pixels <= 0 else "it must be"
        divisible = f" a multiple of {step}" if step > 1 else " 1 or more"
        raise ModelError(f"{name} {pixels} does not work: {why}{divisible}; the nearest that works: {near}")
    return size.height // factor, size.width // factor


class _Random:
    """Reproducible values: the same seed gives the same example on every machine."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self._dtype)

    def below(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=self._generator)


def condition_unet(config: Mapping[str, Any], context: Context, size: Size, dtype: torch.dtype, seed: int) -> Example:
    """Inputs of a ``UNet2DConditionModel``. Latent sizes that its strides do not divide work too: it resizes on the way
    up."""
    random = _Random(seed, dtype)
    rows, columns = latent_size(size, context.factor)
    b = size.batch
    cross = _first_int(config.get("cross_attention_dim"), 1280)
    hidden = config.get("encoder_hid_dim")
    projected = config.get("encoder_hid_dim_type")
    added: dict[str, Tensor] = {}
    cut = {"sample": 2}
    channels = int(config.get("in_channels", 4))
    kind = config.get("addition_embed_type")
    if kind == "text_time":
        step = int(config["addition_time_embed_dim"])
        ids, pooled = _time_ids(int(config["projection_class_embeddings_input_dim"]), step, cross, context)
        sizes = (
            [size.height, size.width, 0, 0, size.height, size.width] if ids == 6 else [size.height, size.width, 0, 0, 6]
        )
        added["text_embeds"] = random(b, pooled)
        added["time_ids"] = torch.tensor([(sizes * ids)[:ids]] * b, dtype=dtype)
    elif kind == "text_image":
        added["text_embeds"] = random(b, cross)
    elif kind == "image_hint":
        # The hint is embedded to four latent channels, which the model appends to the sample itself.
        added["hint"] = random(b, 3, rows * 8, columns * 8)
        cut["added_cond_kwargs.hint"] = 2
        channels -= 4
    if kind in ("image", "image_hint") or projected == "image_proj":
        added["image_embeds"] = random(b, int(hidden or cross))
    elif kind == "text_image" or projected == "text_image_proj":
        added["image_embeds"] = random(b, cross)

    kwargs: dict[str, Any] = {"encoder_hidden_states": random(b, context.tokens, int(hidden or cross))}
    labels = _class_labels(config, b, random)
    if labels is not None:
        kwargs["class_labels"] = labels
    if config.get("time_cond_proj_dim") is not None:
        kwargs["timestep_cond"] = random(b, int(config["time_cond_proj_dim"]))
    if added:
        kwargs["added_cond_kwargs"] = added
    return Example((random(b, channels, rows, columns), _timestep()), kwargs, cut)


def unet(config: Mapping[str, Any], context: Context, size: Size, dtype: torch.dtype, seed: int) -> Example:
    """Inputs of a ``UNet2DModel``, whose sizes must be multiples of its strides."""
    random = _Random(seed, dtype)
    strides = 2 ** (len(config["block_out_channels"]) - 1)
    rows, columns = latent_size(size, context.factor, strides)
    kwargs: dict[str, Any] = {}
    labels = _class_labels(config, size.batch, random)
    if labels is not None:
        kwargs["class_labels"] = labels
    sample = random(size.batch, int(config.get("in_channels", 3)), rows, columns)
    return Example((sample, _timestep()), kwargs, {"sample": 2})


def vae_decoder(config: Mapping[str, Any], context: Context, size: Size, dtype: torch.dtype, seed: int) -> Example:
    """Inputs of :class:`districompile.models.sources.VaeDecoder`: latents of the picture."""
    rows, columns = latent_size(size, vae_factor(config))
    z = _Random(seed, dtype)(size.batch, int(config.get("latent_channels", 4)), rows, columns)
    return Example((z,), {}, {"z": 2})


def vae_factor(config: Mapping[str, Any]) -> int:
    """Pixels per latent row of an autoencoder: each of its levels but the last halves the map."""
    levels = config.get("block_out_channels") or config.get("encoder_block_out_channels") or (0,)
    return int(2 ** (len(levels) - 1))


def default_size(config: Mapping[str, Any], factor: int) -> tuple[int, int] | None:
    """Height and width in pixels that the model was made for, or None where its configuration does not say."""
    size = config.get("sample_size")
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return int(height) * factor, int(width) * factor


def _timestep() -> Tensor:
    # Schedulers pass integers and fractions; a float32 scalar holds both, and the program converts what it is given.
    return torch.tensor(500.0)


def _first_int(value: Any, default: int) -> int:
    while isinstance(value, Sequence):
        value = value[0]
    return default if value is None else int(value)


def _time_ids(total: int, step: int, cross: int, context: Context) -> tuple[int, int]:
    """How many size conditions there are, and how wide the pooled text embedding is: together they fill ``total``."""
    if context.pooled is not None and (total - context.pooled) % step == 0:
        return (total - context.pooled) // step, context.pooled
    # Without the text encoder's word for it: the refiner's pooled embedding is as wide as its only text encoder's
    # states.
    five = context.aesthetic if context.aesthetic is not None else total - 5 * step == cross
    ids = 5 if five else 6
    if total <= ids * step:
        raise ModelError(f"projection_class_embeddings_input_dim {total} leaves no room for {ids} time ids of {step}")
    return ids, total - ids * step


def _class_labels(config: Mapping[str, Any], batch: int, random: _Random) -> Tensor | None:
    kind = config.get("class_embed_type")
    if kind is None:
        count = config.get("num_class_embeds")
        return None if count is None else random.below(int(count), batch)
    if kind == "timestep":
        return torch.full((batch,), 20.0)
    if kind == "identity":
        width = config.get("time_embedding_dim") or config["block_out_channels"][0] * 4
        return random(batch, int(width))
    if kind in ("projection", "simple_projection"):
        return random(batch, int(config["projection_class_embeddings_input_dim"]))
    raise ModelError(
        f"class_embed_type {kind!r} is not known; give a factory (package.module:function) with its inputs"
    )


def guided_batch(batch: int, cfg: str, parts: int) -> int:
    """Rows of the batch dimension of one call: ``batch`` images, times the guidance parts that share the call."""
    if batch < 1:
        raise ModelError(f"batch {batch} does not work: it must be 1 or more")
    if cfg == "split" and parts != 2:
        raise ModelError(f"cfg split needs two guidance halves, and this pipeline makes {parts}; use cfg batch")
    return batch if cfg == "none" else batch * parts


def parameter_bytes(module: torch.nn.Module) -> int:
    """Bytes of the module's parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors)
