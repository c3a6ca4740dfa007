# SPDX-License-Identifier: Apache-2.0
"""The weights that several shapes of one model share, so that a bundle holds each of them once.

A weight of the module has the same name in every shape. What passes join, and constants that a module makes for the
sizes of its inputs, may have the same name in two shapes and differ. The later one is then stored under another name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from districompile.bundle.refit import CONSTANT
from districompile.bundle.weights import WeightFile
from districompile.errors import BundleError
from districompile.ir.spec import TensorSpec

Reader = Callable[[], Tensor]
Joined = Mapping[str, Sequence[tuple[str, int]]]
Weights = Mapping[str, tuple[TensorSpec, Reader]]


class SharedWeights:
    """The weights of a bundle, to which the weights of each shape are added.

    ``stored`` is the file of a bundle that is there, with the weights that its passes ``joined``. Its values hold for
    all shapes, also where the bundle was given other weights than its model has. ``refitted``: that is so, so that no
    weight of the model may be used.
    """

    def __init__(
        self, stored: WeightFile | None = None, joined: Joined = MappingProxyType({}), refitted: bool = False
    ) -> None:
        self._stored, self._refitted = stored, refitted
        self._joined: dict[str, tuple[tuple[str, int], ...]] = {n: _pairs(parts) for n, parts in joined.items()}
        self.items: dict[str, tuple[TensorSpec, Reader]] = {}
        for name in stored or ():
            assert stored is not None
            self.items[name] = stored.spec(name), functools.partial(stored.tensor, name)
        self._parts = {p: (name, parts) for name, parts in self._joined.items() for p, _ in parts}
        self._old = len(self.items)

    @property
    def grown(self) -> bool:
        """Whether a weight was added that the file does not have."""
        return len(self.items) > self._old

    def add(self, weights: Weights, joined: Joined) -> dict[str, str]:
        """Add the weights of one shape. Return the new names of those that are stored under another name.

        Raises :class:`BundleError` for a weight of the module that differs from the one of another shape.
        """
        renamed: dict[str, str] = {}
        for name, (spec, read) in weights.items():
            parts = _pairs(joined[name]) if name in joined else None
            reader = self._reader(name, parts, read)
            found = self._same(name, spec, reader, parts)
            if found is None:
                found = self._free(name)
                self.items[found] = spec, reader
                if parts is not None:
                    self._joined[found] = parts
            if found != name:
                renamed[name] = found
        return renamed

    def _same(
        self, name: str, spec: TensorSpec, reader: Reader, parts: tuple[tuple[str, int], ...] | None
    ) -> str | None:
        """Return under which name this weight is there already; None if it is not."""
        constant = CONSTANT.fullmatch(name) is not None
        candidates = [n for n in self.items if n == name or n.startswith(f"{name}@")]
        for found in candidates:
            there, earlier = self.items[found]
            if there == spec and self._joined.get(found) == parts:
                stored = self._stored is not None and found in self._stored and not constant
                if stored or _equal(earlier(), reader(), spec):
                    return found
        if candidates and not constant and parts is None and self._joined.get(name) is None:
            raise BundleError(f"the weight {name} differs between the shapes: a bundle holds the shapes of one model")
        return None

    def _reader(self, name: str, parts: tuple[tuple[str, int], ...] | None, read: Reader) -> Reader:
        """Return the reader of a weight: from the stored weights as far as they have it, else from the model."""
        if self._stored is None or name in self._stored or CONSTANT.fullmatch(name) is not None:
            return read
        readers = [self._part(n) for n in ([p for p, _ in parts] if parts is not None else [name])]
        found = [r for r in readers if r is not None]
        if len(found) == len(readers):
            return found[0] if parts is None else functools.partial(_read_joined, found)
        if self._refitted:
            raise BundleError(
                f"this shape needs the weight {name}, which the bundle does not have, and its weights are no longer "
                "those of its model: convert again with all shapes"
            )
        return read

    def _part(self, name: str) -> Reader | None:
        assert self._stored is not None
        if name in self._stored:
            return functools.partial(self._stored.tensor, name)
        if name not in self._parts or self._parts[name][0] not in self._stored:
            return None
        joined, parts = self._parts[name]
        start = 0
        for part, rows in parts:
            if part == name:
                return functools.partial(_read_rows, functools.partial(self._stored.tensor, joined), start, rows)
            start += rows
        return None

    def _free(self, name: str) -> str:
        found, number = name, 1
        while found in self.items:
            number += 1
            found = f"{name}@{number}"
        return found


def _pairs(parts: Sequence[Sequence[object]]) -> tuple[tuple[str, int], ...]:
    return tuple((str(n), int(str(rows))) for n, rows in parts)


def _equal(a: Tensor, b: Tensor, spec: TensorSpec) -> bool:
    """Return whether two tensors have the same bytes in the dtype of ``spec``."""
    if a.data_ptr() == b.data_ptr() and a.dtype == b.dtype == spec.dtype and a.stride() == b.stride() and a.numel():
        return True
    a, b = (t.detach().to(device="cpu", dtype=spec.dtype).contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def _read_joined(readers: Sequence[Reader]) -> Tensor:
    return torch.cat([read().detach() for read in readers])


def _read_rows(read: Reader, start: int, rows: int) -> Tensor:
    return read()[start : start + rows]
