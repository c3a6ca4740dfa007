# SPDX-License-Identifier: Apache-2.0
"""Loaders: what a MODEL on the command line can be, and how it becomes a module with example inputs.

MODEL is ``demo``, a diffusers pipeline folder (``model_index.json``), the folder of one component (``config.json`` with
``_class_name``), a single file of weights, a hub id (``owner/name``), ``package.module:factory``, or
``source:argument``, where an installed package has an entry point ``source`` of the group ``districompile.models``.
Options may follow a model (:class:`~.origin.Origin`). Weights are read from safetensors only: a pickle can run code, so
it is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from districompile.common.extensions import entry_points
from districompile.errors import Error
from districompile.models import inputs, transformers
from districompile.models.autoencoder import ENCODER, VaeDecoder, VaeEncoder
from districompile.models.configs import check_config, shortened
from districompile.models.controlled import MARK, controlled_pipeline, with_controlnets
from districompile.models.files import DEMO as DEMO
from districompile.models.files import check_weight_files, find_variant, first_line, load_fault, read_json
from districompile.models.imports import import_object, raised
from districompile.models.inputs import Context, Example, ModelError, Size
from districompile.models.loaded import GROUP, from_entry_point
from districompile.models.loaded import LoadedModel as LoadedModel
from districompile.models.networks import network_name as network_name
from districompile.models.networks import network_of
from districompile.models.origin import Origin
from districompile.models.pretrained import check_unexpected, from_pretrained, reading
from districompile.models.pretrained import import_diffusers as import_diffusers
from districompile.models.single_file import check_file, config_folder, read_module, read_pipeline, refuse_pickles

ACCEPTED = "'demo', a diffusers folder, a .safetensors file, a hub id (owner/name), or package.module:factory"

ExampleMaker = Callable[[Mapping[str, Any], Context, Size, torch.dtype, int], Example]
_CLASSES: dict[str, ExampleMaker] = {
    "UNet2DConditionModel": inputs.condition_unet,
    "UNet2DModel": inputs.unet,
    "AutoencoderKL": inputs.vae_decoder,
    "FluxTransformer2DModel": transformers.flux,
    "SD3Transformer2DModel": transformers.sd3,
}
_GUIDED = ("UNet2DConditionModel", "SD3Transformer2DModel")  # their pipelines call them with both guidance halves
_AUTOENCODERS = ("vae", "vqvae", "movq")


def load_source(model: str, dtype: torch.dtype | None = None) -> LoadedModel:
    """Load ``model`` in ``dtype`` on the CPU, in evaluation mode, holding its weights once.

    Without ``dtype``, folders and the hub's models are loaded in float32, and what a factory makes stays as it is.
    With it, a factory's module and floating-point inputs are converted.

    ``MODEL+controlnet:FOLDER`` is a UNet with a ControlNet in it, or several.

    Raises :class:`ModelError` where it is unknown, cannot be reached, or is of a class without example inputs.
    """
    model, *nets = model.split(MARK)
    if nets:
        loaded = with_controlnets(load_source(model, dtype), nets, from_pretrained, find_variant)
        where = "".join(f"{MARK}{Path(n).expanduser().resolve()}" for n in nets)
        source = f"{loaded.source}{where}"
        has_pipeline = loaded.pipeline_loader is not None
        loader = functools.partial(load_pipeline, source, dtype or torch.float32) if has_pipeline else None
        return dataclasses.replace(loaded, source=source, pipeline_loader=loader)
    if model == "demo":
        if not (DEMO / "model_index.json").is_file():
            raise ModelError(f"the demo model is not installed: {DEMO} has no model_index.json")
        return _from_folder(DEMO, dtype or torch.float32, "demo")
    given = Origin.of(model)
    path, known = Path(given.path).expanduser(), str(given.resolved())
    if given.config is not None and given.file is None:
        raise ModelError(f"--config is for a single file of weights, and {given.path} is none: leave it out")
    if path.is_dir():
        return _from_folder(path.resolve(), dtype or torch.float32, known, given)
    source, _, argument = model.partition(":")
    if source in (found := entry_points(GROUP)):
        return from_entry_point(found[source], argument, model, dtype)
    if path.exists():
        check_file(path, ACCEPTED)
        return _from_folder(config_folder(given, path), dtype or torch.float32, known, given)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", model):
        return _from_factory(model, dtype)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", given.path) and not model.startswith("."):
        return _from_hub(given.path, dtype or torch.float32, given.variant)
    raise ModelError(f"unknown model {model!r}: give {ACCEPTED}")


def load_pipeline(model: str, dtype: torch.dtype = torch.float32) -> Any:
    """The diffusers pipeline at ``model``, whose network is a placeholder without weights: replace it before use, by
    :func:`network_name`.

    Raises :class:`ModelError` where ``model`` is not a whole pipeline.
    """
    model, *nets = model.split(MARK)
    if nets:
        return controlled_pipeline(load_pipeline(model, dtype), nets, dtype)
    source, _, argument = model.partition(":")
    if (entry := entry_points(GROUP).get(source)) is not None:
        loaded = from_entry_point(entry, argument, model, dtype)
        if loaded.pipeline_loader is None:
            raise ModelError(f"{model} comes without a pipeline, so it cannot draw by itself")
        return loaded.pipeline_loader()
    return _pipeline(pipeline_location(model), dtype, Origin.of(model))


def pipeline_location(model: str) -> str:
    """Where the pipeline ``model`` is: a folder or a hub id. Raises :class:`ModelError` where it is no whole
    pipeline."""
    model = model.partition(MARK)[0]
    given = Origin.of(model)
    model = given.path if given.file is None else str(config_folder(given, given.file))
    folder = DEMO if model == "demo" else Path(model).expanduser()
    if (folder / "model_index.json").is_file():
        return str(folder)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return model
    if model.partition(":")[0] in entry_points(GROUP):
        return model
    if not folder.exists() and ":" not in model:
        raise ModelError(f"there is no model {model} any more: say where it is now (--model)")
    raise ModelError(f"{model} is not a diffusers pipeline (no model_index.json), so it cannot draw by itself")


def _from_folder(folder: Path, dtype: torch.dtype, source: str, given: Origin | None = None) -> LoadedModel:
    given = given or Origin(str(folder))
    if (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        name = network_of(index, source)
        with reading(f"{folder}: model_index.json or what it names"):
            context = _context(index, lambda part: _component_config(folder, part))
        return _component(
            str(folder / name), None, read_json(folder / name / "config.json"), context, dtype, source,
            find_variant(folder / name, given.variant), functools.partial(_pipeline, str(folder), dtype, given),
            given.file, given.part,
        )  # fmt: skip
    if not (folder / "config.json").is_file():
        raise ModelError(f"{source} holds no model: it has neither model_index.json nor config.json")
    parent = folder.parent
    context = Context()
    if (parent / "model_index.json").is_file():
        with reading(f"{parent}: model_index.json or what it names"):
            context = _context(read_json(parent / "model_index.json"), lambda part: _component_config(parent, part))
    return _component(
        str(folder), None, read_json(folder / "config.json"), context, dtype, source,
        find_variant(folder, given.variant), None, given.file, given.part,
    )  # fmt: skip


def _from_hub(model: str, dtype: torch.dtype, variant: str | None = None) -> LoadedModel:
    diffusers = import_diffusers()
    _check_hub(model)
    try:
        index = diffusers.DiffusionPipeline.load_config(model)

        def config(part: str) -> Mapping[str, Any] | None:
            try:
                return dict(diffusers.UNet2DConditionModel.load_config(model, subfolder=part))
            except OSError:
                return None

        name = network_of(index, model)
        network = config(name)
    except (OSError, ValueError) as e:
        raise ModelError(f"{model} on the model hub is not a diffusers pipeline: {first_line(e)}") from e
    if network is None:
        raise ModelError(f"{model}: its {name} has no configuration")
    return _component(
        model,
        name,
        network,
        _context(index, config),
        dtype,
        str(Origin(model, None, variant)),
        variant,
        functools.partial(_pipeline, model, dtype, Origin(model, None, variant)),
    )


def _check_hub(model: str) -> None:
    """Fail within seconds, and say why, where the hub cannot be reached: the loaders themselves retry for half a
    minute."""
    hub = importlib.import_module("huggingface_hub")
    if isinstance(hub.try_to_load_from_cache(model, "model_index.json"), str):
        return
    try:
        hub.HfApi().model_info(model, timeout=10)
    except hub.errors.RepositoryNotFoundError as e:
        raise ModelError(f"there is no folder {model} here and no such model on the hub; a model is {ACCEPTED}") from e
    except Exception as e:  # the client's network errors are of whichever HTTP library it uses
        raise ModelError(
            f"there is no folder {model} here, and the model hub could not be reached: {first_line(e)}"
        ) from e


def _component(
    where: str, subfolder: str | None, config: Mapping[str, Any], context: Context, dtype: torch.dtype, source: str,
    variant: str | None, pipeline_loader: Callable[[], Any] | None, single: Path | None = None,
    part: str | None = None,
) -> LoadedModel:  # fmt: skip
    kind = config.get("_class_name")
    if not isinstance(kind, str) or kind not in _CLASSES:
        named = kind if isinstance(kind, str) else shortened(kind)
        raise ModelError(
            f"{source}: no example inputs are known for the class {named} (known: {', '.join(_CLASSES)}); "
            "give a factory (package.module:function) that returns (module, args, kwargs)"
        )
    cls = getattr(import_diffusers(), kind)
    folder = Path(where) / (subfolder or "")
    file = str(folder / "config.json")
    check_config(cls, config, file)
    if folder.is_dir() and single is None:
        try:
            check_weight_files(folder, variant)
            refuse_pickles(folder)
        except ModelError as e:
            raise ModelError(f"{source}: its {kind} cannot be loaded: {e}") from e
    if single is None:
        module = from_pretrained(cls, where, subfolder, dtype, variant, config, source)
    else:
        module, unexpected = read_module(cls, single, folder, dtype, source)
        check_unexpected(unexpected, module, source)
    module.eval().requires_grad_(False)
    cfg = "none"
    if kind == "AutoencoderKL":
        size = config.get("sample_size")
        with reading(file):
            default = None if size is None else inputs.default_size(config, 1)
        module = VaeEncoder(module) if part == ENCODER else VaeDecoder(module)
    elif part is not None:
        raise ModelError(f"{source}: a {kind} has no part {part}: leave it out")
    else:
        with reading(file):
            default = inputs.default_size(config, context.factor)
        if kind == "FluxTransformer2DModel":
            default = transformers.default_size(config, context.factor)
        # A distilled model takes the guidance scale as an input (time_cond_proj_dim) instead of two halves.
        if kind in _GUIDED and config.get("time_cond_proj_dim") is None:
            cfg = "batch"

    def make(size: Size, seed: int) -> Example:
        maker = inputs.vae_encoder if part == ENCODER else _CLASSES[kind]
        with reading(file):
            return maker(config, context, size, dtype, seed)

    return LoadedModel(module, kind, source, cfg, default, make, context.guidance, pipeline_loader)


def _from_factory(model: str, dtype: torch.dtype | None) -> LoadedModel:
    made = import_object(model, "model")
    if not callable(made):
        raise ModelError(f"{model} is not a function: a factory returns a module, or (module, args[, kwargs[, rows]])")
    try:
        result = made()
    except Error:
        raise
    except (Exception, SystemExit) as e:  # of the user's own code
        raise ModelError(f"{model} failed: {raised(e)}") from e
    if isinstance(result, nn.Module):
        known = _known_module(result, dtype or torch.float32, model)
        if known is not None:
            return known
        raise ModelError(
            f"{model} returned a {type(result).__name__} without inputs; return (module, args, kwargs) instead"
        )
    if not (isinstance(result, tuple) and len(result) in (2, 3, 4) and isinstance(result[0], nn.Module)):
        raise ModelError(
            f"{model} must return a module, (module, args), (module, args, kwargs) or (module, args, kwargs, rows)"
        )
    if len(result) == 2:  # the inputs by position, or by name
        result = (result[0], (), result[1]) if isinstance(result[1], dict) else (*result, {})
    module, args, kwargs = result[:3]
    rows = result[3] if len(result) == 4 else None
    if not isinstance(args, tuple | list) or not isinstance(kwargs, dict):
        raise ModelError(f"{model}: args must be a tuple and kwargs a dict")
    if rows is not None and not (
        isinstance(rows, Mapping) and all(isinstance(k, str) and type(v) is int for k, v in rows.items())
    ):
        raise ModelError(f"{model}: rows must be a dict of input names and dims, as {{'sample': 2}}")
    module.eval().requires_grad_(False)
    args, kwargs = tuple(args), dict(kwargs)
    if dtype is not None:
        module.to(dtype)
        args, kwargs = tree_map(
            lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, (args, kwargs)
        )
    example = Example(args, kwargs, None if rows is None else dict(rows))
    return LoadedModel(module, "factory", model, "none", None, lambda size, seed: example)


def _known_module(module: nn.Module, dtype: torch.dtype, source: str) -> LoadedModel | None:
    """Example inputs for a diffusers module that a factory returned alone."""
    kind = type(module).__name__
    config = getattr(module, "config", None)
    if kind not in _CLASSES or not isinstance(config, Mapping):
        return None
    module = module.to(dtype).eval().requires_grad_(False)
    with reading(f"{source}: its configuration"):
        default = inputs.default_size(config, 1)
    if kind == "AutoencoderKL":
        module = VaeDecoder(module)

    def make(size: Size, seed: int) -> Example:
        with reading(f"{source}: its configuration"):
            return _CLASSES[kind](config, Context(), size, dtype, seed)

    return LoadedModel(module, kind, source, "none", default, make)


def _pipeline(where: str, dtype: torch.dtype, given: Origin | None = None) -> Any:
    diffusers = import_diffusers()
    folder = Path(where)
    try:
        if folder.is_dir():
            name = network_of(read_json(folder / "model_index.json"), where)
            config = read_json(folder / name / "config.json")
        else:
            name = network_of(diffusers.DiffusionPipeline.load_config(where), where)
            config = dict(diffusers.UNet2DConditionModel.load_config(where, subfolder=name))
        # Pipelines read the network's configuration while they are built and check its class, but not its weights.
        with torch.device("meta"):
            placeholder = getattr(diffusers, config["_class_name"]).from_config(config)
        if given is not None and given.file is not None:
            kind = read_json(folder / "model_index.json").get("_class_name")
            return read_pipeline(getattr(diffusers, str(kind)), given.file, folder, dtype, placeholder)
        variant = None if given is None else given.variant
        variant = find_variant(folder / name, variant) if folder.is_dir() else variant
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            where, **{name: placeholder}, dtype=dtype, variant=variant, use_safetensors=True
        )
    except ModelError:
        raise
    except Exception as e:  # of any of the pipeline's parts, as they read their files
        raise ModelError(f"{where}: the pipeline cannot be loaded: {load_fault(e, folder)}") from e
    return pipe


def _context(index: Mapping[str, Any], config: Callable[[str], Mapping[str, Any] | None]) -> Context:
    factor, tokens, pooled = 1, 77, None
    for part in _AUTOENCODERS:
        found = config(part) if part in index else None
        if found is not None:
            factor = inputs.vae_factor(found)
            break
    for part in ("text_encoder", "text_encoder_2"):
        found = config(part) if index.get(part, (None,))[0] is not None else None
        if found is not None:
            tokens = inputs.whole(found, "max_position_embeddings", tokens)
            pooled = pooled if found.get("projection_dim") is None else inputs.whole(found, "projection_dim")
    guidance = 3 if "InstructPix2Pix" in str(index.get("_class_name")) else 2
    return Context(factor, tokens, pooled, index.get("requires_aesthetics_score"), guidance)


def _component_config(folder: Path, part: str) -> Mapping[str, Any] | None:
    path = folder / part / "config.json"
    return read_json(path) if path.is_file() else None
