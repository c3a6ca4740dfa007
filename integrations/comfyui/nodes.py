# SPDX-License-Identifier: Apache-2.0
"""Two nodes: load a bundle as MODEL, and decode latents by the bundle of a VAE's decoder.

ComfyUI's process is no rank. The ranks are processes of their own (``districompile.load(bundle, workers=...)``), which
all bundles for the same number of GPUs share. They end with ComfyUI.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import districompile as dc

CATEGORY = "districompile"
_TIME_IDS = 6  # sizes and crops of SDXL: height, width, top, left, height and width aimed at
_lock = threading.Lock()
_workers: dict[int, dc.Workers] = {}  # by number of ranks
_loaded: dict[str, tuple[str, Any]] = {}  # by folder: the hash of the bundle, and its module


def load_bundle(folder: str) -> Any:
    """Return the module of a bundle. It is loaded once, and again after the bundle has changed or a rank was lost."""
    path = str(Path(folder).expanduser().resolve())
    manifest = _manifest(path)
    ranks = int(manifest["mesh"]["cfg"]) * int(manifest["mesh"]["patch"])
    with _lock:
        group = _workers.get(ranks)
        if group is None or not group.alive:
            group = _workers[ranks] = dc.Workers(ranks)
            for name in [n for n, (_, module) in _loaded.items() if module.plan.world_size == ranks]:
                del _loaded[name]
        known = _loaded.get(path)
        if known is None or known[0] != manifest["sha256"]:
            _loaded[path] = (str(manifest["sha256"]), dc.load(path, workers=group, warm_up=True))
        return _loaded[path][1]


def _manifest(folder: str) -> dict[str, Any]:
    from districompile.bundle.manifest import read_manifest

    return read_manifest(Path(folder))


def fingerprint(folder: str) -> str:
    """Return what changes when the node has to run again: another bundle, or ranks that were lost."""
    try:
        manifest = _manifest(str(Path(folder).expanduser().resolve()))
        ranks = int(manifest["mesh"]["cfg"]) * int(manifest["mesh"]["patch"])
    except (dc.Error, KeyError, TypeError, ValueError) as e:
        return f"{folder}: {e}"
    group = _workers.get(ranks)
    return json.dumps([folder, manifest["sha256"], group is None or group.alive])


def in_batches(module: Any, count: int, call: Callable[[slice], Tensor]) -> Tensor:
    """Return the results of ``call`` for ``count`` samples, by calls of the batches that a bundle has.

    ``call`` takes a slice that may end behind the last sample: the last one then stands for those that are missing.
    """
    sizes = sorted({_batch(plan) for plan in module.plans.values()})
    if count in sizes:
        return call(slice(0, count))
    size = max(
        (s for s in sizes if s < count and count % s == 0), default=min((s for s in sizes if s > count), default=0)
    )
    if not size:
        raise dc.InputError(
            f"{count} samples in one call, and the bundle has batches of {', '.join(map(str, sizes))}: convert with "
            "--batch, or with another --cfg (guidance doubles the batch)"
        )
    parts = [call(slice(at, at + size)) for at in range(0, count, size)]
    return torch.cat(parts)[:count]


def _batch(plan: Any) -> int:
    image = next(i for i in plan.inputs if i.rows is not None)
    return int(plan.called_spec(image).shape[0])


def _samples(tensor: Tensor, part: slice) -> Tensor:
    """Return some samples of ``tensor``. The last one is repeated for those that it does not have."""
    found = tensor[part]
    missing = part.stop - part.start - found.shape[0]
    return found if missing <= 0 else torch.cat([found, tensor[-1:].expand(missing, *tensor.shape[1:])])


class BundleUNet(nn.Module):
    """A bundle of a diffusers UNet with the calls that ComfyUI makes.

    The bundle's module is no submodule, because ComfyUI walks and moves those.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.__dict__["module"] = module
        self.__dict__["paths"] = {i.path for i in module.plan.inputs}
        self.dtype = module.dtype

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None, control: Any = None,
        transformer_options: dict[str, Any] | None = None, **others: Any,
    ) -> Tensor:  # fmt: skip
        """Return the UNet's output for latents (B, C, H, W). Raises ``districompile.InputError`` for what the bundle
        cannot do."""
        _refuse_changes(control, transformer_options or {}, others)
        module = self.__dict__["module"]

        def call(part: slice) -> Tensor:
            given: dict[str, Any] = {"sample": _samples(x, part), "timestep": timesteps[:1]}
            if context is not None and "encoder_hidden_states" in self.__dict__["paths"]:
                given["encoder_hidden_states"] = _samples(context, part)
            if y is not None:
                label = _samples(y, part).to(self.dtype)
                text, ids = label[:, :-_TIME_IDS], label[:, -_TIME_IDS:]
                given["added_cond_kwargs"] = {"text_embeds": text, "time_ids": ids}
            result: Tensor = module(**given, return_dict=False)[0]
            return result

        found = in_batches(module, x.shape[0], call)
        return found.to(x.device)


