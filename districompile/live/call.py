# SPDX-License-Identifier: Apache-2.0
"""Calls of a live module: their arguments by name, the key of the conversion that fits them, and the example for it.

Tensors count by shape and dtype, and everything else by its value. A number that a caller may change from call to call,
such as the scale of a ControlNet, is passed as a tensor, so that it is an input of the conversion and no constant.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from districompile.errors import InputError
from districompile.frontend.call_tree import flatten_call
from districompile.ir.spec import names_timestep

RETURN_DICT = "return_dict"
_SCALED = ("cross_attention_kwargs", "attention_kwargs", "joint_attention_kwargs")
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype)


@dataclasses.dataclass(frozen=True)
class LiveCall:
    """A call: its arguments by parameter name, without ``return_dict``, and the key of its conversion.

    ``adapter_scale`` is the factor of all adapters in this call, which diffusers passes among attention's arguments.
    """

    arguments: dict[str, Any]
    return_dict: bool | None
    adapter_scale: float
    key: str
    timestep: Any
    numbers: bool  # whether a number became an input

    def passed(self) -> dict[str, Any]:
        """Return the arguments for the converted module."""
        if self.return_dict is None:
            return self.arguments
        return {**self.arguments, RETURN_DICT: self.return_dict}


def bind(
    forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], adapted: bool,
    numbers_are_inputs: bool = True,
) -> LiveCall:  # fmt: skip
    """Bind a call of ``forward``. ``adapted``: it has adapters, which attention's ``scale`` is for.

    Raises :class:`InputError` for arguments that cannot be part of a conversion.
    """
    signature = inspect.signature(forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as e:
        raise InputError(str(e)) from None
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            if value:
                raise InputError(f"{name}: pass the arguments by name")
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= value
        elif not (value is None and parameter.default is None):
            arguments[name] = value
    return_dict = arguments.pop(RETURN_DICT, None)
    scale = 1.0
    for name in _SCALED:
        given = arguments.get(name)
        if (
            isinstance(given, Mapping) and "scale" in given
        ):  # diffusers' layers take it from here before they are called
            scale = float(given["scale"]) if adapted else 1.0
            given = {k: v for k, v in given.items() if k != "scale"}
            arguments = {**arguments, name: given} if given else {k: v for k, v in arguments.items() if k != name}
    given = flatten_call(tuple(arguments), (), arguments)
    if numbers_are_inputs:
        arguments = {n: _as_inputs(n, v) for n, v in arguments.items()}
    leaves = flatten_call(tuple(arguments), (), arguments)
    numbers = any(isinstance(leaf, Tensor) and not isinstance(given[path], Tensor) for path, leaf in leaves.items())
    timestep = next((v for path, v in leaves.items() if names_timestep(path)), None)
    text = repr([(path, _described(path, leaf)) for path, leaf in sorted(leaves.items())])
    return LiveCall(arguments, return_dict, scale, hashlib.sha256(text.encode()).hexdigest(), timestep, numbers)


def _as_inputs(name: str, value: Any) -> Any:
    """Return ``value`` with numbers as tensors: fractions anywhere, and any number that is a timestep."""
    if isinstance(value, bool):
        return value
    if isinstance(value, float) or (isinstance(value, int) and names_timestep(name)):
        return torch.tensor(value, dtype=torch.float32 if isinstance(value, float) else torch.int64)
    if isinstance(value, Mapping):
        return {k: _as_inputs(str(k), v) for k, v in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_as_inputs(name, v) for v in value)
    return value


def _described(path: str, leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        if names_timestep(path):
            return "timestep", leaf.ndim, leaf.numel()
        return "tensor", tuple(leaf.shape), str(leaf.dtype)
    if isinstance(leaf, _CONSTANTS):
        return "value", repr(leaf)
    raise InputError(
        f"{path} is a {type(leaf).__name__}, which cannot be an input of a conversion: pass a tensor, or take the "
        "component out with components=[...]"
    )


def example_of(call: LiveCall, dtypes: bool) -> dict[str, Any]:
    """Return the arguments to convert with. ``dtypes``: timesteps as they are, else as float32, which holds all of
    those that schedulers pass."""
    if dtypes:
        return call.arguments

    def cast(name: str, value: Any) -> Any:
        return value.float() if names_timestep(name) and isinstance(value, Tensor) else value

    return {n: cast(n, v) for n, v in call.arguments.items()}


def rows_of_call(arguments: Mapping[str, Any]) -> dict[str, int] | None:
    """Return the dims of rows of a call's images, by path; None if no input is an image or a sequence of its tokens.

    The first floating-point tensor of 4 or 5 dims is the image, and its height is the last dim but one. Others like it
    are divided too: of the same shape but for a factor. A network without one divides the tokens of its first input.
    """
    leaves = {
        path: leaf
        for path, leaf in flatten_call(tuple(arguments), (), arguments).items()
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }
    images = {path: t for path, t in leaves.items() if t.ndim in (4, 5)}
    if images:
        first = next(iter(images.values()))
        return {path: t.ndim - 2 for path, t in images.items() if _alike(first, t)}
    path, first = next(iter(leaves.items()), ("", torch.empty(0)))
    return {path: 1} if first.ndim == 3 else None


def _alike(image: Tensor, other: Tensor) -> bool:
    (h, w), (oh, ow) = image.shape[-2:], other.shape[-2:]
    if not (h and w and oh and ow):
        return False
    ratio = oh / h
    whole = ratio if ratio >= 1 else 1 / ratio
    # A network with strides rounds up on the way down.
    return math.ceil(w * ratio) == ow and (whole.is_integer() or oh == math.ceil(h / round(whole)))
