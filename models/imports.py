# SPDX-License-Identifier: Apache-2.0
"""Objects of users' own modules, by name."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Any

from districompile.models.files import first_line
from districompile.models.inputs import ModelError


def import_object(reference: str, what: str) -> Any:
    """``"package.module:name"`` to the object, also from the current folder. Raises :class:`ModelError` saying what is
    missing."""
    name, _, attribute = reference.partition(":")
    add_current_folder()
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as e:
        raise ModelError(
            f"{what} {reference!r}: there is no module {e.name!r} (looked in the current folder too)"
        ) from e
    except (Exception, SystemExit) as e:  # of the user's own code
        raise ModelError(f"{what} {reference!r}: importing {name} failed: {raised(e)}") from e
    for part in attribute.split(".") if attribute else ():
        if not hasattr(found, part):
            raise ModelError(f"{what} {reference!r}: the module {name} has no {part!r}")
        found = getattr(found, part)
    return found


def add_current_folder() -> None:
    """Make modules in the current folder importable: a console script starts without it, and people keep theirs
    there."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())


def raised(error: BaseException) -> str:
    """An exception of the user's own code: its class, what it says, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first_line(error)}{where}"
