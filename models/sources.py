"""Loaders: what a MODEL on the command line can be, and how it becomes a module with example inputs.

MODEL is ``demo``, a diffusers pipeline folder (``model_index.json``), the folder of one component (``config.json`` with
``_class_name``), a hub id (``owner/name``), or ``package.module:factory``. Weights are read from safetensors only: a
pickle can run code, so it is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from districompile.errors import Error, ValueWarning
from districompile.models import inputs
from districompile.models.configs import check_config, culprit, shortened
from districompile.models.files import check_weight_files, first_line, load_fault, one_reason, read_json
from districompile.models.imports import import_object, raised
from districompile.models.inputs import Context, Example, ModelError, Size

ACCEPTED = "'demo', a diffusers folder, a hub id (owner/name), or package.module:factory"
_MOST_UNREAD = 0.1  # of a model's tensors: a stray one is common, a layer's worth is another model
DEMO = Path(__file__).resolve().parent / "demo"

ExampleMaker = Callable[[Mapping[str, Any], Context, Size, torch.dtype, int], Example]
_CLASSES: dict[str, ExampleMaker] = {
    "UNet2DConditionModel": inputs.condition_unet,
    "UNet2DModel": inputs.unet,
    "AutoencoderKL": inputs.vae_decoder,
}
_AUTOENCODERS = ("vae", "vqvae", "movq")


class VaeDecoder(nn.Module):
    """The decoding half of an ``AutoencoderKL``: latents (B, C, H, W) in, pixels (B, 3, H * factor, W * factor) out."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.config = vae.config
        self.post_quant_conv: nn.Module = vae.post_quant_conv or nn.Identity()
        self.decoder: nn.Module = vae.decoder

    def forward(self, z: Tensor) -> Tensor:
        pixels: Tensor = self.decoder(self.post_quant_conv(z))
        return pixels


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A module and what is known about it.

    ``kind`` is the class it was made from, or ``"factory"``. ``source`` loads it again (:func:`load_source`). ``cfg``
    is the guidance that its pipeline uses by default. ``default_size`` is in pixels. ``pipeline_loader`` makes the
    diffusers pipeline around it, with a placeholder where the module belongs; None for a bare component or a factory.
    """

    module: nn.Module
    kind: str
    source: str
    cfg: str
    default_size: tuple[int, int] | None
    maker: Callable[[Size, int], Example]
    parts: int = 2
    pipeline_loader: Callable[[], Any] | None = None

    def example(
        self, height: int | None = None, width: int | None = None, batch: int = 1, cfg: str | None = None, seed: int = 0
    ) -> Example:
        """Inputs of one call at ``height`` x ``width`` pixels for ``batch`` images; sizes default to the model's own.

        ``cfg`` is ``"none"``, ``"batch"`` or ``"split"`` (the last two give a call with both guidance halves); the
        default is the model's own. Raises :class:`ModelError` for a size that the model cannot take.
        """
        if self.kind == "factory":
            if (height, width, batch) != (None, None, 1):
                raise ModelError(f"{self.source} fixes its own inputs: height, width and batch do not apply")
            return self.maker(Size(0, 0, 1), seed)
        fallback = self.default_size or (0, 0)
        if self.default_size is None and (height is None or width is None):
            raise ModelError(f"{self.source} does not say for which size it was made: give height and width")
        rows = fallback[0] if height is None else height
        columns = fallback[1] if width is None else width
        return self.maker(Size(rows, columns, inputs.guided_batch(batch, cfg or self.cfg, self.parts)), seed)


def load_source(model: str, dtype: torch.dtype | None = None) -> LoadedModel:
    """Load ``model`` in ``dtype`` on the CPU, in evaluation mode, holding its weights once.

    Without ``dtype``, folders and the hub's models are loaded in float32, and what a factory makes stays as it is.
    With it, a factory's module and floating-point inputs are converted.

    Raises :class:`ModelError` where it is unknown, cannot be reached, or is of a class without example inputs.
    """
    if model == "demo":
        if not (DEMO / "model_index.json").is_file():
            raise ModelError(f"the demo model is not installed: {DEMO} has no model_index.json")
        return _from_folder(DEMO, dtype or torch.float32, "demo")
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(path.resolve(), dtype or torch.float32, str(path.resolve()))
    if path.exists():
        raise ModelError(f"{model} is a file; a model is {ACCEPTED}")
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", model):
        return _from_factory(model, dtype)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith("."):
        return _from_hub(model, dtype or torch.float32)
    raise ModelError(f"unknown model {model!r}: give {ACCEPTED}")


def load_pipeline(model: str, dtype: torch.dtype = torch.float32) -> Any:
    """The diffusers pipeline at ``model``, whose UNet is a placeholder without weights: set ``pipe.unet`` before use.

    Raises :class:`ModelError` where ``model`` is not a whole pipeline.
    """
    return _pipeline(pipeline_location(model), dtype)


def pipeline_location(model: str) -> str:
    """Where the pipeline ``model`` is: a folder or a hub id. Raises :class:`ModelError` where it is no whole
    pipeline."""
    folder = DEMO if model == "demo" else Path(model).expanduser()
    if (folder / "model_index.json").is_file():
        return str(folder)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return model
    if not folder.exists() and ":" not in model:
        raise ModelError(f"there is no model {model} any more: say where it is now (--model)")
    raise ModelError(f"{model} is not a diffusers pipeline (no model_index.json), so it cannot draw by itself")


def _from_folder(folder: Path, dtype: torch.dtype, source: str) -> LoadedModel:
    if (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        if "unet" not in index:
            names = ", ".join(k for k in index if not k.startswith("_"))
            raise ModelError(
                f"{source}: the pipeline {index.get('_class_name')} has no unet (it has: {names}); "
                "give a component's folder or a factory (package.module:function)"
            )
        with reading(f"{folder}: model_index.json or what it names"):
            context = _context(index, lambda part: _component_config(folder, part))
        return _component(
            str(folder / "unet"), None, read_json(folder / "unet" / "config.json"), context, dtype, source,
            _variant(folder / "unet"), functools.partial(_pipeline, str(folder), dtype),
        )  # fmt: skip
    if not (folder / "config.json").is_file():
        raise ModelError(f"{source} holds no model: it has neither model_index.json nor config.json")
    parent = folder.parent
    context = Context()
    if (parent / "model_index.json").is_file():
        with reading(f"{parent}: model_index.json or what it names"):
            context = _context(read_json(parent / "model_index.json"), lambda part: _component_config(parent, part))
    return _component(
        str(folder), None, read_json(folder / "config.json"), context, dtype, source, _variant(folder), None
    )  # fmt: skip


def _from_hub(model: str, dtype: torch.dtype) -> LoadedModel:
    diffusers = import_diffusers()
    _check_hub(model)
    try:
        index = diffusers.DiffusionPipeline.load_config(model)

        def config(part: str) -> Mapping[str, Any] | None:
            try:
                return dict(diffusers.UNet2DConditionModel.load_config(model, subfolder=part))
            except OSError:
                return None

        unet = config("unet")
    except (OSError, ValueError) as e:
        raise ModelError(f"{model} on the model hub is not a diffusers pipeline: {first_line(e)}") from e
    if unet is None:
        raise ModelError(f"{model}: the pipeline {index.get('_class_name')} has no unet")
    return _component(
        model, "unet", unet, _context(index, config), dtype, model, None, functools.partial(_pipeline, model, dtype)
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
    variant: str | None, pipeline_loader: Callable[[], Any] | None,
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
    if folder.is_dir():
        try:
            check_weight_files(folder, variant)
        except ModelError as e:
            raise ModelError(f"{source}: its {kind} cannot be loaded: {e}") from e
    module = _from_pretrained(cls, where, subfolder, dtype, variant, config, source)
    module.eval().requires_grad_(False)
    cfg = "none"
    if kind == "AutoencoderKL":
        size = config.get("sample_size")
        with reading(file):
            default = None if size is None else inputs.default_size(config, 1)
        module = VaeDecoder(module)
    else:
        with reading(file):
            default = inputs.default_size(config, context.factor)
        # A distilled model takes the guidance scale as an input (time_cond_proj_dim) instead of two halves.
        if kind == "UNet2DConditionModel" and config.get("time_cond_proj_dim") is None:
            cfg = "batch"

    def make(size: Size, seed: int) -> Example:
        with reading(file):
            return _CLASSES[kind](config, context, size, dtype, seed)

    return LoadedModel(module, kind, source, cfg, default, make, context.guidance, pipeline_loader)


def _from_pretrained(
    cls: Any, where: str, subfolder: str | None, dtype: torch.dtype, variant: str | None, config: Mapping[str, Any],
    source: str,
) -> nn.Module:  # fmt: skip
    """The module. Raises :class:`ModelError` for a weight that is missing, of another shape, or of another model."""
    try:
        # An explicit True refuses pickles; low memory: built on meta, then filled from the mapped file
        loaded, found = cls.from_pretrained(
            where, subfolder=subfolder or "", dtype=dtype, variant=variant, use_safetensors=True,
            low_cpu_mem_usage=True, output_loading_info=True,
        )  # fmt: skip
    except Exception as e:  # a constructor raises whatever it makes of a wrong value
        why = culprit(cls, config)
        named = "" if why is None else f" ({why})"
        reason = load_fault(e, Path(where, subfolder or "")).partition(" If you want to instead")[0].replace("  ", " ")
        raise ModelError(f"{source}: its {cls.__name__} cannot be loaded{named}: {reason}") from e
    if missing := _listed(found.get("missing_keys")):
        raise ModelError(
            f"{source}: the weight file lacks {missing}: weights and config.json are of different models, or the "
            "download is incomplete"
        )
    if unread := _listed(found.get("unexpected_keys")):
        says = f"{source}: the weight file has {unread} besides, which its config.json does not ask for"
        if len(found["unexpected_keys"]) > _MOST_UNREAD * len(loaded.state_dict()):
            raise ModelError(f"{says}: weights and config.json are of different models")
        warnings.warn(f"{says}: ignored, as the original does", ValueWarning, stacklevel=2)
    module: nn.Module = loaded
    return module


def _listed(names: Collection[str] | None) -> str:
    """A few names, and how many more there are."""
    ordered = sorted(names or ())
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn what fails inside into one line that names the file it was read from."""
    try:
        yield
    except inputs.SizeError:
        raise
    except ModelError as e:
        raise ModelError(f"{where}: {e}") from e
    except Exception as e:  # values of any type come from the file
        raise ModelError(f"{where} does not fit the model: {one_reason(e)}") from e


