# SPDX-License-Identifier: Apache-2.0
"""The ``torch.nn.Module`` and diffusers interface of a converted module, apart from its calls.

Its layers and weights are inside engines. Placeholders answer questions about them. An attempt to change them is
refused, with one line that names the alternative. Nothing is ignored silently.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch

from districompile.errors import InputError, UnsupportedError
from districompile.ir.spec import dtype_name
from districompile.plan.plan import ExecutionPlan
from districompile.runtime.face.placeholders import (
    LAYERS_ADVICE,
    WEIGHTS_ADVICE,
    SubmodulePlaceholder,
    WeightPlaceholder,
    attention_processors,
    make_config,
    original_weights,
)
from districompile.runtime.face.refusals import ABSENT, NOTHING_TO_DO, SWITCHES

_GRADIENTS = "a converted module computes no gradients: train the original module"
# Library modules and functions that walk all modules of a pipeline, and look on each one only for their own hooks.
_ASK_FOR_HOOKS = (
    "accelerate.hooks",
    "diffusers.hooks.group_offloading",
    "diffusers.hooks.tensor_parallel",
    "diffusers.models.modeling_utils:get_parameter_dtype",
    "diffusers.pipelines.pipeline_utils",
    "diffusers.utils.torch_utils",
    "torch._dynamo",
)
# Attributes that are None on diffusers' models whose configuration sets none of these keys.
_NONE_WITHOUT = {
    "encoder_hid_proj": ("encoder_hid_dim_type", "encoder_hid_dim"),
    "class_embedding": ("class_embed_type", "num_class_embeds"),
    "time_embed_act": ("time_embedding_act_fn",),
}


class ModuleFace(torch.nn.Module):
    """Implement the module interface of a converted module, except for its calls."""

    def __init__(self, plan: ExecutionPlan, device: torch.device, config: Mapping[str, Any]) -> None:
        super().__init__()
        self._device = device
        self._originals = original_weights(plan)
        self._internal_dict = make_config(config)  # pipelines of diffusers replace a configuration under this name
        # Under dotted names, as `parameters()` of this module, and of modules that contain it, returns them.
        for name, spec in self._originals.items():
            if spec.dtype.is_floating_point or spec.dtype.is_complex:
                self._parameters[name] = WeightPlaceholder(spec, device)  # type: ignore[assignment]
        self.plan = plan  # last: from here on, attributes are guarded
        self.eval()

    # What pipelines read

    @property
    def config(self) -> Any:
        """The configuration of the original module."""
        return self._internal_dict

    @property
    def device(self) -> torch.device:
        """The device that this rank computes on and returns outputs on."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, or of the inputs of a module without weights."""
        specs = (*self.plan.weights.values(), *(i.spec for i in self.plan.inputs))
        return next((s.dtype for s in specs if s.dtype.is_floating_point), torch.float32)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count the parameters that the calls of the original module use."""
        if exclude_embeddings:
            raise InputError("num_parameters: embeddings are not told apart here: ask the original module")
        return 0 if only_trainable else sum(p.numel() for p in self.parameters())

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the size of the weights in bytes."""
        return sum(s.nbytes for s in self._originals.values())

    @contextlib.contextmanager
    def cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """Do nothing: pipelines name the caches of a call here, and a converted module has none."""
        yield

    def get_submodule(self, target: str) -> torch.nn.Module:
        """Return this module for the empty name. It has no submodules."""
        if target:
            raise UnsupportedError(f"get_submodule({target!r}): {LAYERS_ADVICE}")
        return self

    def get_parameter(self, target: str) -> Any:
        """Return the placeholder of the parameter ``target``."""
        if target not in self._parameters:
            raise UnsupportedError(f"{target} is not a parameter of this converted module")
        return self._parameters[target]

    def __getattr__(self, name: str) -> Any:
        plan = self.__dict__.get("plan")
        if plan is None or (name.startswith("_") and name not in ABSENT):
            return super().__getattr__(name)
        if name in ABSENT:
            raise UnsupportedError(f"{name}: {ABSENT[name]}")
        if name in SWITCHES:
            return _switch(name)
        if name in NOTHING_TO_DO:
            return _nothing
        config = self._internal_dict
        if name == "attn_processors" and (config or attention_processors(self._originals)):
            return attention_processors(self._originals)
        if name in ("is_gradient_checkpointing", "is_cache_enabled"):
            return False
        if name in self._originals or any(w.startswith(f"{name}.") for w in self._originals):
            return getattr(SubmodulePlaceholder("", self._originals, self._device), name)
        if name in _NONE_WITHOUT and any(k in config for k in _NONE_WITHOUT[name]):
            if all(config.get(k) is None for k in _NONE_WITHOUT[name]):
                return None
        elif name in config:  # as on diffusers' models
            return config[name]
        raise UnsupportedError(f"{name} is not part of a converted module: {LAYERS_ADVICE}")

    # Changes of layers or weights

    def __setattr__(self, name: str, value: Any) -> None:
        plan = self.__dict__.get("plan")
        if name == "training" and value:
            raise InputError(f"training: {_GRADIENTS}")
        if plan is not None and not hasattr(type(self), name):
            self._check_setting(name, value)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self._parameters:
            raise InputError(f"{name} cannot be removed: {LAYERS_ADVICE}")
        super().__delattr__(name)

    def _check_setting(self, name: str, value: Any) -> None:
        if name == "_diffusers_hook":
            raise InputError(f"diffusers' offloading, caching and casting hooks do not apply here: {LAYERS_ADVICE}")
        if isinstance(value, torch.nn.Module | torch.nn.Parameter):
            raise InputError(f"{name} cannot be set: {LAYERS_ADVICE}")
        if name.startswith("_") or name in self.__dict__:
            return
        known = (*ABSENT, *SWITCHES, *NOTHING_TO_DO, *_NONE_WITHOUT, *self._internal_dict, "attn_processors")
        part = any(w == name or w.startswith(f"{name}.") for w in self._originals)
        if (part or name in known) and not (value is None and getattr(self, name, ...) is None):
            raise InputError(f"{name} cannot be set: {LAYERS_ADVICE}")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Apply a conversion of this module, or of one that contains it.

        Raises :class:`InputError` for a conversion that would change something.
        """
        with torch.inference_mode(False), torch.no_grad():
            found = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if found.dtype != self.dtype:
            raise InputError(
                f"to({dtype_name(found.dtype)}): this module was converted as {dtype_name(self.dtype)}: convert it "
                f"again with --dtype {dtype_name(found.dtype)}, or leave the dtype out"
            )
        if found.device.type != self.device.type or (found.device.index or 0) != (self.device.index or 0):
            raise InputError(
                f"to({str(found.device)!r}): this module was loaded on {self.device} and stays there: load the bundle "
                f"with device={str(found.device)!r}, or leave it out where a pipeline is moved or offloaded"
            )
        return self

    def to_empty(self, *, device: Any, recurse: bool = True) -> NoReturn:
        raise InputError(f"to_empty: {WEIGHTS_ADVICE}")

    def share_memory(self) -> NoReturn:
        raise InputError("share_memory: start one process a rank, and load the bundle in each")

    def apply(self, fn: Callable[[torch.nn.Module], None]) -> NoReturn:
        raise InputError(f"apply: {LAYERS_ADVICE}")

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise InputError(f"train: {_GRADIENTS}")
        self.training = False
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        if requires_grad:
            raise InputError(f"requires_grad_: {_GRADIENTS}")
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the module is compiled already."""

    def named_modules(
        self, memo: set[torch.nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Module]]:
        """List this module alone, for libraries that look for hooks. Refuse callers that look for layers."""
        _check_walk("modules")
        found: Iterator[tuple[str, torch.nn.Module]] = super().named_modules(memo, prefix, remove_duplicate)
        return found

    def named_children(self) -> Iterator[tuple[str, torch.nn.Module]]:
        _check_walk("children")
        return super().named_children()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> NoReturn:
        raise InputError(f"state_dict: {WEIGHTS_ADVICE}")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise InputError(f"load_state_dict: {WEIGHTS_ADVICE}")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise InputError(
            "a converted module cannot be copied or pickled, as engines and ranks belong to it: use this one, or load "
            "the bundle again"
        )


