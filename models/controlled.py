# SPDX-License-Identifier: Apache-2.0
"""A UNet together with its ControlNets, as one module: what they add to the UNet's states never leaves a rank.

A diffusers pipeline calls the ControlNets first, and passes their results to the UNet. Here a stand-in for the
ControlNets (:func:`stand_in`) passes on the control pictures and their scales instead, as if they were the results, and
the UNet computes the ControlNets itself. So pipelines work unchanged, and every switch of theirs is a number in the
scales: a ControlNet that starts late or ends early has the scale 0, and guess mode has falling scales.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from districompile.models import inputs
from districompile.models.configs import check_config, shortened
from districompile.models.files import check_weight_files, first_line, read_json
from districompile.models.inputs import Example, ModelError, Size
from districompile.models.loaded import LoadedModel

CONFIG_KEY = "controlnets"  # in the configuration of such a UNet: those of its ControlNets
MARK = "+controlnet:"  # between a UNet's model and the folder of a ControlNet, in the name of a model
_KIND = "ControlNetModel"
_PICTURES = "down_block_additional_residuals"
_SCALES = "mid_block_additional_residual"


def _controlled(unet: nn.Module, nets: Sequence[nn.Module]) -> nn.Module:
    """Return ``unet`` with ``nets`` inside, which its forward adds. Names of the UNet's weights stay."""
    cls: Any = type(unet)

    class Controlled(cls):  # type: ignore[misc]
        def forward(
            self, sample: Tensor, timestep: Tensor | float | int, encoder_hidden_states: Tensor,
            class_labels: Tensor | None = None, timestep_cond: Tensor | None = None,
            attention_mask: Tensor | None = None, cross_attention_kwargs: dict[str, Any] | None = None,
            added_cond_kwargs: dict[str, Tensor] | None = None,
            down_block_additional_residuals: list[Tensor] | None = None,
            mid_block_additional_residual: Tensor | None = None, return_dict: bool = True,
        ) -> Any:  # fmt: skip
            """Take a picture (B, 3, H, W) of each ControlNet, and scales (B, ControlNets, residuals), in the places of
            the residuals."""
            down: list[Tensor] = []
            mid: Tensor | None = None
            scales = mid_block_additional_residual
            assert scales is not None and down_block_additional_residuals is not None
            for i, (net, picture) in enumerate(zip(self.control_nets, down_block_additional_residuals, strict=True)):
                found, last = net(
                    sample, timestep, encoder_hidden_states, picture, class_labels=class_labels,
                    timestep_cond=timestep_cond, added_cond_kwargs=added_cond_kwargs, return_dict=False,
                )  # fmt: skip
                scaled = [_scaled(x, scales[:, i, level]) for level, x in enumerate((*found, last))]
                down = scaled[:-1] if mid is None else [a + b for a, b in zip(down, scaled, strict=False)]
                mid = scaled[-1] if mid is None else mid + scaled[-1]
            return super().forward(
                sample, timestep, encoder_hidden_states, class_labels=class_labels, timestep_cond=timestep_cond,
                attention_mask=attention_mask, cross_attention_kwargs=cross_attention_kwargs,
                added_cond_kwargs=added_cond_kwargs, down_block_additional_residuals=tuple(down),
                mid_block_additional_residual=mid, return_dict=return_dict,
            )  # fmt: skip

    Controlled.__name__ = cls.__name__
    unet.__class__ = Controlled
    unet.control_nets = nn.ModuleList(nets)
    unet.register_to_config(**{CONFIG_KEY: [_plain(net.config) for net in nets]})  # type: ignore[operator]
    return unet


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    return x * scale.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def _plain(config: Any) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dict(config).items() if not k.startswith("_")}


def residuals_of(config: Mapping[str, Any]) -> int:
    """Return how many residuals a ControlNet of this configuration makes, that of the middle block included."""
    blocks = config.get("block_out_channels")
    if not isinstance(blocks, list | tuple) or not blocks:
        raise ModelError(f"block_out_channels is {blocks!r}; it must be a list of numbers")
    return len(blocks) * (inputs.whole(config, "layers_per_block", 2) + 1) + 1


def with_controlnets(
    loaded: LoadedModel, folders: Sequence[str], from_pretrained: Callable[..., Any],
    variant_of: Callable[[Path], str | None],
) -> LoadedModel:  # fmt: skip
    """Return a loaded UNet with the ControlNets of ``folders`` in it, and example inputs for both.

    ``from_pretrained`` and ``variant_of`` are those of the other networks. Raises :class:`ModelError` for another model
    than a ``UNet2DConditionModel``, and for a folder that holds no ControlNet which fits it.
    """
    if loaded.kind != "UNet2DConditionModel":
        raise ModelError(f"a ControlNet goes with a UNet2DConditionModel, and {loaded.source} is a {loaded.kind}")
    unet: Any = loaded.module
    dtype = next(p.dtype for p in unet.parameters())
    nets = [_load(Path(folder).expanduser(), dtype, from_pretrained, variant_of) for folder in folders]
    for folder, net in zip(folders, nets, strict=True):
        _check_fits(folder, net.config, unet.config)
    configs = [dict(net.config) for net in nets]
    module = _controlled(unet, nets)

    def make(size: Size, seed: int) -> Example:
        example = loaded.maker(size, seed)
        sample = example.args[0]
        pictures, rows = [], dict(example.rows or {})
        for i, config in enumerate(configs):
            factor = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
            channels = inputs.whole(config, "conditioning_channels", 3)
            shape = sample.shape[0], channels, sample.shape[2] * factor, sample.shape[3] * factor
            pictures.append(torch.rand(shape, generator=torch.Generator().manual_seed(seed + i)).to(sample.dtype))
            rows[f"{_PICTURES}.{i}"] = 2
        scales = torch.ones(sample.shape[0], len(configs), residuals_of(configs[0]), dtype=sample.dtype)
        return Example(example.args, {**example.kwargs, _PICTURES: pictures, _SCALES: scales}, rows)

    return dataclasses.replace(loaded, module=module, maker=make)


