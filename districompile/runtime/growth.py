# SPDX-License-Identifier: Apache-2.0
"""Add a shape to a bundle that is loaded, at the first call that has it.

Rank 0 converts the shape into the bundle's folder, the others wait. Then all load it. If that fails anywhere, all ranks
raise the same error, and go on with the shapes that they have.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from districompile.bundle.bundle import Bundle, check_hashes
from districompile.bundle.weights import WeightFile
from districompile.errors import BundleError, Error, InputError
from districompile.plan.plan import ExecutionPlan
from districompile.plan.shapes import input_shapes, shape_key
from districompile.runtime.processes.liveness import Liveness

_numbers = itertools.count()


@runtime_checkable
class ShapeSource(Protocol):
    """Something that converts a shape into a bundle. ``timeout`` limits, in seconds, how long that may take."""

    timeout: float

    def check(self, bundle: Bundle) -> None:
        """Check, when ``bundle`` is loaded, that shapes can be added to it. Raises :class:`districompile.Error`."""

    def add(self, bundle: Bundle, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Add the shape of a call to the folder of ``bundle``. Raises :class:`districompile.Error`."""


_SOURCES: dict[str, Callable[[], ShapeSource]] = {}


def register_source(name: str, make: Callable[[], ShapeSource]) -> None:
    """Let ``load(shapes=NAME)`` use what ``make`` returns."""
    _SOURCES[name] = make


def source_named(name: str) -> ShapeSource:
    """Return the source ``name``. Raises :class:`InputError` for an unknown one."""
    if name not in _SOURCES:
        known = ", ".join(map(repr, _SOURCES)) or "none: use districompile.load"
        raise InputError(f"shapes={name!r}: there is no such source of shapes (there are: {known})")
    return _SOURCES[name]()


class Growth:
    """Add shapes to the loaded ``bundle``. ``leads``: this process converts. ``liveness``: None without other ranks.

    All ranks construct one together.
    """

    def __init__(self, bundle: Bundle, source: ShapeSource, leads: bool, liveness: Liveness | None) -> None:
        self._bundle, self._source, self._leads, self._liveness = bundle, source, leads, liveness

    def add(
        self, sizes: Mapping[str, tuple[int, ...]], args: Sequence[Any], kwargs: Mapping[str, Any],
        load: Callable[[Bundle, ExecutionPlan], Any],
    ) -> tuple[str, ExecutionPlan, Any]:  # fmt: skip
        """Return name, plan and engines of the shape ``sizes``, which ``load`` loads. All ranks call it together.

        Raises :class:`InputError`, the same on all ranks.
        """
        number = next(_numbers)
        problem = None
        if self._leads:
            try:
                if self._find(Bundle.open(self._bundle.path, "quick"), sizes) is None:  # else another process added it
                    with torch.inference_mode(False):
                        self._source.add(self._bundle, args, kwargs)
            except Error as e:
                problem = str(e)
        self._agree(f"shape {number} is converted", problem, self._source.timeout)
        found: tuple[str, ExecutionPlan, Any] | None = None
        try:
            found = self._load(sizes, load)
        except Error as e:
            problem = str(e)
        self._agree(f"shape {number} is loaded", problem, self._source.timeout)
        assert found is not None
        return found

    def _load(
        self, sizes: Mapping[str, tuple[int, ...]], load: Callable[[Bundle, ExecutionPlan], Any]
    ) -> tuple[str, ExecutionPlan, Any]:
        bundle = Bundle.open(self._bundle.path, "quick")
        name = self._find(bundle, sizes)
        if name is None:
            raise BundleError(f"{bundle.path} has no such shape on this machine: share the folder between machines")
        earlier: Mapping[str, Any] = self._bundle.manifest["files"]
        files: Mapping[str, Any] = bundle.manifest["files"]
        check_hashes(bundle.path, {n: e["sha256"] for n, e in files.items() if earlier.get(n) != e})
        return name, bundle.plans[name], load(bundle, bundle.plans[name])

    @staticmethod
    def _find(bundle: Bundle, sizes: Mapping[str, tuple[int, ...]]) -> str | None:
        wanted = shape_key(sizes)
        return next((name for name, plan in bundle.plans.items() if shape_key(input_shapes(plan)) == wanted), None)

    def _agree(self, name: str, problem: str | None, limit: float) -> None:
        """Raise the first problem of any rank on all of them."""
        found = [problem]
        if self._liveness is not None:
            found = [facts["problem"] for facts in self._liveness.exchange(name, {"problem": problem}, limit)]
        for text in found:
            if text is not None:
                raise InputError(f"the shape of this call cannot be added: {text}")


def check_same_weights(loaded: WeightFile, now: WeightFile) -> None:
    """Check that the file ``now`` has the values of the one that was ``loaded``, and perhaps more.

    Raises :class:`BundleError`.
    """
    for name in loaded:
        same = name in now and now.spec(name) == loaded.spec(name)
        if not same or not torch.equal(
            *(t.tensor(name).contiguous().reshape(-1).view(torch.uint8) for t in (loaded, now))
        ):
            raise BundleError(f"{now.path} has other weights than when it was loaded: load the bundle again")
