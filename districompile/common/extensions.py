# SPDX-License-Identifier: Apache-2.0
"""Extensions: code of other packages, found by entry points or given by the caller.

An installed package names its extension in its ``pyproject.toml``::

    [project.entry-points."districompile.extensions"]
    example = "districompile_example"

The value is a module, which is imported, or a function without arguments (``package.module:register``), which is called
once. Either registers rules, operators, decompositions and translations with :mod:`districompile.extend`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterable
from types import ModuleType

from districompile.errors import Error, ExtensionError

GROUP = "districompile.extensions"

Extension = str | Callable[[], object]

_LOADED: set[Extension | ModuleType] = set()


def entry_points(group: str) -> dict[str, importlib.metadata.EntryPoint]:
    """Return the entry points of ``group`` in all installed packages, by name."""
    return {e.name: e for e in importlib.metadata.entry_points(group=group)}


def load_entry_point(entry: importlib.metadata.EntryPoint) -> object:
    """Import the object that an entry point names. Raises :class:`ExtensionError` with the package and the cause."""
    try:
        loaded: object = entry.load()
    except Error:
        raise
    except (Exception, SystemExit) as e:  # from the other package's own code
        raise ExtensionError(
            f"{entry.group} {entry.name!r} of the package {package_of(entry)} cannot be loaded "
            f"({type(e).__name__}: {_line(e)}): repair or uninstall that package"
        ) from e
    return loaded


def package_of(entry: importlib.metadata.EntryPoint) -> str:
    """Return name and version of the package that has the entry point."""
    return "unknown" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"


def load_extensions(extensions: Iterable[Extension] = ()) -> None:
    """Load the extensions of all installed packages, then ``extensions``: names of modules, or functions to call.

    Each is loaded once in a process. Raises :class:`ExtensionError` for one that cannot be loaded.
    """
    for entry in entry_points(GROUP).values():
        _activate(load_entry_point(entry), f"extension {entry.name!r} of {package_of(entry)}")
    if isinstance(extensions, str):
        extensions = [extensions]
    for extension in extensions:
        _activate(_module(extension) if isinstance(extension, str) else extension, f"extension {extension}")


def _module(name: str) -> object:
    path, _, function = name.partition(":")
    try:
        module = importlib.import_module(path)
        return getattr(module, function) if function else module
    except Error:
        raise
    except AttributeError:
        raise ExtensionError(f"extension {name}: {path} has no {function}") from None
    except (Exception, SystemExit) as e:  # from the user's own code, or an invalid name
        raise ExtensionError(f"extension {name}: it cannot be imported ({type(e).__name__}: {_line(e)})") from e


def _activate(extension: object, what: str) -> None:
    """Call a function that was not called before. A module has done its work when it was imported."""
    if isinstance(extension, ModuleType) or extension in _LOADED:
        return
    if not callable(extension):
        raise ExtensionError(f"{what} is neither a module nor a function without arguments")
    try:
        extension()
    except Error:
        raise
    except (Exception, SystemExit) as e:  # from the user's own code
        raise ExtensionError(f"{what} failed ({type(e).__name__}: {_line(e)})") from e
    _LOADED.add(extension)


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