def _refuse_changes(control: Any, options: dict[str, Any], others: dict[str, Any]) -> None:
    """Raise for what other nodes change inside of a UNet: nothing of it would reach an engine."""
    found = None
    if control is not None and any(t is not None for part in control.values() for t in part):
        found = "a ControlNet (convert the model with --controlnet, and draw with districompile run)"
    elif any(options.get("patches", {}).values()) or any(options.get("patches_replace", {}).values()):
        found = "a patch of its attention or blocks (such as FreeU, IP-Adapter or PAG)"
    elif any((options.get("wrappers") or {}).get("diffusion_model", {}).values()):
        found = "a wrapper of its calls"
    else:
        name = next((n for n, value in others.items() if value is not None), None)
        found = None if name is None else f"the input {name}"
    if found is not None:
        raise dc.InputError(f"a bundle cannot take {found}: leave that node out")


def model_class(config: dict[str, Any], prediction: str) -> tuple[str, str, str]:
    """Return the names of ComfyUI's configuration, model and kind of prediction for a diffusers UNet.

    Raises ``districompile.InputError`` for a network that is none of Stable Diffusion 1, 2 and XL.
    """
    kinds = {"epsilon": "EPS", "v_prediction": "V_PREDICTION"}
    if prediction not in kinds:
        raise dc.InputError(f"prediction {prediction!r}: it is one of {', '.join(kinds)}")
    width, label = config.get("cross_attention_dim"), config.get("addition_embed_type")
    if "down_block_types" in config and not config.get("class_embed_type"):  # as diffusers' UNets say
        if label == "text_time" and width == 2048:
            return "SDXL", "SDXL", kinds[prediction]
        if label is None and width in (768, 1024):
            return ("SD15" if width == 768 else "SD20"), "BaseModel", kinds[prediction]
    raise dc.InputError(
        f"a network with cross_attention_dim {width} is none of Stable Diffusion 1, 2 and XL, "
        "which this node knows: draw with districompile run, or serve"
    )


