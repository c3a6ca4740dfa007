# SPDX-License-Identifier: Apache-2.0
"""Placeholders for the weights and submodules of the original module, which a bundle keeps inside its engines.

They answer questions about names, shapes, dtypes and devices. They hold no values: reading or writing one is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch

from districompile.errors import InputError, UnsupportedError
from districompile.ir.spec import TensorSpec
from districompile.plan.plan import ExecutionPlan

WEIGHTS_ADVICE = (
    "the weights are in weights.safetensors of the bundle, and engines hold them: read them there, and change them "
    "with `districompile refit`"
)
LAYERS_ADVICE = (
    "the layers are compiled into engines: change the original module, or its pipeline, and convert it again"
)


class WeightPlaceholder(torch.Tensor):
    """A tensor with the shape, dtype and device of a weight, but without values."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, spec: TensorSpec, device: torch.device) -> WeightPlaceholder:
        made: WeightPlaceholder = torch.Tensor._make_wrapper_subclass(cls, spec.shape, dtype=spec.dtype, device=device)
        return made

    def __init__(self, spec: TensorSpec, device: torch.device) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> NoReturn:
        _refuse_values(str(getattr(func, "overloadpacket", func)).rpartition(".")[2])

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"WeightPlaceholder(shape={list(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    def detach(self) -> WeightPlaceholder:
        return self

    def requires_grad_(self, requires_grad: bool = True) -> WeightPlaceholder:
        if requires_grad:
            raise InputError("requires_grad_: a converted module computes no gradients: train the original module")
        return self

    def __deepcopy__(self, memo: Any) -> NoReturn:
        _refuse_values("deepcopy")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse_values("pickling")


def _refuse_values(what: str) -> NoReturn:
    raise InputError(f"{what}: the parameters of a converted module have no values; {WEIGHTS_ADVICE}")


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse_values(name)

    return refuse


# Accesses of torch.Tensor that dispatch no operator.
for _name in ("data_ptr", "untyped_storage", "storage", "share_memory_", "numpy", "tolist", "__array__", "__dlpack__"):
    setattr(WeightPlaceholder, _name, _refusal(_name))


def _set_requires_grad(self: WeightPlaceholder, value: bool) -> None:
    self.requires_grad_(value)


WeightPlaceholder.data = property(lambda self: self, _refusal("data"))  # type: ignore[assignment]
WeightPlaceholder.grad = property(lambda self: None, _refusal("grad"))  # type: ignore[assignment]
WeightPlaceholder.requires_grad = property(lambda self: False, _set_requires_grad)  # type: ignore[assignment]


def original_weights(plan: ExecutionPlan) -> dict[str, TensorSpec]:
    """Return the specs of the weights under their names in the original module, before passes merged any.

    Modules are in the original's order. Within one, the weights that were merged come last.
    """
    merged = plan.report.joined
    specs = {name: spec for name, spec in plan.weights.items() if name not in merged}
    for name, parts in merged.items():
        if name in plan.weights:
            spec = plan.weights[name]
            specs |= {n: TensorSpec((rows, *spec.shape[1:]), spec.dtype) for n, rows in parts}
    tree: dict[str, Any] = {}
    for name in specs:
        node = tree
        for part in name.split("."):
            node = node.setdefault(part, {})
    return {name: specs[name] for name in _names(tree) if name in specs}


