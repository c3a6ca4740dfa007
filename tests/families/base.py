"""The table of families, and helpers to build networks.

A family is a kind of network in a small configuration. Every parameter is random and none is zero: many networks
initialise layers with zeros, which would hide an error in earlier layers.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.abc
import importlib.machinery
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Call:
    """A module and one call of it; ``rows`` as :func:`districompile.convert` takes it (None: inferred)."""

    module: nn.Module
    kwargs: dict[str, Any]
    rows: dict[str, int] | None = None
    args: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of network. ``make(rows, columns)`` builds it.

    ``share`` is the part of the FLOPs that must be divided among the ranks. ``sizes`` are (rows, columns). ``needs`` is
    a package that must be installed.
    """

    name: str
    group: str
    make: Callable[[int, int], Call]
    share: float
    sizes: tuple[tuple[int, int], ...]
    needs: str | None


FAMILIES: dict[str, Family] = {}


def family(
    group: str,
    *,
    share: float = 0.95,
    sizes: Sequence[tuple[int, int]] = ((28, 12), (32, 16)),
    needs: str | None = None,
) -> Callable[[Callable[[int, int], Call]], Callable[[int, int], Call]]:
    """Register a family. ``sizes`` are (rows, columns): first one that most numbers of ranks do not divide."""

    def register(make: Callable[[int, int], Call]) -> Callable[[int, int], Call]:
        name = make.__name__
        assert name not in FAMILIES, name
        FAMILIES[name] = Family(name, group, make, share, tuple(sizes), needs)
        return make

    return register


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter with random values that keep the magnitude of activations; set the module to eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        if not p.numel():
            continue
        std = 0.1 if p.ndim < 2 else 1.0 / math.sqrt(max(1, p[0].numel()))
        centre = 0.7 if p.ndim < 2 else 0.0
        p.data = (torch.randn(p.shape, generator=generator) * std + centre).to(p.dtype)
    return module.eval()


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Return random values (float32) that depend on the shape and the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


class Wrapped(nn.Module):
    """A module whose forward is a function of another module."""

    def __init__(self, inner: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = inner
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.inner, *args, **kwargs)


class Decoder(nn.Module):
    """The decoder of an autoencoder."""

    def __init__(self, vae: Any, **options: Any) -> None:
        super().__init__()
        self.vae = vae
        self.options = options

    def forward(self, z: Tensor) -> Tensor:
        out = self.vae.decode(z, **self.options)
        result: Tensor = out if isinstance(out, Tensor) else out[0]
        return result


class _Nothing(type):
    """The type of empty classes, whose attributes are empty classes as well."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(name, (), {"__init__": lambda self, *a, **k: None})


class _Stub(ModuleType):
    """A placeholder for a package: every attribute is an empty class, and every submodule exists."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(name, (), {})


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, roots: Sequence[str]) -> None:
        self.roots = tuple(roots)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in self.roots:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@functools.cache
def import_network(name: str, unused: tuple[str, ...] = ()) -> Any:
    """Import a package without the packages ``unused``, which it needs for training alone.

    Those that cannot be imported are replaced by placeholders during the import.
    """
    missing = []
    for root in unused:
        try:
            importlib.import_module(root)
        except Exception:  # not installed, or not for the installed versions of its dependencies
            missing.append(root)
    finder = _StubFinder(missing)
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module(name)
    finally:
        sys.meta_path.remove(finder)
        for module in [m for m in sys.modules if m.split(".")[0] in missing]:
            del sys.modules[module]


def tensors_of(x: Any) -> list[Tensor]:
    """Return all tensors of an output, in order."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, Mapping):
        return [t for v in x.values() for t in tensors_of(v)]
    if isinstance(x, list | tuple):
        return [t for v in x for t in tensors_of(v)]
    return []


def error_of(got: Any, want: Any) -> float:
    """Return the largest relative error of the tensors of an output: the norm of the difference over the norm.

    It is infinite for tensors of other shapes and for values that are not finite.
    """
    found, expected = tensors_of(got), tensors_of(want)
    assert len(found) == len(expected) > 0
    worst = 0.0
    for g, w in zip(found, expected, strict=True):
        if g.shape != w.shape:
            return math.inf
        scale = float(w.double().norm())
        error = float((g.double() - w.double()).norm()) / max(scale, 1e-12)
        worst = max(worst, error) if math.isfinite(error) else math.inf
    return worst
