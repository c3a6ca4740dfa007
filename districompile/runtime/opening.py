# SPDX-License-Identifier: Apache-2.0
"""Open a bundle in the process of one rank, and check all that can be checked before ranks connect."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from districompile.backends.base import Backend, Engine
from districompile.backends.registry import get_backend
from districompile.bundle import weights
from districompile.bundle.bundle import WEIGHTS, Bundle
from districompile.bundle.weights import WeightFile
from districompile.common.extensions import Extension, load_extensions
from districompile.errors import BundleError, Error, InputError
from districompile.frontend.call_tree import check_classes
from districompile.ir.operators import check_available
from districompile.plan.plan import ExecutionPlan
from districompile.plan.shapes import find_shape
from districompile.plan.validate import value_specs
from districompile.runtime.growth import check_same_weights
from districompile.runtime.interface import check_content, check_engine, check_weights
from districompile.runtime.processes.liveness import check_timeout
from districompile.runtime.transports.kinds import TransportKind
from districompile.runtime.transports.select import check_transport


@dataclasses.dataclass(frozen=True)
class Opened:
    """A bundle that was opened and checked in this process, with the plans of the shapes to load, by name.

    ``hashed``: whether this process has checked hashes; None if none was to. ``given``: the shapes that were named.
    """

    path: str
    bundle: Bundle
    plans: Mapping[str, ExecutionPlan]
    loader: Loader
    device: torch.device
    hashed: bool | None
    named: bool

    @property
    def own_rank(self) -> int:
        """The rank of this process within its guidance half. The processes are connected."""
        return dist.get_rank() % self.bundle.plan.ranks


def open_for_load(
    bundle: str | os.PathLike[str], *, device: str | torch.device | None, verify: bool | Literal["quick"],
    backend: str | Backend | None, extensions: Iterable[Extension], transport: str | TransportKind, timeout: float,
    native_code: bool, trusted_packages: Collection[str] = (), shapes: Sequence[str] | None, local_rank: int,
) -> Opened:  # fmt: skip
    """Open a bundle, and check all that can be checked before ranks connect. The arguments are those of :func:`load`.

    Raises :class:`districompile.Error`.
    """
    opened = Bundle.open(Path(bundle), verify="quick" if verify is True and local_rank else verify)
    check_transport(transport)
    check_timeout(timeout)
    where = _device(opened, device, local_rank)
    chosen = get_backend(backend or str(opened.manifest["backend"]))
    check_native_code(opened, native_code, chosen)
    if extensions:
        load_extensions(extensions)
    if chosen.calls_operators:
        check_available(opened.operators, str(bundle))
    check_classes(opened.plan.output, trusted_packages)
    plans = opened.plans
    if shapes is not None:
        plans = {name: opened.plans[name] for name in dict.fromkeys(find_shape(opened.plans, s) for s in shapes)}
        if not plans:
            raise InputError("shapes is empty: name the shapes to load, or leave it out")
    hashed = None if verify is not True else not local_rank
    return Opened(str(bundle), opened, plans, Loader(opened, chosen, where), where, hashed, shapes is not None)


def check_native_code(bundle: Bundle, allowed: bool, backend: str | Backend | None = None) -> None:
    """Check that native code is ``allowed`` if the bundle's engines are native code.

    With ``backend``, the engines are those that this backend would load. Raises :class:`BundleError`.
    """
    chosen = get_backend(backend or str(bundle.manifest["backend"]))
    if not allowed and chosen.native_code:
        raise BundleError(
            f"{bundle.path} holds machine code, made by the {chosen.name} backend, and native code is not allowed: "
            "allow it if you trust whoever made the bundle, or convert with --backend onnxruntime or eager"
        )


class Loader:
    """Load the engines of a bundle over one mapping of its weights."""

    def __init__(self, bundle: Bundle, backend: Backend, device: torch.device) -> None:
        self._bundle, self.backend, self._device = bundle, backend, device
        self._weights: WeightFile = weights.open_weights(bundle.weights_path)
        for plan in bundle.plans.values():
            check_weights(plan, self._weights)
        self._loaded: dict[int, dict[tuple[str, tuple[str, ...]], Engine]] = {}  # by rank
        self._checked: set[str] = set()

    @property
    def weight_file(self) -> WeightFile | None:
        """The weights, if the engines read them there at each call; None if engines hold weights of their own."""
        return self._weights if self.backend.reads_weights else None

    def adopt(self, bundle: Bundle, plan: ExecutionPlan) -> None:
        """Load from ``bundle`` from here on, to which the shape ``plan`` was added.

        Raises :class:`BundleError` if it has other weights."""
        hashes = [b.manifest["files"][WEIGHTS]["sha256"] for b in (self._bundle, bundle)]
        if hashes[0] != hashes[1]:
            others = WeightFile.open(bundle.weights_path)
            check_same_weights(self._weights, others)
            self._weights = others
        if self.backend.calls_operators:
            check_available(bundle.operators, str(bundle.path))
        check_weights(plan, self._weights)
        self._bundle = bundle

    def engines(self, plan: ExecutionPlan, rank: int) -> dict[str, dict[str, Engine]]:
        """Return the engines of one rank by phase and segment, for one of the bundle's shapes.

        Equal engines are loaded once, because the segments of a rank run in turn.
        """
        with self._weights.uploading(_read_by(plan) if self.backend.reads_weights else (), self._device):
            return self._engines(plan, rank)

    def _engines(self, plan: ExecutionPlan, rank: int) -> dict[str, dict[str, Engine]]:
        loaded = self._loaded.setdefault(rank, {})
        engines: dict[str, dict[str, Engine]] = {}
        for phase, schedule in plan.phases.items():
            engines[phase] = {}
            specs = {v: by_rank[rank] for v, by_rank in value_specs(plan, phase).items()}
            for name, segment in schedule.segments.items():
                key = (segment.engines[rank], segment.outputs)
                path = self._bundle.engine_path(key[0], self.backend.suffix)
                if key not in loaded:
                    if path.name not in self._checked:
                        check_content(path, self.backend)
                    self._checked.add(path.name)
                    loaded[key] = self.backend.load(path, segment.outputs, self._weights, self._device)
                check_engine(path, segment, specs, loaded[key])
                engines[phase][name] = loaded[key]
        return engines


def upload_ahead(bundle: Bundle, device: str | None = None) -> None:
    """Begin to read the weights of ``bundle`` onto the GPU of this process, for when it is loaded.

    Without a GPU, or where engines hold weights of their own, nothing happens. Nothing is raised here."""
    with contextlib.suppress(Error):  # load says it
        where = _device(bundle, device, int(os.environ.get("LOCAL_RANK", "0")))
        if get_backend(str(bundle.manifest["backend"])).reads_weights:
            weights.upload_ahead(bundle.weights_path, _read_by(bundle.plan), where)


def _read_by(plan: ExecutionPlan) -> list[str]:
    """Return the weights that a plan's engines read, in the order of their reading."""
    segments = [s for schedule in plan.phases.values() for s in schedule.segments.values()]
    return list(dict.fromkeys(name for segment in segments for name in segment.weights))