def _load(
    folder: Path, dtype: torch.dtype, from_pretrained: Callable[..., Any], variant_of: Callable[[Path], str | None]
) -> Any:
    import diffusers

    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no {_KIND}: it has no config.json")
    config = read_json(folder / "config.json")
    if config.get("_class_name") != _KIND:
        raise ModelError(f"{folder} holds a {shortened(config.get('_class_name'))}, and a {_KIND} is needed")
    cls, variant = diffusers.ControlNetModel, variant_of(folder)
    check_config(cls, config, str(folder / "config.json"))
    check_weight_files(folder, variant)
    net = from_pretrained(cls, str(folder), None, dtype, variant, config, str(folder))
    return net.eval().requires_grad_(False)


def _check_fits(folder: str, net: Mapping[str, Any], unet: Mapping[str, Any]) -> None:
    for key in ("block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type"):
        ours, theirs = net.get(key), unet.get(key)
        if ours is not None and theirs is not None and _listed(ours) != _listed(theirs):
            raise ModelError(
                f"the ControlNet {folder} is for another UNet: its {key} is {ours}, and this UNet's is {theirs}"
            )


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def controlled_pipeline(pipe: Any, folders: Sequence[str], dtype: torch.dtype) -> Any:
    """Return the pipeline of the same kind that takes control pictures, with a stand-in for the ControlNets of
    ``folders``. Raises :class:`ModelError` if there is none."""
    import diffusers

    configs = [read_json(Path(folder).expanduser() / "config.json") for folder in folders]
    known = inspect.signature(diffusers.ControlNetModel.__init__).parameters
    nets = stand_in([{k: v for k, v in c.items() if k in known} for c in configs], dtype, torch.device("cpu"))
    try:
        return diffusers.AutoPipelineForText2Image.from_pipe(pipe, controlnet=nets)
    except ValueError as e:
        raise ModelError(f"{type(pipe).__name__} has no pipeline with ControlNets: {first_line(e)}") from e


def stand_in(configs: Sequence[Mapping[str, Any]], dtype: torch.dtype, device: torch.device) -> Any:
    """Return what takes the place of a pipeline's ControlNets: a ``ControlNetModel``, or several of them.

    It computes nothing, and passes its pictures and scales on in the places of residuals.
    """
    import diffusers
    from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

    class ControlNetStandIn(diffusers.ControlNetModel):  # type: ignore[misc]
        def __init__(self, config: Mapping[str, Any]) -> None:
            nn.Module.__init__(self)
            self.register_to_config(**config)

        dtype = property(lambda self: dtype)
        device = property(lambda self: device)

        def forward(
            self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, controlnet_cond: Any,
            conditioning_scale: Any = 1.0, *args: Any, guess_mode: bool = False, **kwargs: Any,
        ) -> tuple[list[Tensor], Tensor]:  # fmt: skip
            return _passed(sample, [self.config], [controlnet_cond], [conditioning_scale], guess_mode)

    class ControlNetsStandIn(MultiControlNetModel):  # type: ignore[misc]
        dtype = property(lambda self: dtype)
        device = property(lambda self: device)

        def forward(
            self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, controlnet_cond: Any,
            conditioning_scale: Any, *args: Any, guess_mode: bool = False, **kwargs: Any,
        ) -> tuple[list[Tensor], Tensor]:  # fmt: skip
            configs = [net.config for net in self.nets]
            return _passed(sample, configs, controlnet_cond, conditioning_scale, guess_mode)

    nets = [ControlNetStandIn(config) for config in configs]
    return nets[0] if len(nets) == 1 else ControlNetsStandIn(nets)


def _passed(
    sample: Tensor, configs: Sequence[Mapping[str, Any]], pictures: Sequence[Tensor], scales: Sequence[Any], guess: bool
) -> tuple[list[Tensor], Tensor]:
    levels = residuals_of(configs[0])
    found = torch.empty(sample.shape[0], len(configs), levels, dtype=sample.dtype)
    for i, (config, scale) in enumerate(zip(configs, scales, strict=True)):
        falls = guess and not config.get("global_pool_conditions")
        found[:, i] = (torch.logspace(-1, 0, levels) if falls else torch.ones(levels)) * float(scale)
    return list(pictures), found.to(sample.device)
