# SPDX-License-Identifier: Apache-2.0
"""Convert a module for one call into a bundle of the cache folder, or find the bundle of an earlier conversion."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from districompile.api import convert
from districompile.backends.base import Backend
from districompile.backends.registry import get_backend
from districompile.bundle.bundle import MANIFEST
from districompile.bundle.refit import refit
from districompile.errors import CaptureError, ConvertError, InputError
from districompile.ir.spec import names_timestep
from districompile.live.adapters import without_adapters
from districompile.live.call import LiveCall, example_of, rows_of_call
from districompile.live.state import State, taken_fakes
from districompile.progress import Progress, tasks
from districompile.version import __version__


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the components of a pipeline are converted. ``options`` are those of :func:`districompile.convert`."""

    gpus: int
    backend: str | Backend
    cfg: str
    cache: Path
    options: Mapping[str, Any]

    def text(self) -> str:
        """Return everything that decides the engines, as text."""
        chosen = get_backend(self.backend)
        options = {k: repr(v) for k, v in self.options.items()}
        facts = [self.gpus, chosen.name, chosen.version, repr(chosen.describe()), self.cfg, options]
        return json.dumps([*facts, __version__, torch.__version__, compiler_files()], sort_keys=True)


def compiler_files() -> str:
    """Return a hash of the sizes and times of the compiler's own files: a cache never survives a change of them."""
    root = Path(__file__).resolve().parents[1]
    files = sorted(p for p in root.rglob("*.py"))
    text = [f"{p.relative_to(root)}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def cache_folder(given: str | os.PathLike[str] | None) -> Path:
    """Return the folder of conversions: ``given``, or one in the user's cache folder."""
    if given is not None:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "districompile" / "live"
    except RuntimeError:
        raise InputError("there is no home folder to keep conversions in: pass cache=FOLDER") from None


def bundle_for(
    name: str, module: nn.Module, state: State, call: LiveCall, settings: Settings, progress: Progress | None
) -> Path:
    """Return the bundle of ``module`` for ``call``: the one of an earlier conversion, or a new one.

    Adapters are left out: the weights are the base weights. Raises :class:`districompile.Error` for a module that
    cannot be converted.
    """
    base = hashlib.sha256(json.dumps(sorted(state.tensors.items())).encode()).hexdigest()
    key = hashlib.sha256("\n".join([state.structure, base, call.key, settings.text()]).encode()).hexdigest()
    folder = settings.cache / f"{name}-{key[:32]}"
    if (folder / MANIFEST).is_file():
        return folder
    rows = rows_of_call(call.arguments)
    options = {"phases": "auto", **settings.options}  # calls of a VAE do not repeat
    if not any(map(names_timestep, call.arguments)):
        options.pop("reuse", None)
    cfg = settings.cfg
    if cfg == "split" and not _splits(call.arguments):
        cfg = "none"
    with original(module), tasks(progress).task(f"converting {name} for its inputs"):
        program = None
        with contextlib.suppress(CaptureError):
            program = convert(
                module, kwargs=example_of(call, False), ranks=settings.gpus, rows=rows, cfg=cfg, **options
            )
        if program is None:  # a timestep that is looked up stays a whole number
            program = convert(module, kwargs=example_of(call, True), ranks=settings.gpus, rows=rows, cfg=cfg, **options)
        if stored := taken_fakes(module):
            raise ConvertError(
                f"{name} stores {', '.join(stored[:3])} as it runs, which only its own computation does: leave it out "
                "of components"
            )
        made_with = {"command": "enable", "module": name, "key": key}
        program.save(folder, settings.backend, progress=progress, made_with=made_with)
    return folder


def refitted(bundle: Path, out: Path, weights: Mapping[str, Tensor], progress: Progress | None) -> Path:
    """Write the bundle with other weights, by their names in the original, to ``out``, in its place if there is one."""
    refit(bundle, out, module=_Weights(weights), note={"adapters": True}, progress=progress, force=True)
    return out


def _splits(arguments: Mapping[str, Any]) -> bool:
    rows = rows_of_call(arguments) or {}
    first = next(iter(rows), "").split(".")[0]
    image = arguments.get(first)
    return isinstance(image, Tensor) and image.shape[0] % 2 == 0


class _Weights(nn.Module):
    """A module that has tensors under given names, and nothing else."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.__dict__["_tensors"] = dict(tensors)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        yield from self.__dict__["_tensors"].items()

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        yield from ()


@contextlib.contextmanager
def original(module: nn.Module) -> Iterator[None]:
    """Make ``module`` compute as the original does, without its own hooks and without adapters, inside."""
    held = module.__dict__.pop("forward", None)
    hooks = {n: module.__dict__[n] for n in ("_forward_hooks", "_forward_pre_hooks")}
    for n, entries in hooks.items():
        module.__dict__[n] = type(entries)()
    try:
        with without_adapters(module):
            yield
    finally:
        module.__dict__.update(hooks)
        if held is not None:
            module.__dict__["forward"] = held