def _registers(name: str, advice: str) -> Callable[..., NoReturn]:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise InputError(f"{name}: {advice}")

    return refuse


for _name in ("register_buffer", "register_parameter", "register_module", "add_module", "set_submodule", "get_buffer"):
    setattr(ModuleFace, _name, _registers(_name, LAYERS_ADVICE))
for _name in ("register_full_backward_hook", "register_full_backward_pre_hook", "register_backward_hook"):
    setattr(ModuleFace, _name, _registers(_name, _GRADIENTS))


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing: what the caller switches off is not on."""


def _switch(name: str) -> Callable[..., None]:
    advice, off = SWITCHES[name]

    def switch(*args: Any, **kwargs: Any) -> None:
        given = next(iter((*args, *kwargs.values())), ...)
        if off is ... or given is not off:
            raise InputError(f"{name}: {advice}")

    return switch


def _check_walk(what: str) -> None:
    """Refuse to list modules, unless for hooks, or for the parameters of a module that contains this one."""
    frame = sys._getframe(2)
    while frame.f_globals.get("__name__") in ("torch.nn.modules.module", __name__) and frame.f_back is not None:
        if frame.f_code.co_name == "_named_members":
            return
        frame = frame.f_back
    caller = f"{frame.f_globals.get('__name__')}:{frame.f_code.co_name}"
    if not any(caller == n or caller.startswith((f"{n}:", f"{n}.")) for n in _ASK_FOR_HOOKS):
        raise InputError(f"{what}(): a converted module has no layers to list or switch; {LAYERS_ADVICE}")
