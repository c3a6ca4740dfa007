# SPDX-License-Identifier: Apache-2.0
"""Describe a module's structure and weights, and notice cheaply that either has changed.

A live module stands for whatever the original would compute now. Users and libraries change an original between calls:
they set attention processors, switch features by attributes, load adapters, and write weights. The *structure* is
everything that decides the graph: classes, attributes, shapes. The *weights* are values by name, with adapters (LoRA)
merged. A change of structure asks for another conversion, a change of weights for a refit.

:class:`Watch` compares identities of attributes and versions of tensors, so that a call does not describe the module
again. Writes through ``tensor.data`` do not count as versions and are not noticed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from districompile.live.adapters import base_of, is_adapted

_SIMPLE = (type(None), bool, int, float, str, bytes)
# Attributes of every module that do not decide what it computes in evaluation mode.
_SKIPPED = frozenset(
    {
        "training", "forward", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set",
        "_is_full_backward_hook",
        "_load_state_dict_post_hooks", "_load_state_dict_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
        "_backward_hooks", "_backward_pre_hooks", "_forward_hooks",
        "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs", "_is_hf_initialized", "_hf_hook", "_old_forward", "hf_device_map",
        "_name_or_path", "_diffusers_version", "_use_default_values", "_commit_hash", "_hf_peft_config_loaded",
        "peft_config",
        "gradient_checkpointing", "lora_scale", "_safe_fusing",
    }
)  # fmt: skip
_WATCHED = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_DEPTH = 6


@dataclasses.dataclass(frozen=True)
class State:
    """A module as it is now: digests of its structure, of its weights, and the digest of each weight by name."""

    structure: str
    weights: str
    tensors: Mapping[str, str]


def modules_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the original by path, those that adapters were put around in their place."""
    waiting = [("", module)]
    while waiting:
        path, found = waiting.pop()
        found = base_of(found)
        yield path, found
        waiting += [(f"{path}.{n}" if path else n, m) for n, m in found._modules.items() if m is not None]


def base_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers under their names in the original, without adapters."""
    found: dict[str, Tensor] = {}
    for path, part in modules_of(module):
        for held in (part._parameters, part._buffers):
            found |= {(f"{path}.{n}" if path else n): t for n, t in held.items() if t is not None}
    return found


def adapted_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that adapters were put around, by the path of the layer in the original."""
    return {n: m for n, m in _raw(module) if is_adapted(m)}


