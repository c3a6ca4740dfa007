# SPDX-License-Identifier: Apache-2.0
"""Transports by name: those of this package, and those that other packages register.

A package registers a transport by an entry point of the group :data:`ENTRY_POINTS`. Its name is the transport's. Its
value is a class (or function) that makes the :class:`~.kinds.TransportKind` without arguments::

    [project.entry-points."districompile.transports"]
    counting = "mypackage.transports:CountingTransport"

An object is accepted wherever a name is. ``"auto"`` chooses among :data:`BUILT_IN` alone, so that installing a package
changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points

from districompile.errors import InputError
from districompile.runtime.transports.builtin import GlooTransport, NcclTransport, PeerTransport
from districompile.runtime.transports.kinds import TransportKind

AUTO = "auto"
ENTRY_POINTS = "districompile.transports"
BUILT_IN: tuple[TransportKind, ...] = (PeerTransport(), NcclTransport(), GlooTransport())
"""In the order in which ``"auto"`` tries them."""


def transport_name(transport: str | TransportKind) -> str:
    """Return the name of a transport, which may be given as an object."""
    return transport if isinstance(transport, str) else transport.name


def candidates(transport: str | TransportKind) -> Sequence[TransportKind]:
    """Return the kinds to try for ``transport``, best first: several for ``"auto"``, else exactly one.

    Raises :class:`InputError` for an unknown name, and for a package that cannot be loaded or provides no transport.
    """
    if not isinstance(transport, str):
        return (_checked(transport, repr(transport)),)
    if transport == AUTO:
        return BUILT_IN
    for kind in BUILT_IN:
        if kind.name == transport:
            return (kind,)
    registered = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if transport not in registered:
        names = dict.fromkeys((AUTO, *(kind.name for kind in BUILT_IN), *sorted(registered)))
        raise InputError(f"there is no transport {transport!r}: use one of {', '.join(names)}")
    return (_loaded(registered[transport]),)


def _loaded(point: EntryPoint) -> TransportKind:
    where = f"the transport {point.name!r} ({point.value})"
    try:
        made = point.load()()
    except Exception as e:
        raise InputError(f"{where} cannot be loaded: {type(e).__name__}: {e}") from e
    return _checked(made, where)


def _checked(kind: object, where: str) -> TransportKind:
    if not isinstance(kind, TransportKind):
        raise InputError(f"{where} is no transport: it lacks a name or method of TransportKind")
    return kind
