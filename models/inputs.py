# SPDX-License-Identifier: Apache-2.0
"""Make example inputs of the known model classes from their configuration. No model is known by its name.

``convert`` captures a model with these tensors; only their shapes and dtypes matter there. ``verify`` computes with
them. Names and defaults of configuration keys are those of diffusers. ``return_dict`` keeps its default, the output
object: such a program can return both the object and a tuple.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from districompile.models.errors import ModelError as ModelError


class SizeError(ModelError):
    """A requested height, width or batch does not work."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One call of a model: ``module(*args, **kwargs)``. ``rows`` maps each sharded input to the dim of its rows."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: dict[str, int] | None


@dataclasses.dataclass(frozen=True)
class Context:
    """Facts about a component's inputs from the pipeline's folder. A component without a pipeline has the defaults.

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
    """A size of inputs: ``height`` x ``width`` pixels, and ``batch`` elements of dim 0, guidance included.

    ``tokens``: the length of the text; None: that of the text encoder.
    """

    height: int
    width: int
    batch: int
    tokens: int | None = None


_LARGEST = 1 << 20  # pixels of a side, and values of other sizes


def whole(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Read a whole number of a configuration. Raises :class:`ModelError`, which names the key and the value."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST or value % 1:
        raise ModelError(f"{key} is {value!r}; it must be a whole number above 0 and below {_LARGEST}")
    return int(value)


def latent_size(size: Size, factor: int, multiple: int = 1) -> tuple[int, int]:
    """Convert pixels to latent rows and columns.

    Raises :class:`SizeError` with the nearest sizes that work if ``factor * multiple`` does not divide them.
    """
    for name, pixels in (("height", size.height), ("width", size.width)):
        step = factor * multiple
        if pixels > _LARGEST:
            raise SizeError(f"{name} {pixels} does not work: it must be at most {_LARGEST}")
        if pixels > 0 and pixels % step == 0:
            continue
        below = max(pixels, 0) // step * step
        near = f"{below} or {below + step}" if below else f"{step}"
        why = "it must be above 0 and" if pixels <= 0 else "it must be"
        divisible = f" a multiple of {step}" if step > 1 else " 1 or more"
        raise SizeError(f"{name} {pixels} does not work: {why}{divisible}; the nearest that works: {near}")
    return size.height // factor, size.width // factor


class Random:
    """Draw reproducible values: a seed gives the same example on every machine."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = dtype

    def __call__(self, *shape: int) -> Tensor:
        try:
            return torch.randn(shape, generator=self._generator).to(self._dtype)
        except RuntimeError as e:  # PyTorch has no exception class for a lack of CPU memory
            raise SizeError(f"inputs of shape {list(shape)} do not fit in memory: ask for a smaller size") from e

    def below(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=self._generator)


def condition_unet(config: Mapping[str, Any], context: Context, size: Size, dtype: torch.dtype, seed: int) -> Example:
    """Make inputs of a ``UNet2DConditionModel``.

    Latent sizes need not be multiples of its strides, because the model resizes on the way up.
    """
    random = Random(seed, dtype)
    rows, columns = latent_size(size, context.factor)
    b = size.batch
    cross = _first_int(config.get("cross_attention_dim"), 1280)
    hidden = None if config.get("encoder_hid_dim") is None else whole(config, "encoder_hid_dim")
    projected = config.get("encoder_hid_dim_type")
    added: dict[str, Tensor] = {}
    cut = {"sample": 2}
    channels = whole(config, "in_channels", 4)
    kind = config.get("addition_embed_type")
    if kind == "text_time":
        step = whole(config, "addition_time_embed_dim")
        ids, pooled = _time_ids(whole(config, "projection_class_embeddings_input_dim"), step, cross, context)
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
        added["image_embeds"] = random(b, hidden or cross)
    elif kind == "text_image" or projected == "text_image_proj":
        added["image_embeds"] = random(b, cross)

    # A model that projects image embeddings to its states takes none besides, and pipelines pass None.
    states = None if projected == "image_proj" else random(b, size.tokens or context.tokens, hidden or cross)
    kwargs: dict[str, Any] = {"encoder_hidden_states": states}
    labels = _class_labels(config, b, random)
    if labels is not None:
        kwargs["class_labels"] = labels
    if config.get("time_cond_proj_dim") is not None:
        kwargs["timestep_cond"] = random(b, whole(config, "time_cond_proj_dim"))
    if added:
        kwargs["added_cond_kwargs"] = added
    return Example((random(b, channels, rows, columns), _timestep(config)), kwargs, cut)


def unet(config: Mapping[str, Any], context: Context, size: Size, dtype: torch.dtype, seed: int) -> Example:
    """Make inputs of a ``UNet2DModel``, whose sizes must be multiples of its strides."""
    random = Random(seed, dtype)
    refuse_tokens(size)
    strides = vae_factor(config)
    rows, columns = latent_size(size, context.factor, strides)
    kwargs: dict[str, Any] = {}
    labels = _class_labels(config, size.batch, random)
    if labels is not None:
        kwargs["class_labels"] = labels
    sample = random(size.batch, whole(config, "in_channels", 3), rows, columns)
    return Example((sample, _timestep(config)), kwargs, {"sample": 2})