def _raw(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    waiting = [("", module)]
    while waiting:
        path, found = waiting.pop()
        yield path, found
        found = base_of(found)
        waiting += [(f"{path}.{n}" if path else n, m) for n, m in found._modules.items() if m is not None]


class Watch:
    """Notice that a module differs from what it was when the watch began.

    It holds the attributes of all submodules and the containers among them, with the identities of their values, and
    every tensor with its memory and version.
    """

    def __init__(self, module: nn.Module) -> None:
        self._containers: list[Any] = []
        self._tensors: list[Tensor] = []
        seen: set[int] = set()
        for part in module.modules():
            self._containers.append(part.__dict__)
            for name, value in part.__dict__.items():
                if name in _WATCHED or (name not in _SKIPPED and not isinstance(value, nn.Module)):
                    self._add(value, seen, 0)
        self._empty = [c for c in self._containers if not c]  # most: hooks, buffers, and parts of leaves
        self._containers = [c for c in self._containers if c]
        self._held = [_values(c) for c in self._containers]  # kept alive, so that no identity is used again
        self._ids = [list(map(id, v)) for v in self._held]
        self._versions = list(map(_version, self._tensors))

    def _add(self, value: Any, seen: set[int], depth: int) -> None:
        if isinstance(value, Tensor):
            self._tensors.append(value)
        elif isinstance(value, dict | list | set | tuple):
            if id(value) in seen or depth > _DEPTH:
                return
            seen.add(id(value))
            if not isinstance(value, tuple):
                self._containers.append(value)
            for item in _values(value):
                self._add(item, seen, depth + 1)
        elif (not isinstance(value, (*_SIMPLE, nn.Module, type)) and not callable(value)) or _is_processor(value):
            attributes = getattr(value, "__dict__", None)
            if isinstance(attributes, dict):
                self._add(attributes, seen, depth + 1)

    def changed(self) -> bool:
        """Return whether an attribute was set, an entry of a container replaced, or a tensor written to."""
        if any(map(len, self._empty)) or [list(map(id, _values(c))) for c in self._containers] != self._ids:
            return True
        return list(map(_version, self._tensors)) != self._versions


def _is_processor(value: Any) -> bool:
    """Return whether ``value`` is an object that is called and has attributes, such as an attention processor."""
    return callable(value) and not isinstance(value, nn.Module | type) and not hasattr(value, "__qualname__")


def _values(container: Any) -> list[Any]:
    return list(container.values()) if isinstance(container, dict) else list(container)


def _version(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr() if tensor.device.type != "meta" else 0, 0 if tensor.is_inference() else tensor._version


def taken_fakes(module: nn.Module) -> list[str]:
    """Take out what a capture left in attributes: values that the module stores as it runs. Return their places."""
    found = []
    for path, part in module.named_modules():
        holders = {path: part.__dict__}
        for name, value in part.__dict__.items():
            if _is_processor(value):
                holders[f"{path}.{name}".lstrip(".")] = value.__dict__
        for where, attributes in holders.items():
            for name, value in attributes.items():
                if isinstance(value, FakeTensor):
                    attributes[name] = None
                    found.append(f"{where}.{name}".lstrip("."))
    return found


class Describer:
    """Describe the state of one module again and again. Digests of unchanged tensors are kept."""

    def __init__(self) -> None:
        self._digests: dict[tuple[int, str], tuple[Tensor, str]] = {}
        self._used: set[tuple[int, str]] = set()

    def state(self, module: nn.Module) -> State:
        """Return the state of ``module``. Reads every weight that is new since the last time."""
        self._used = set()
        tensors = base_weights(module)
        digests = {name: self._digest(t) for name, t in tensors.items()}
        adapters = [
            [path, _described(layer, [], 0, skip=("base_layer",)), self._own(layer)]
            for path, layer in sorted(adapted_layers(module).items())
        ]
        structure = [[path, _described(m, [], 0)] for path, m in sorted(modules_of(module), key=lambda x: x[0])]
        shapes = {n: [list(t.shape), str(t.dtype)] for n, t in sorted(tensors.items())}
        self._digests = {k: self._digests[k] for k in self._used}
        return State(_hash([structure, shapes]), _hash([sorted(digests.items()), adapters]), digests)

    def _own(self, layer: nn.Module) -> dict[str, str]:
        """Return the digests of an adapter's own tensors."""
        base = {id(t) for t in base_of(layer).parameters()}
        return {n: self._digest(p) for n, p in sorted(layer.named_parameters()) if id(p) not in base}

    def _digest(self, tensor: Tensor) -> str:
        key = id(tensor), _checksum(tensor)
        self._used.add(key)
        if key not in self._digests:
            self._digests[key] = tensor, digest(tensor)
        return self._digests[key][1]


def _checksum(tensor: Tensor) -> str:
    """Return a quick checksum of a tensor's values: merging an adapter writes through ``tensor.data``, without a
    version."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.numel() % 4 == 0 and flat.numel():
        flat = flat.view(torch.int32)
    few = flat[:: max(1, flat.numel() // 16)]
    return f"{int(flat.sum(dtype=torch.int64))} {few.tolist()}"


def digest(tensor: Tensor) -> str:
    """Return a hash of a tensor's values, shape and dtype."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    found = hashlib.sha256(f"{list(tensor.shape)}{tensor.dtype}".encode())
    if flat.numel():
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _described(value: Any, above: list[int], depth: int, skip: tuple[str, ...] = ()) -> Any:
    """Return what decides a computation as plain data: attributes of objects, and the values of containers."""
    if isinstance(value, bool | int | str | type(None)):
        return value
    if isinstance(value, float | bytes | torch.dtype | type):
        return repr(value)
    if isinstance(value, torch.device):  # without its number, which every rank has another one of
        return value.type
    if isinstance(value, Tensor):
        return ["tensor", digest(value)] if value.device.type != "meta" else ["meta", list(value.shape)]
    if id(value) in above or depth > _DEPTH:
        return type(value).__qualname__
    above = [*above, id(value)]
    if isinstance(value, Mapping):
        items = [[str(k), _described(v, above, depth + 1)] for k, v in value.items() if str(k) not in _SKIPPED]
        return ["map", sorted(items, key=lambda i: i[0])]
    if isinstance(value, list | tuple):
        return [_described(v, above, depth + 1) for v in value]
    if isinstance(value, set | frozenset):
        return ["set", sorted(str(v) for v in value)]
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, nn.Module) and depth:
        return name  # described under its own path
    if callable(value) and hasattr(value, "__qualname__"):
        return ["function", getattr(value, "__module__", ""), value.__qualname__]
    # A feature that is switched off leaves attributes that are None behind.
    given = (getattr(value, "__dict__", None) or {}).items()
    attributes = {k: v for k, v in given if v is not None and k not in (*_SKIPPED, *skip)}
    return [name, _described(attributes, above, depth)]
