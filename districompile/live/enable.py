# SPDX-License-Identifier: Apache-2.0
"""``districompile.enable``: compute the networks of a diffusers pipeline on all ranks, with one line."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from districompile.backends.base import Backend
from districompile.backends.registry import get_backend
from districompile.errors import InputError, LaunchError
from districompile.ir.spec import Phase, names_timestep
from districompile.live.build import Settings, cache_folder
from districompile.live.consensus import Consensus
from districompile.live.module import LiveModule
from districompile.progress import Progress, terminal_progress
from districompile.runtime.processes.liveness import TIMEOUT, check_timeout
from districompile.runtime.workers.group import Workers

_VAE_PARTS = ("encoder", "decoder")


class Enabled(contextlib.AbstractContextManager["Enabled"]):
    """The networks of a pipeline that all ranks compute together, by name. Leaving it as a context closes it."""

    def __init__(self, live: Mapping[str, LiveModule], consensus: Consensus, workers: Workers | None = None) -> None:
        self._live, self._consensus, self._workers = dict(live), consensus, workers

    @property
    def components(self) -> dict[str, LiveModule]:
        """The live modules by name: ``"unet"``, ``"controlnet"``, ``"vae.decoder"``."""
        return dict(self._live)

    @property
    def phase(self) -> Phase | None:
        """The phase that all calls run in; None (the default) follows the timesteps. Set it on all ranks."""
        return next((m.phase for m in self._live.values()), None)

    @phase.setter
    def phase(self, phase: Phase | None) -> None:
        for module in self._live.values():
            module.phase = phase

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """Compute what one device computes, inside: ``with enabled.exact(): ...``. Use it on all ranks alike."""
        earlier, self.phase = self.phase, "exact"
        try:
            yield
        finally:
            self.phase = earlier

    def reset(self) -> None:
        """Start a new image with the next call of each network."""
        for module in self._live.values():
            module.reset()

    def close(self) -> None:
        """Give the networks their own computation back, together with the other ranks."""
        for module in self._live.values():
            module.close()
        self._live = {}
        self._consensus.close()
        if self._workers is not None:
            self._workers.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()

    def __repr__(self) -> str:
        return f"Enabled({', '.join(self._live)})"


def enable(
    pipe: Any,
    gpus: int | None = None,
    *,
    components: Sequence[str] | None = None,
    backend: str | Backend | None = None,
    cfg: str = "none",
    lockstep: bool = False,
    workers: int | Workers | None = None,
    device: str | torch.device | None = None,
    cache: str | os.PathLike[str] | None = None,
    transport: str = "auto",
    timeout: float = TIMEOUT,
    start_timeout: float = 60.0,
    progress: Progress | None = None,
    **options: Any,
) -> Enabled:
    """Compute the denoiser, the ControlNets and the VAE of ``pipe`` on ``gpus`` ranks. Each rank calls this.

    The pipeline and its components stay the objects that they are. Each kind of call (shapes, inputs that are given) is
    converted at its first use by rank 0, kept in the cache folder, and loaded by all ranks. Whatever changes a
    component later, such as an adapter, an attention processor or a feature, is followed by the next call.

    Args:
        pipe: a diffusers pipeline, or a module. Its class and methods stay.
        gpus: the number of processes that share an image; by default those of the launcher.
        components: names of components (``"unet"``, ``"vae"``, ``"controlnet"``). By default every network that takes
            a timestep, and the VAE. A component that is not named here and cannot be divided is computed by each rank,
            with a warning.
        backend: a name or an object; by default ``inductor`` on a GPU, else ``onnxruntime``, or ``eager`` without it.
        cfg: ``"split"`` gives each half of the batch to half of the ranks where a call's batch is even.
        lockstep: compute all ranks in this process.
        workers: this process is no rank; that many processes of their own hold the ranks, as for
            :func:`districompile.load`.
        device: of the engines; by default as for :func:`districompile.load`.
        cache: the folder of conversions; by default in the user's cache folder.
        transport, timeout, start_timeout: as for :func:`districompile.load`.
        progress: where conversions show progress; by default the terminal, on rank 0.
        options: of :func:`districompile.convert`, such as ``warmup_steps`` and ``optimise``.

    Raises :class:`InputError` for a component that ``pipe`` does not have, and :class:`LaunchError` if ``gpus`` is not
    the number of processes.
    """
    check_timeout(timeout)
    chosen = _components(pipe, components)
    running = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if workers is not None:
        count = workers if isinstance(workers, int) else workers.ranks
        if lockstep or gpus not in (None, count):
            raise InputError("workers hold the ranks: leave lockstep and gpus out")
        gpus = count
    ranks = running if gpus is None else gpus
    if not lockstep and workers is None and ranks != running:
        raise LaunchError(
            f"enable for {ranks} GPUs needs {ranks} processes, but this is one of {running}: start it with "
            f"`torchrun --nproc-per-node {ranks} SCRIPT`, or pass workers={ranks} or lockstep=True"
        )
    unknown = set(options) - set(_OPTIONS)
    if unknown:
        raise InputError(f"there is no option {min(unknown)!r}; the options of a conversion are: {', '.join(_OPTIONS)}")
    if cfg not in ("none", "split"):
        raise InputError(f"cfg={cfg!r}: it is 'none' or 'split'")
    network = next(iter(chosen.values()))[0]
    settings = Settings(ranks, backend or _default_backend(network), cfg, cache_folder(cache), options)
    get_backend(settings.backend)  # refused before the ranks meet
    consensus = Consensus(1 if lockstep or workers is not None else ranks, start_timeout, timeout)
    group = Workers(workers) if isinstance(workers, int) else workers
    loading: dict[str, Any] = {"lockstep": lockstep, "device": device, "verify": "quick", "workers": group}
    if not lockstep:
        loading |= {"transport": transport, "timeout": timeout, "start_timeout": start_timeout}
    bars = progress or (terminal_progress() if consensus.rank == 0 else None)
    live = {
        name: LiveModule(name, module, settings, consensus, loading, required, bars)
        for name, (module, required) in chosen.items()
    }
    return Enabled(live, consensus, group if isinstance(workers, int) else None)


_OPTIONS = (
    "groupnorm", "displace", "warmup_steps", "drift_limit", "segments", "passes", "rules", "extensions", "strict",
    "optimise", "reuse", "transfer_bits",
)  # fmt: skip


def _components(pipe: Any, names: Sequence[str] | None) -> dict[str, tuple[nn.Module, bool]]:
    """Return the networks to divide by name, and whether they have to be."""
    if isinstance(pipe, nn.Module):
        return {type(pipe).__name__.lower(): (pipe, True)}
    held = {n: m for n, m in getattr(pipe, "components", {}).items() if isinstance(m, nn.Module)}
    if names is None:
        found = {n: part for name, m in held.items() for n, part in _networks(name, m, False).items()}
        if not found:
            raise InputError(f"{type(pipe).__name__} has no network to divide: name one with components=[...]")
        return found
    absent = next((n for n in names if n not in held), None)
    if absent is not None:
        raise InputError(f"{type(pipe).__name__} has no component {absent!r}; it has: {', '.join(held)}")
    return {n: part for name in names for n, part in _networks(name, held[name], True).items()}


def _networks(name: str, module: nn.Module, named: bool) -> dict[str, tuple[nn.Module, bool]]:
    """Return the networks inside one component: several ControlNets, both halves of an autoencoder, or itself."""
    nets = getattr(module, "nets", None)
    if isinstance(nets, nn.ModuleList):
        return {f"{name}.{i}": found for i, net in enumerate(nets) for found in _networks(name, net, named).values()}
    if any(names_timestep(p) for p in inspect.signature(module.forward).parameters):
        return {name: (module, True)}
    parts = {p: getattr(module, p, None) for p in _VAE_PARTS}
    if hasattr(module, "decode") and isinstance(parts["decoder"], nn.Module):
        return {f"{name}.{p}": (m, named) for p, m in parts.items() if isinstance(m, nn.Module)}
    return {name: (module, True)} if named else {}


def _default_backend(module: nn.Module) -> str:
    device = next((p.device.type for p in module.parameters()), "cpu")
    if device == "cuda":
        return "inductor"
    return "onnxruntime" if get_backend("onnxruntime").unavailable_reason() is None else "eager"