def vae_decoder(config: Mapping[str, Any], context: Context, size: Size, dtype: torch.dtype, seed: int) -> Example:
    """Make inputs of :class:`districompile.models.autoencoder.VaeDecoder`: the latents of a picture."""
    refuse_tokens(size)
    rows, columns = latent_size(size, vae_factor(config))
    z = Random(seed, dtype)(size.batch, whole(config, "latent_channels", 4), rows, columns)
    return Example((z,), {}, {"z": 2})


def vae_encoder(config: Mapping[str, Any], context: Context, size: Size, dtype: torch.dtype, seed: int) -> Example:
    """Make inputs of :class:`districompile.models.autoencoder.VaeEncoder`: the pixels of a picture."""
    refuse_tokens(size)
    latent_size(size, vae_factor(config))  # which refuses other sizes
    x = Random(seed, dtype)(size.batch, whole(config, "in_channels", 3), size.height, size.width)
    return Example((x,), {}, {"x": 2})


def refuse_tokens(size: Size) -> None:
    """Raise :class:`SizeError` for a text length that a model without text is asked for."""
    if size.tokens is not None:
        raise SizeError(f"tokens {size.tokens} does not work: the model takes no text")


def vae_factor(config: Mapping[str, Any]) -> int:
    """Return the pixels per latent row of an autoencoder: each level but the last halves the map."""
    key = "block_out_channels" if config.get("block_out_channels") else "encoder_block_out_channels"
    levels = config.get(key) or (0,)
    if isinstance(levels, str) or not isinstance(levels, Sequence) or len(levels) > 16:
        raise ModelError(f"{key} is {str(levels)[:60]!r}; it must be a list of at most 16 numbers")
    return int(2 ** (len(levels) - 1))


def default_size(config: Mapping[str, Any], factor: int) -> tuple[int, int] | None:
    """Return the height and width in pixels of the configuration, or None if it has none."""
    size = config.get("sample_size")
    if size is None:
        return None
    pair = size if isinstance(size, list | tuple) else [size, size]
    if len(pair) != 2:
        raise ModelError(f"sample_size is {size!r}; it must be a number, or a height and a width")
    height, width = (whole({"sample_size": value}, "sample_size") for value in pair)
    return height * factor, width * factor


def _timestep(config: Mapping[str, Any]) -> Tensor:
    """Return the middle of the range of timesteps; an integer for learned embeddings, which are looked up."""
    middle = min(500, whole(config, "num_train_timesteps", 1000) // 2)
    if config.get("time_embedding_type") == "learned":
        return torch.tensor(middle)
    # Schedulers pass integers and fractions; a float32 scalar holds both, and the program converts what it is given.
    return torch.tensor(float(middle))


def _first_int(value: Any, default: int) -> int:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return whole({"cross_attention_dim": value}, "cross_attention_dim", default)


def _time_ids(total: int, step: int, cross: int, context: Context) -> tuple[int, int]:
    """Return the number of size conditions and the width of the pooled text embedding: they fill ``total``."""
    if context.pooled is not None and (total - context.pooled) % step == 0:
        return (total - context.pooled) // step, context.pooled
    # The text encoder is not known: a refiner's pooled embedding is as wide as the states of its only text encoder.
    five = context.aesthetic if context.aesthetic is not None else total - 5 * step == cross
    ids = 5 if five else 6
    if total <= ids * step:
        raise ModelError(f"projection_class_embeddings_input_dim {total} leaves no room for {ids} time ids of {step}")
    return ids, total - ids * step


def _class_labels(config: Mapping[str, Any], batch: int, random: Random) -> Tensor | None:
    kind = config.get("class_embed_type")
    if kind is None:
        count = config.get("num_class_embeds")
        return None if count is None else random.below(whole(config, "num_class_embeds"), batch)
    if kind == "timestep":
        return torch.full((batch,), 20.0)
    if kind == "identity":
        width = config.get("time_embedding_dim") or config["block_out_channels"][0] * 4
        return random(batch, whole({"time_embedding_dim": width}, "time_embedding_dim"))
    if kind in ("projection", "simple_projection"):
        return random(batch, whole(config, "projection_class_embeddings_input_dim"))
    raise ModelError(
        f"class_embed_type {kind!r} is not known; give a factory (package.module:function) with its inputs"
    )


def guided_batch(batch: int, cfg: str, parts: int) -> int:
    """Return the size of dim 0 of one call: ``batch`` images times the guidance parts that share the call."""
    if not 1 <= batch <= _LARGEST:
        raise SizeError(f"batch {batch} does not work: it must be between 1 and {_LARGEST}")
    if cfg == "split" and parts != 2:
        raise SizeError(f"cfg split needs two guidance halves, and this pipeline makes {parts}; use cfg batch")
    return batch if cfg == "none" else batch * parts


def parameter_bytes(module: torch.nn.Module) -> int:
    """Count the bytes of the module's parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors)
