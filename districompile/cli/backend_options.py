# SPDX-License-Identifier: Apache-2.0
"""Backend options: ``-o key=value``, typed by the keyword parameters of the backend's constructor.

The annotation of a parameter gives its type: ``Literal`` (choices), ``bool``, ``int``, ``float``, ``str``, or a tuple
or collection of these, separated by commas. Parameters of other types are not options. The class attribute
``OPTION_HELP`` may hold one line of help for each option.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Literal, Union

from districompile.backends.registry import get_backend
from districompile.cli.common import UsageError
from districompile.errors import BackendError

BUILT_IN = ("eager", "inductor", "onnxruntime", "tensorrt")
_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_SCALARS = (bool, int, float, str)
_COLLECTIONS = (tuple, list, collections.abc.Collection, collections.abc.Sequence, collections.abc.Iterable)

Scalar = bool | int | float | str
Value = Scalar | tuple[Scalar, ...]


class _NotTyped(Exception):
    """The annotation is none that text can be converted to."""


@dataclasses.dataclass(frozen=True)
class BackendOption:
    """An option of a backend: its name, type, default and help."""

    name: str
    types: tuple[object, ...]  # of the items where several; each a type of _SCALARS or a choice
    several: bool
    default: object
    help: str = ""

    @property
    def type_text(self) -> str:
        """The type as shown to users: ``auto|torch``, ``int``, ``cpu|cuda,...``."""
        text = "|".join(t.__name__ if isinstance(t, type) else str(t) for t in self.types)
        text = text.replace("bool", "true|false")
        return f"{text}[,...]" if self.several else text

    def parse(self, text: str) -> Value:
        """Convert ``text``. Raise ``ValueError`` where it does not fit the type."""
        if self.several:
            return tuple(self._scalar(item.strip()) for item in text.split(",") if item.strip())
        return self._scalar(text)

    def _scalar(self, text: str) -> Scalar:
        for kind in self.types:
            if not isinstance(kind, type):
                if text == str(kind):
                    return typing.cast(Scalar, kind)
            elif kind is bool:
                if text.lower() in _BOOLS:
                    return _BOOLS[text.lower()]
            else:
                try:
                    return typing.cast(Scalar, kind(text))
                except ValueError:
                    continue
        raise ValueError(text)


def options_of(backend: type) -> dict[str, BackendOption]:
    """Return the options of a backend class, by name."""
    helps = getattr(backend, "OPTION_HELP", {})
    module = sys.modules.get(backend.__module__)
    found: dict[str, BackendOption] = {}
    for name, parameter in inspect.signature(backend).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            continue
        annotation = parameter.annotation
        if isinstance(annotation, str):
            try:
                annotation = eval(annotation, vars(module) if module is not None else {})
            except (NameError, TypeError, AttributeError):
                continue
        try:
            kinds, several = _types(annotation)
        except _NotTyped:
            continue
        found[name] = BackendOption(name, kinds, several, parameter.default, str(helps.get(name, "")))
    return found


def _types(annotation: object) -> tuple[tuple[object, ...], bool]:
    """The accepted types of one item, and whether several items are accepted."""
    if annotation is None or annotation is type(None):
        return (), False
    if annotation in _SCALARS:
        return (annotation,), False
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return tuple(arguments), False
    if origin in _COLLECTIONS:
        kinds, _ = _types(arguments[0])
        return kinds, True
    if origin is Union or origin is types.UnionType:
        members = [_types(a) for a in arguments]
        kinds = tuple(dict.fromkeys(k for m, _ in members for k in m))
        return kinds, any(several for _, several in members)
    raise _NotTyped(annotation)


def parse_options(name: str, given: Iterable[str]) -> dict[str, Value]:
    """Return the constructor's arguments for ``key=value`` texts.

    Raises :class:`UsageError` for an unknown key or a value of another type, :class:`BackendError` where the backend
    cannot be used here.
    """
    known = options_of(type(get_backend(name)))
    values: dict[str, Value] = {}
    for text in given:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise UsageError(f"--backend-option {text}: write it as KEY=VALUE")
        option = known.get(key)
        if option is None:
            there = ", ".join(known) or "none"
            raise UsageError(f"--backend-option {text}: the backend {name} has no option {key}; its options: {there}")
        if key in values:
            raise UsageError(f"--backend-option {text}: {key} is given twice")
        try:
            values[key] = option.parse(value.strip())
        except ValueError:
            raise UsageError(
                f"--backend-option {text}: {key} accepts {option.type_text}, not {value.strip()!r}"
            ) from None
    return values


def help_lines(name: str) -> list[str]:
    """Describe the options of one backend, at most 80 columns wide."""
    import textwrap

    try:
        known = options_of(type(get_backend(name)))
    except BackendError as e:
        return textwrap.wrap(f"{name}: cannot be used here: {e}", 80, subsequent_indent="    ")
    lines = [f"{name}:" if known else f"{name}: no options"]
    for option in known.values():
        head = f"  -o {option.name}={option.type_text}"
        lines += textwrap.wrap(head, 80, subsequent_indent="      ", break_long_words=False)
        note = option.help
        if "default" not in note.lower() and option.default is not inspect.Parameter.empty:
            note = f"{note} Default: {_default(option.default)}.".strip()
        lines += textwrap.wrap(note, 80, initial_indent="      ", subsequent_indent="      ")
    return lines


def _default(value: object) -> str:
    if value is None:
        return "chosen by the backend"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(str, value)) or "none"
    return str(value)


def print_help(name: str | None) -> None:
    """Print the options of the backend ``name``, or of all built-in ones. Raise :class:`UsageError` for no backend."""
    if name is not None and name not in BUILT_IN:
        get_backend(name)  # raises where there is none
    for each in (name,) if name is not None else BUILT_IN:
        print("\n".join(help_lines(each)))