def _names(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for part, below in tree.items():
        yield f"{prefix}{part}"
        yield from _names(below, f"{prefix}{part}.")


class SubmodulePlaceholder:
    """A submodule of the original module: children by name or number, weights as placeholders, sizes of linears."""

    _prefix: str
    _specs: Mapping[str, TensorSpec]
    _device: torch.device

    def __init__(self, prefix: str, specs: Mapping[str, TensorSpec], device: torch.device) -> None:
        self.__dict__.update(_prefix=prefix, _specs=specs, _device=device)

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        # Pipelines ask an image prompt's projection for its class, to know which states of the image it takes.
        parts = {w[len(self._prefix) :].partition(".")[0] for w in self._specs if w.startswith(self._prefix)}
        return (_image_projection() if parts == {"image_embeds", "norm"} else None) or SubmodulePlaceholder

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        path = f"{self._prefix}{name}"
        if path in self._specs:
            return WeightPlaceholder(self._specs[path], self._device)
        if any(w.startswith(f"{path}.") for w in self._specs):
            return SubmodulePlaceholder(f"{path}.", self._specs, self._device)
        weight = self._specs.get(f"{self._prefix}weight")
        if weight is not None and len(weight.shape) > 1 and name in ("in_features", "out_features"):
            return weight.shape[1 if name == "in_features" else 0]
        raise UnsupportedError(f"{path} is not part of a converted module: {LAYERS_ADVICE}")

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise InputError(f"{self._prefix}{name} cannot be set: {LAYERS_ADVICE}")

    def __delattr__(self, name: str) -> NoReturn:
        raise InputError(f"{self._prefix}{name} cannot be removed: {LAYERS_ADVICE}")

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise InputError(f"{self._prefix[:-1]} cannot be called alone: {LAYERS_ADVICE}")

    def _count(self) -> int:
        names = {w[len(self._prefix) :].partition(".")[0] for w in self._specs if w.startswith(self._prefix)}
        if not names or not all(n.isdigit() for n in names):
            raise TypeError(f"{self._prefix[:-1]} of a converted module is no list of modules")
        return 1 + max(map(int, names))

    def __len__(self) -> int:
        return self._count()

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, index: int) -> Any:
        count = self._count()
        if not -count <= index < count:
            raise IndexError(f"{self._prefix[:-1]} has {count} modules, and no number {index}")
        return getattr(self, str(index % count))

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(self._count()))

    def __repr__(self) -> str:
        return f"SubmodulePlaceholder({self._prefix[:-1]!r})"


class ProcessorPlaceholder:
    """An attention processor of the original module. None of its settings can be read or changed.

    ``stands_for`` is the class that ``isinstance`` sees. Code that changes such processors therefore gets an error.
    """

    def __init__(self, name: str, stands_for: type[Any] | None = None) -> None:
        self.__dict__.update(_name=name, _stands_for=stands_for or ProcessorPlaceholder)

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        return self.__dict__["_stands_for"]  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedError(f"{self._name}.{name} is not part of a converted module: {LAYERS_ADVICE}")

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise InputError(f"{self._name}.{name} cannot be set: {LAYERS_ADVICE}")

    def __repr__(self) -> str:
        return f"ProcessorPlaceholder({self._name!r})"


def attention_processors(specs: Mapping[str, TensorSpec]) -> dict[str, ProcessorPlaceholder]:
    """Return the attention processors of a diffusers model, found by the weights of their projections."""
    found = {}
    for weight in specs:
        path, _, name = weight.rpartition("to_q.")
        if path and name == "weight":
            adapted = any(w.startswith(f"{path}processor.to_k_ip.") for w in specs)
            found[f"{path}processor"] = ProcessorPlaceholder(f"{path}processor", _adapter() if adapted else None)
    return found


def _image_projection() -> type[Any] | None:
    """Return diffusers' class of a projection of one image embedding; None if diffusers is not imported."""
    if "diffusers" not in sys.modules:
        return None
    from diffusers.models.embeddings import ImageProjection

    return ImageProjection  # type: ignore[no-any-return]


def _adapter() -> type[Any] | None:
    """Return diffusers' class of processors for image prompts; None if diffusers is not imported."""
    if "diffusers" not in sys.modules:
        return None
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    return IPAdapterAttnProcessor2_0  # type: ignore[no-any-return]


class Config(dict[str, Any]):
    """A model's configuration, read by key or by attribute. It cannot be changed."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise InputError(f"the configuration of a converted module is built in: {LAYERS_ADVICE}")

    def __reduce__(self) -> Any:
        return Config, (dict(self),)

    __setattr__ = __setitem__ = __delitem__ = pop = popitem = setdefault = update = clear = __ior__ = _refuse


def make_config(config: Mapping[str, Any]) -> Any:
    """Return the original's configuration, as diffusers' class if diffusers is imported, else as :class:`Config`."""
    if "diffusers" in sys.modules:
        try:
            from diffusers.configuration_utils import FrozenDict

            return FrozenDict(config)
        except ImportError:
            pass
    return Config(config)
