# SPDX-License-Identifier: Apache-2.0
"""Check configurations of diffusers' models: values of a wrong type, and the key that makes a constructor fail."""

from __future__ import annotations

import inspect
import time
import types
import typing
from collections.abc import Mapping
from typing import Any

import torch

from districompile.models.inputs import ModelError

_LARGEST = 1 << 31
_MOST_LAYERS = 1000
_SEARCH = 20.0  # seconds
_NAMES: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a word",
                          tuple: "a list", dict: "an object"}  # fmt: skip


def check_config(cls: type[Any], config: Mapping[str, Any], where: str) -> None:
    """Check the type of every value against the constructor of ``cls``.

    The constructor itself handles null. Raises :class:`ModelError`, which names the file (``where``), key and value.
    """
    if config.get("quantization_config") is not None:
        raise ModelError(f"{where}: the weights are quantised (quantization_config); give a folder of plain ones")
    for key, annotation in _declared(cls).items():
        value = config.get(key)
        kinds = _kinds(annotation)
        if value is None or not kinds:
            continue
        if key == "sample_size":
            kinds = kinds | {int, tuple}
        only_lists = typing.get_origin(annotation) in (tuple, list)
        if only_lists and not (isinstance(value, list | tuple) and (value or _may_be_empty(cls, key))):
            raise ModelError(f"{where}: {key} is {shortened(value)}; it must be a list of at least one value")
        wrong = next((v for v in _leaves(value, kinds) if not _fits(v, kinds)), None)
        if wrong is not None:
            elements = kinds - {tuple} if only_lists else kinds
            wanted = " or ".join(_NAMES[k] for k in _NAMES if k in elements)
            raise ModelError(f"{where}: {key} {'has' if only_lists else 'is'} {shortened(wrong)}; it must be {wanted}")
        _check_magnitude(key, value, where)


def _may_be_empty(cls: Any, key: str) -> bool:
    default = inspect.signature(cls.__init__).parameters[key].default
    return isinstance(default, list | tuple) and not default


def _check_magnitude(key: str, value: Any, where: str) -> None:
    most = _MOST_LAYERS if "layers_per_block" in key else _LARGEST
    for v in _leaves(value, {tuple}):
        if isinstance(v, int | float) and not abs(v) < most:
            raise ModelError(f"{where}: {key} is {shortened(v)}, which is far too much")


def shortened(value: Any) -> str:
    """Format a value for a message, in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def culprit(cls: Any, config: Mapping[str, Any]) -> str | None:
    """Find the one key of ``config`` that keeps ``cls`` from being built: with its default, or 1, the build succeeds.

    Returns a phrase for a message. Without such a key the phrase says that the values do not go together. Returns None
    if ``cls`` can be built. The search ends after 20 seconds.
    """
    if _builds(cls, config):
        return None
    until = time.monotonic() + _SEARCH
    for key, parameter in inspect.signature(cls.__init__).parameters.items():
        if key not in config or parameter.default is inspect.Parameter.empty:
            continue
        others = [v for v in (parameter.default, 1) if v != config[key]]
        if any(_builds(cls, {**config, key: v}) for v in others[: None if isinstance(config[key], int) else 1]):
            return f"{key} is {shortened(config[key])} in its config.json"
        if time.monotonic() > until:
            break
    return "the values in its config.json do not go together"


def _builds(cls: Any, config: Mapping[str, Any]) -> bool:
    try:
        with torch.device("meta"):
            cls.from_config(dict(config))
    except Exception:  # a constructor may raise anything for a wrong value
        return False
    return True


def _declared(cls: type[Any]) -> dict[str, Any]:
    try:
        return {k: v for k, v in typing.get_type_hints(cls.__init__).items() if k != "return"}
    except (NameError, TypeError):  # a hint that only a type checker can resolve
        return {}


def _kinds(annotation: Any) -> set[Any]:
    """Return the plain types within a declared type, or an empty set if it names any other type."""
    if annotation in (bool, int, float, str):
        return {annotation}
    if annotation in (type(None), Ellipsis):
        return set()
    origin = typing.get_origin(annotation) or annotation
    if origin in (tuple, list):
        inner = [_kinds(a) for a in typing.get_args(annotation) if a is not Ellipsis]
        return {tuple}.union(*inner) if all(inner) else set()
    if origin is dict:
        return {dict}
    if origin in (typing.Union, types.UnionType):
        inner = [_kinds(a) for a in typing.get_args(annotation) if a is not type(None)]
        return set().union(*inner) if all(inner) else set()
    return set()


def _leaves(value: Any, kinds: set[Any]) -> list[Any]:
    """Return the elements of nested lists if the key takes lists, else the value itself."""
    if isinstance(value, list | tuple) and tuple in kinds:
        return [leaf for v in value for leaf in _leaves(v, kinds)]
    return [value]


def _fits(value: Any, kinds: set[Any]) -> bool:
    if value is None or kinds == {tuple}:
        return value is None or isinstance(value, list | tuple)
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int):
        return bool(kinds & {int, float})
    if isinstance(value, float):
        return float in kinds or (int in kinds and value.is_integer())
    return isinstance(value, tuple(dict if k is dict else k for k in kinds))