def comfy_model(module: Any, prediction: str) -> Any:
    """Return a MODEL of ComfyUI whose UNet is the module of a bundle."""
    import comfy.model_base
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    name, base, kind = model_class(dict(module.config), prediction)
    config = getattr(comfy.supported_models, name)({"adm_in_channels": 2816} if name == "SDXL" else {})
    config.unet_config["disable_unet_model_creation"] = True

    class Bundled(getattr(comfy.model_base, base)):  # type: ignore[misc]
        """A model of ComfyUI without a network of its own."""

        def encode_adm(self, **kwargs: Any) -> Tensor | None:
            """Return the pooled text with SDXL's sizes as numbers: diffusers' UNet embeds them itself."""
            if name != "SDXL":
                return None
            pooled: Tensor = comfy.model_base.sdxl_pooled(kwargs, self.noise_augmentor)
            width, height = kwargs.get("width", 768), kwargs.get("height", 768)
            ids = [
                height, width, kwargs.get("crop_h", 0), kwargs.get("crop_w", 0), kwargs.get("target_height", height),
                kwargs.get("target_width", width),
            ]  # fmt: skip
            numbers = torch.tensor([ids], dtype=torch.float32, device=pooled.device)
            return torch.cat([pooled.float(), numbers.expand(pooled.shape[0], -1)], dim=1)

        def memory_required(self, *args: Any, **kwargs: Any) -> int:
            """Return 0: the ranks have their memory already."""
            return 0

    class BundlePatcher(comfy.model_patcher.ModelPatcher):  # type: ignore[misc]
        """Refuse changes of weights, which are in engines of other processes."""

        def clone(self, *args: Any, **kwargs: Any) -> Any:
            """Clone as ComfyUI does, and keep the class."""
            found = super().clone(*args, **kwargs)
            found.__class__ = type(self)
            return found

        def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> Any:
            """Raise ``districompile.InputError`` unless nothing is changed."""
            if strength_patch == 0 and strength_model == 1:
                return []
            raise dc.InputError(
                "a LoRA cannot be added to a bundle here: add it with `districompile refit BUNDLE --lora FILE`, load "
                "that bundle, and set strength_model to 0 for what the LoRA changes of the text encoder"
            )

    model = Bundled(config, getattr(comfy.model_base.ModelType, kind))
    model.diffusion_model = BundleUNet(module)
    management = comfy.model_management
    return BundlePatcher(
        model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


class LoadBundle:
    """Load a bundle of a UNet as MODEL."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = CATEGORY
    DESCRIPTION = "Load a bundle of districompile. Its GPUs compute each step together, in processes of their own."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs: the folder of the bundle, and what its model predicts."""
        return {
            "required": {
                "bundle": ("STRING", {"default": "", "tooltip": "Folder made by `districompile convert`."}),
                "prediction": (["epsilon", "v_prediction"], {"tooltip": "v_prediction for SD 2.x of 768 pixels."}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, bundle: str, **others: Any) -> str:
        """Return what changes when the bundle has to be loaded again."""
        return fingerprint(bundle)

    def load(self, bundle: str, prediction: str = "epsilon") -> tuple[Any]:
        """Return the MODEL."""
        return (comfy_model(load_bundle(bundle), prediction),)


class DecodeByBundle:
    """Decode latents by a bundle of a VAE's decoder."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "decode"
    CATEGORY = CATEGORY
    DESCRIPTION = "Decode latents on all GPUs of a bundle, made by `districompile convert FOLDER/vae`."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs: latents, and the folder of the decoder's bundle."""
        return {
            "required": {
                "samples": ("LATENT",),
                "bundle": ("STRING", {"default": "", "tooltip": "Folder made by `districompile convert FOLDER/vae`."}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, bundle: str, **others: Any) -> str:
        """Return what changes when the bundle has to be loaded again."""
        return fingerprint(bundle)

    def decode(self, samples: dict[str, Tensor], bundle: str) -> tuple[Tensor]:
        """Return images (B, H, W, 3) in 0..1, float32 on the CPU."""
        module = load_bundle(bundle)
        latents = samples["samples"]
        image = next(i for i in module.plan.inputs if i.rows is not None)
        if latents.ndim != 4 or len(module.plan.inputs) != 1:
            raise dc.InputError(
                f"{bundle} decodes no latents of shape {list(latents.shape)}: it must be a VAE's decoder"
            )
        dtype = image.spec.dtype

        def call(part: slice) -> Tensor:
            pixels: Tensor = module(_samples(latents, part).to(module.device, dtype))
            return pixels

        pixels = in_batches(module, latents.shape[0], call)
        return ((pixels.float().cpu() / 2 + 0.5).clamp(0, 1).movedim(1, -1),)


NODE_CLASS_MAPPINGS = {"DistricompileLoadBundle": LoadBundle, "DistricompileDecode": DecodeByBundle}
NODE_DISPLAY_NAME_MAPPINGS = {
    "DistricompileLoadBundle": "Load bundle (districompile)",
    "DistricompileDecode": "VAE decode by bundle (districompile)",
}
