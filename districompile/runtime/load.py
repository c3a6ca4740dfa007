# SPDX-License-Identifier: Apache-2.0
"""Load a bundle: check it, load the engines of this rank, and connect the ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

from districompile.backends.base import Backend
from districompile.bundle.bundle import Bundle
from districompile.common.extensions import Extension
from districompile.errors import BundleError, InputError, LaunchError
from districompile.plan.plan import ExecutionPlan
from districompile.runtime.face.placeholders import Config as Config
from districompile.runtime.growth import Growth, ShapeSource, source_named
from districompile.runtime.module import DistributedModule
from districompile.runtime.opening import Opened, open_for_load
from districompile.runtime.opening import check_device as check_device
from districompile.runtime.opening import check_native_code as check_native_code
from districompile.runtime.processes.liveness import TIMEOUT, Liveness
from districompile.runtime.processes.same_bundle import compare
from districompile.runtime.runner import ProcessRunner, Runner, SimulatedRunner
from districompile.runtime.transports.gloo import start_gloo
from districompile.runtime.transports.kinds import TransportKind
from districompile.runtime.transports.registry import transport_name
from districompile.runtime.workers.group import Workers
from districompile.runtime.workers.runner import call_workers


@torch.inference_mode(False)
def load(
    bundle: str | os.PathLike[str],
    *,
    rank: int | None = None,
    ranks: int | None = None,
    lockstep: bool = False,
    device: str | torch.device | None = None,
    verify: bool | Literal["quick"] = True,
    backend: str | Backend | None = None,
    extensions: Iterable[Extension] = (),
    start_timeout: float = 60.0,
    timeout: float = TIMEOUT,
    transport: str | TransportKind = "auto",
    cuda_graph: bool = True,
    trusted_packages: Collection[str] = (),
    native_code: bool = True,
    shapes: str | Sequence[str] | ShapeSource | None = None,
    workers: int | Workers | None = None,
    warm_up: bool = False,
) -> DistributedModule:
    """Load a bundle in each rank's process, as a module that is called like the original.

    Rank and number of processes are those of torch.distributed if it is initialised, over whichever backend. Otherwise
    they are ``rank`` and ``ranks``, or else those of the launcher (RANK, WORLD_SIZE). ``lockstep`` loads all ranks into
    this process instead. ``device`` is by default the bundle's kind of device, number LOCAL_RANK. One process of each
    machine checks hashes (``verify="quick"``: sizes alone). The ranks compare what they have loaded.

    ``start_timeout`` limits, in seconds, how long the ranks may take to connect. ``timeout`` limits, in seconds, each
    transfer within a call, and the wait for a rank that sends no heartbeat. The limit is ten times that in the first
    calls, and while ranks wait for another rank to enter a call. Rank 0 may take any time between two calls.

    ``transport`` is "peer" (copy engines between GPUs that reach each other's memory), "nccl" (one GPU a rank), "gloo"
    (anything, through host memory), or "auto", the first of these that works here. It may also be the name of a
    transport that another package registers (:mod:`districompile.runtime.transports.registry`), or a
    :class:`~.transports.kinds.TransportKind`. ``cuda_graph``: on a GPU, replay each call as one CUDA graph.

    ``backend`` selects another backend than the one that built the engines, by name or as an object. ``extensions`` are
    names of modules, or functions, that declare the operators of other packages which the bundle calls. Extensions of
    installed packages are found automatically (:mod:`districompile.common.extensions`).

    ``shapes`` are the names of the bundle's shapes to load (:mod:`districompile.plan.shapes`); the default is all of
    them. A call has the plan that its inputs' shapes fit. With ``"auto"``, or a
    :class:`~districompile.shapes.AddShapes`, a call with other shapes converts them first, adds them to the bundle, and
    goes on.

    ``workers`` is for a process that is no rank: that many processes are started, which hold the ranks. The module
    sends them its calls. They end with it, or with this process. Several bundles share the processes of one
    :class:`~districompile.runtime.workers.group.Workers`. ``device`` is then where the caller's tensors are.

    ``warm_up`` calls the module a few times first, so that the first image takes no longer than the others
    (:meth:`DistributedModule.warm_up`).

    A bundle is data, except for engines that are machine code (``inductor``, ``tensorrt``), which ``native_code=False``
    refuses. The class of an output is imported only if it is one of
    :data:`~districompile.frontend.call_tree.OUTPUT_CLASSES`, or belongs to one of the ``trusted_packages``. Any other
    output has the same fields, and the class :class:`~districompile.frontend.call_tree.OutputNamespace`.

    Raises :class:`BundleError` for a bundle that is damaged or does not fit, :class:`LaunchError` for another number of
    processes than the bundle was made for, and :class:`BackendError` if the backend is not installed.
    """
    source = source_named(shapes) if isinstance(shapes, str) else shapes if isinstance(shapes, ShapeSource) else None
    names = list(shapes) if isinstance(shapes, Sequence) and not isinstance(shapes, str) else None
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    opened = open_for_load(
        bundle, device=device, verify="quick" if verify is True and workers is not None else verify,
        backend=backend, extensions=extensions, transport=transport, timeout=timeout, native_code=native_code,
        trusted_packages=trusted_packages, shapes=names, local_rank=local_rank,
    )  # fmt: skip
    if source is not None:
        _check_growth(opened.bundle, source)
    plan, plans, loader, where = opened.bundle.plan, opened.plans, opened.loader, opened.device
    config = opened.bundle.manifest.get("config")
    weight_file = loader.weight_file
    runner: Runner
    liveness: Liveness | None = None
    load_shape: Callable[[Bundle, ExecutionPlan], Any]
    if workers is not None:
        if lockstep or rank is not None or ranks is not None:
            raise InputError("workers hold the ranks: leave lockstep, rank and ranks out")
        options = {
            "verify": verify, "native_code": native_code, "timeout": timeout, "start_timeout": start_timeout,
            "cuda_graph": cuda_graph, "shapes": names, "device": where.type, "grows": source is not None,
            "backend": backend, "transport": transport, "extensions": list(extensions),
        }  # fmt: skip
        runner, load_shape = call_workers(opened.bundle, plans, workers, where, options)
        weight_file = None
    elif lockstep or (plan.world_size == 1 and _running(ranks) == 1):
        if lockstep and plan.options.collectives == "inside":
            raise LaunchError(
                f"{bundle} has the collectives of its exact phase inside of engines: they need one process for each GPU"
            )
        every = [(p, [loader.engines(p, r) for r in range(p.ranks)]) for p in plans.values()]
        runner = SimulatedRunner(*every[0], where, every[1:], cuda_graph)

        def load_shape(bundle: Bundle, plan: ExecutionPlan) -> Any:
            loader.adopt(bundle, plan)
            return [loader.engines(plan, r) for r in range(plan.ranks)]

    else:
        runner, liveness = join(
            opened, rank, ranks, transport=transport, timeout=timeout, start_timeout=start_timeout,
            cuda_graph=cuda_graph, grows=source is not None,
        )  # fmt: skip

        def load_shape(bundle: Bundle, plan: ExecutionPlan) -> Any:
            loader.adopt(bundle, plan)
            return loader.engines(plan, opened.own_rank)

    growth = None if source is None else (Growth(opened.bundle, source, runner.leads, liveness), load_shape)
    module = DistributedModule(plans, runner, where, config, trusted_packages, str(bundle), growth, weight_file)
    if warm_up:
        module.warm_up()
    return module


def join(
    opened: Opened, rank: int | None = None, ranks: int | None = None, *, transport: str | TransportKind,
    timeout: float, start_timeout: float, cuda_graph: bool, grows: bool = False,
) -> tuple[ProcessRunner, Liveness]:  # fmt: skip
    """Connect this process, as one rank, with the others, and load its engines. All ranks call it alike.

    The arguments are those of :func:`load`; ``grows``: shapes are added by need. Raises :class:`LaunchError` for
    another number of processes than the bundle was made for, and for ranks that differ.
    """
    plan, plans, loader = opened.bundle.plan, opened.plans, opened.loader
    if _running(ranks) != plan.world_size:
        raise LaunchError(
            f"{opened.path} was converted for {plan.world_size} processes, but this is one of {_running(ranks)}: start "
            f"it with `torchrun --nproc-per-node {plan.world_size} SCRIPT`, draw with `districompile run "
            f"{opened.path}`, or load it with workers={plan.world_size} or with lockstep=True"
        )
    if opened.device.type == "cuda":
        torch.cuda.set_device(opened.device)
    start_gloo(rank, ranks, start_timeout)
    liveness = Liveness.of_default_group(timeout, start_timeout)
    try:
        given = "added by need" if grows else ", ".join(plans) if opened.named else "all of them"
        compare(liveness, opened.bundle, loader.backend.name, transport_name(transport), opened.hashed, given)
        found = [(p, loader.engines(p, opened.own_rank)) for p in plans.values()]
        liveness.exchange("loaded", {})  # some ranks take longer than others; from here on they wait for each other
        runner = ProcessRunner(*found[0], opened.device, timeout, transport, cuda_graph, liveness, found[1:])
    except BaseException as e:
        liveness.fail(e)
        liveness.close()
        raise
    return runner, liveness


def _check_growth(bundle: Bundle, source: ShapeSource) -> None:
    """Raise :class:`BundleError` for a bundle to which no shape can be added."""
    if bundle.plan.options.collectives == "inside":
        raise BundleError(f"{bundle.path} has collectives inside of engines: add shapes with convert --add instead")
    source.check(bundle)


def _running(ranks: int | None) -> int:
    """Return the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return ranks if ranks is not None else int(os.environ.get("WORLD_SIZE", "1"))
