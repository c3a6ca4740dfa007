# SPDX-License-Identifier: Apache-2.0
"""The registry of backends by name: built-in ones, and those of installed packages."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from districompile.backends.base import Backend
from districompile.common.extensions import entry_points, load_entry_point, package_of
from districompile.errors import BackendError

GROUP = "districompile.backends"

_BUILT_IN = {
    "eager": "districompile.backends.eager:EagerBackend",
    "inductor": "districompile.backends.inductor.backend:InductorBackend",
    "onnxruntime": "districompile.backends.onnxruntime:OnnxRuntimeBackend",
    "tensorrt": "districompile.backends.tensorrt:TensorRTBackend",
}


def backend_names() -> list[str]:
    """Return the names of all backends: those built in, then those of installed packages."""
    return [*sorted(_BUILT_IN), *sorted(set(entry_points(GROUP)) - set(_BUILT_IN))]


def get_backend(backend: str | Backend, **options: Any) -> Backend:
    """Return the backend called ``backend``, constructed with ``options``; an object is returned as it is.

    An installed package adds backends by entry points of the group ``districompile.backends``: a class, or a function
    that constructs one. It cannot replace a built-in one. Raise :class:`BackendError` for an unknown name, for options
    that the backend does not take, and, with what to install, for a backend that cannot be used here.
    """
    if isinstance(backend, Backend):
        if options:
            raise BackendError(f"the {backend.name} backend is made already: give its options where it is made")
        return backend
    if not isinstance(backend, str):
        raise BackendError(f"{backend!r} is no backend: give a name, or an object of a subclass of Backend")
    made = _make(backend, options)
    if (reason := made.unavailable_reason()) is not None:
        raise BackendError(reason)
    return made


def _make(name: str, options: dict[str, Any]) -> Backend:
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        built_in: Callable[..., Backend] = getattr(importlib.import_module(module), attribute)
        return built_in(**options)
    entry = entry_points(GROUP).get(name)
    if entry is None:
        raise BackendError(f"no backend named {name!r}; there are: {', '.join(backend_names())}")
    factory = load_entry_point(entry)
    where = f"the backend {name} of the package {package_of(entry)}"
    if not callable(factory):
        raise BackendError(f"{where} is no class, and no function that makes a backend")
    try:
        made = factory(**options)
    except BackendError:
        raise
    except Exception as e:  # of the other package's own code
        raise BackendError(f"{where} cannot be made ({type(e).__name__}: {e})") from e
    if not isinstance(made, Backend):
        raise BackendError(f"{where} is a {type(made).__name__}, not of a subclass of districompile.extend.Backend")
    return made