def check_device(bundle: Bundle, device: str | None = None) -> str:
    """Return the kind of device that ``bundle`` runs on, "cuda" or "cpu": ``device``, if given and supported.

    Raises :class:`BundleError` if its engines cannot run on ``device``, or this machine has no such device.
    """
    kind = str(bundle.manifest.get("device") or "cpu").partition(":")[0]
    if device not in (None, kind):
        if bundle.manifest["backend"] != "eager":
            made = "a GPU" if kind == "cuda" else "the CPU"
            raise BundleError(f"{bundle.path} was made for {made}: only bundles of the eager backend run on {device}")
        if device == "cuda" and not torch.cuda.is_available():
            raise BundleError(f"{bundle.path} cannot run on a GPU: there is none here")
        return str(device)
    if kind == "cuda" and not torch.cuda.is_available():
        raise BundleError(f"{bundle.path} was made for a GPU, and there is none here: convert again for the CPU")
    return kind


def _device(bundle: Bundle, device: str | torch.device | None, local_rank: int) -> torch.device:
    try:
        where = torch.device(device if device is not None else check_device(bundle))
    except (RuntimeError, TypeError):
        raise InputError(f"there is no device {device!r}: use 'cpu', 'cuda', or a GPU by number as 'cuda:0'") from None
    if where.type not in ("cpu", "cuda"):
        raise InputError(f"bundles run on 'cpu' or 'cuda', not on {str(where)!r}")
    if where.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise BundleError(f"{bundle.path} cannot run on {where}: there is no GPU here")
        if where == torch.device("cuda"):  # without a number
            return torch.device("cuda", local_rank % count)
        if where.index >= count:
            raise InputError(f"there is no device {str(where)!r}: the GPUs here are cuda:0 to cuda:{count - 1}")
    return where
