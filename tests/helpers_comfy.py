"""A double of the parts of ComfyUI that its nodes for bundles use: names, signatures and the order of calls.

Written after ComfyUI's public interfaces. :data:`USED` lists them; where ComfyUI is installed, a test compares them.
"""

from __future__ import annotations

import enum
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# Module: names that the nodes use, with the parameters they pass.
USED: dict[str, dict[str, tuple[str, ...]]] = {
    "comfy.model_base": {
        "BaseModel": ("model_config", "model_type"), "SDXL": ("model_config", "model_type"),
        "sdxl_pooled": ("args", "noise_augmentor"),
    },
    "comfy.model_patcher": {"ModelPatcher": ("model", "load_device", "offload_device")},
    "comfy.model_management": {"get_torch_device": (), "unet_offload_device": ()},
    "comfy.supported_models": {"SD15": ("unet_config",), "SD20": ("unet_config",), "SDXL": ("unet_config",)},
}  # fmt: skip
METHODS = {
    "comfy.model_base:BaseModel": ("apply_model", "encode_adm", "memory_required", "get_dtype"),
    "comfy.model_patcher:ModelPatcher": ("clone", "add_patches"),
}


class ModelType(enum.Enum):
    EPS = 1
    V_PREDICTION = 2


class Config:
    """A model's configuration, as ComfyUI's ``supported_models`` have them."""

    def __init__(self, unet_config: dict[str, Any]) -> None:
        self.unet_config = dict(unet_config)
        self.manual_cast_dtype = None


class BaseModel(nn.Module):
    def __init__(self, model_config: Config, model_type: ModelType = ModelType.EPS, device: Any = None) -> None:
        super().__init__()
        assert model_config.unet_config.get("disable_unet_model_creation"), "it would make a network of its own"
        self.model_type = model_type
        self.diffusion_model: nn.Module

    def apply_model(
        self, x: Tensor, t: Tensor, c_concat: Tensor | None = None, c_crossattn: Tensor | None = None,
        control: Any = None, transformer_options: dict[str, Any] | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """Call the network as ComfyUI does: ``t`` are timesteps here, and the result is the network's own."""
        dtype = self.get_dtype()
        extra = {n: v.to(dtype) if hasattr(v, "dtype") else v for n, v in kwargs.items()}
        found: Tensor = self.diffusion_model(
            x.to(dtype), t.float(), context=c_crossattn.to(dtype) if c_crossattn is not None else None,
            control=control, transformer_options=transformer_options or {}, **extra,
        ).float()  # fmt: skip
        return found

    def get_dtype(self) -> torch.dtype:
        return self.diffusion_model.dtype  # type: ignore[return-value]

    def encode_adm(self, **kwargs: Any) -> Tensor | None:
        return None

    def memory_required(self, input_shape: Any) -> float:
        return 1e9


class SDXL(BaseModel):
    def __init__(self, model_config: Config, model_type: ModelType = ModelType.EPS, device: Any = None) -> None:
        super().__init__(model_config, model_type, device)
        self.noise_augmentor = nn.Identity()


def sdxl_pooled(args: dict[str, Any], noise_augmentor: nn.Module) -> Tensor:
    found: Tensor = args["pooled_output"]
    return found


class ModelPatcher:
    """Keep the model. A clone has the base class, as in older versions of ComfyUI."""

    def __init__(self, model: nn.Module, load_device: Any, offload_device: Any, size: int = 0) -> None:
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.size = size or sum(t.nbytes for t in model.state_dict().values())
        model.to(load_device)

    def clone(self) -> ModelPatcher:
        return ModelPatcher(self.model, self.load_device, self.offload_device, self.size)

    def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> list[str]:
        return list(patches)


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the double in the place of ComfyUI."""
    parts: dict[str, dict[str, Any]] = {
        "comfy.model_base": {
            "BaseModel": BaseModel, "SDXL": SDXL, "ModelType": ModelType, "sdxl_pooled": sdxl_pooled,
        },
        "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
        "comfy.model_management": {
            "get_torch_device": lambda: torch.device("cpu"), "unet_offload_device": lambda: torch.device("cpu"),
        },
        "comfy.supported_models": {"SD15": Config, "SD20": Config, "SDXL": Config},
    }  # fmt: skip
    package = types.ModuleType("comfy")
    monkeypatch.setitem(sys.modules, "comfy", package)
    for name, values in parts.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
        setattr(package, name.partition(".")[2], module)
    yield
