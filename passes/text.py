# SPDX-License-Identifier: Apache-2.0
"""Passes as text: ``cse``, ``in-place-gather{share=0.5;least=1024}``, ``pkg.mod:Pass{layer=down}``.

A name without a colon names a pass of the package. Options are fields of the pass, converted by their annotations.
They are separated by semicolons; the items of a tuple are joined by ``+``.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, cast

from districompile.errors import ConvertError, Error
from districompile.ir.unit import STAGES
from districompile.passes.manager import Pass, pass_text

_ITEM = re.compile(r"\s*([^\s,{}]+)\s*(?:\{([^}]*)\})?\s*(?:,|$)")
_BOOL = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_PARTS = ("name", "exact", "needs", "gives", "run")


def parse_passes(text: str, known: Mapping[str, type[Any]]) -> list[Pass]:
    """Construct the passes that ``text`` names, separated by commas. ``known`` has the package's passes by name.

    Raise :class:`ConvertError` for text that is not of this form, for an unknown pass or option, for a value that is
    not of the option's type, and for a pass that cannot be imported or constructed.
    """
    out: list[Pass] = []
    at = 0
    while at < len(text):
        m = _ITEM.match(text, at)
        if m is None:
            raise ConvertError(
                f"passes {text!r} cannot be read at {text[at:]!r}: write NAME or MODULE:CLASS, with options in braces "
                "(my_pkg.my_pass:MyPass{layer=down;least=3}), separated by commas"
            )
        name, options = m[1], m[2] or ""
        found = _imported(name) if ":" in name else known.get(name)
        if found is None:
            raise ConvertError(
                f"unknown pass {name!r}: write module:Class, as in my_pkg.my_pass:MyPass, or one of: "
                f"{', '.join(sorted(known))}"
            )
        out.append(_made(name, found, options))
        at = m.end()
    return out


def check_pass(found: Any, text: str | None = None) -> Pass:
    """Check a user's own pass, and return it; a class is constructed. Raise :class:`ConvertError` for what it lacks."""
    text = text or getattr(found, "name", None) or repr(found)
    found = _construct(text, found, {}) if isinstance(found, type) else found
    missing = [a for a in _PARTS if not hasattr(found, a)]
    if missing:
        raise ConvertError(f"pass {text} lacks {', '.join(missing)}: see docs/extending/pass.md")
    for stage in (found.needs, found.gives):
        if stage not in STAGES:
            raise ConvertError(f"pass {text} names the stage {stage!r}; there are: {', '.join(STAGES)}")
    if found.needs != found.gives:
        raise ConvertError(
            f"pass {text} needs the {found.needs} stage and gives the {found.gives} stage: a pass of your own, or one "
            "that you add, has to leave the stage as it is"
        )
    return cast(Pass, found)


def _imported(text: str) -> Any:
    module, _, name = text.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as e:
        raise ConvertError(f"pass {text}: {module} cannot be imported ({e})") from e
    except AttributeError:
        raise ConvertError(f"pass {text}: {module} has no {name}") from None
    except Error:
        raise
    except (Exception, SystemExit) as e:  # of the user's own code, or of a name that cannot be a module's
        raise ConvertError(f"pass {text}: {module} cannot be imported ({type(e).__name__}: {e})") from e


def _made(text: str, found: Any, options: str) -> Pass:
    if not options.strip():
        return check_pass(found, text)
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ConvertError(f"pass {text} takes no options: it is no dataclass")
    fields = [f.name for f in dataclasses.fields(found) if f.init]
    try:
        hints = typing.get_type_hints(found)
    except Exception as e:  # an annotation that cannot be evaluated
        raise ConvertError(f"pass {text}: its annotations cannot be read ({type(e).__name__}: {e})") from e
    values: dict[str, Any] = {}
    for item in filter(None, (o.strip() for o in options.split(";"))):
        key, given, value = item.partition("=")
        key = key.strip()
        if key not in fields or not given:
            raise ConvertError(
                f"pass {text} has no option {item!r}; write option=value, with: {', '.join(fields) or 'none'}"
            )
        try:
            values[key] = _converted(hints[key], value.strip())
        except ValueError as e:
            raise ConvertError(f"pass {text}: {key}={value.strip()!r} is not {e}") from None
    return check_pass(_construct(text, found, values), text)


def _construct(text: str, cls: type[Any], values: Mapping[str, Any]) -> Any:
    try:
        return cls(**values)
    except TypeError as e:
        raise ConvertError(f"pass {text} cannot be made without more options: {e}") from e
    except Error:
        raise
    except Exception as e:  # of the user's own code
        raise ConvertError(f"pass {text} cannot be made: {type(e).__name__}: {e}") from e


def _converted(annotation: Any, text: str) -> Any:
    """Convert the text of an option. Raise ``ValueError`` with what the annotation requires."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and text.lower() in ("", "none"):
            return None
        choices = [a for a in args if a is not type(None)]
        for choice in choices:
            try:
                return _converted(choice, text)
            except ValueError as e:
                wanted = e
        raise wanted
    if origin is tuple and len(args) == 2 and args[1] is ...:
        return tuple(_converted(args[0], part) for part in text.split("+") if part)
    if origin is Literal:
        for value in args:
            if str(value) == text:
                return value
        raise ValueError(f"one of: {', '.join(map(str, args))}")
    if annotation is bool:
        if text.lower() not in _BOOL:
            raise ValueError("true or false")
        return _BOOL[text.lower()]
    if annotation in (int, float):
        try:
            return annotation(text)
        except ValueError:
            raise ValueError("a whole number" if annotation is int else "a number") from None
    if annotation is str:
        return text
    raise ValueError(f"to be given as text (its type is {annotation}): make the pass in Python")


__all__ = ["check_pass", "parse_passes", "pass_text"]