def _from_factory(model: str, dtype: torch.dtype | None) -> LoadedModel:
    made = import_object(model, "model")
    if not callable(made):
        raise ModelError(f"{model} is not a function: a factory returns a module, or (module, args, kwargs[, rows])")
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
    if not (isinstance(result, tuple) and len(result) in (3, 4) and isinstance(result[0], nn.Module)):
        raise ModelError(f"{model} must return a module, (module, args, kwargs) or (module, args, kwargs, rows)")
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


def import_diffusers() -> Any:
    """The diffusers library; :class:`ModelError` says how to install it."""
    try:
        return importlib.import_module("diffusers")
    except ImportError as e:
        raise ModelError(f"diffusers cannot be imported ({e}): pip install 'districompile[diffusers]'") from e


def _pipeline(where: str, dtype: torch.dtype) -> Any:
    diffusers = import_diffusers()
    folder = Path(where)
    try:
        if folder.is_dir():
            config = read_json(folder / "unet" / "config.json")
        else:
            config = dict(diffusers.UNet2DConditionModel.load_config(where, subfolder="unet"))
        # Pipelines read the UNet's configuration while they are built and check its class, but not its weights.
        with torch.device("meta"):
            placeholder = getattr(diffusers, config["_class_name"]).from_config(config)
        variant = _variant(folder / "unet") if folder.is_dir() else None
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            where, unet=placeholder, dtype=dtype, variant=variant, use_safetensors=True
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


def _variant(folder: Path) -> str | None:
    """``"fp16"`` where a component's only safetensors are ``*.fp16.safetensors``."""
    names = [p.name for p in folder.glob("*.safetensors")]
    middle = {m.group(1) for n in names if (m := re.search(r"\.(\w+)(?:-\d+-of-\d+)?\.safetensors$", n))}
    plain = any(re.fullmatch(r"\w+(?:-\d+-of-\d+)?\.safetensors", n) for n in names)
    return None if plain or len(middle) != 1 else middle.pop()
