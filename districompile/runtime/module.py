"""A bundle as a ``torch.nn.Module`` that is called like the one it was made from."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from districompile.backends.base import Backend, Engine, get_backend, runs_native_code
from districompile.bundle import Bundle
from districompile.errors import BundleError, InputError, LaunchError
from districompile.ir.plan import PHASES, Phase, Plan
from districompile.ir.validate import value_specs
from districompile.runtime.agreement import Proposal, kinds_of
from districompile.runtime.choose import check_transport
from districompile.runtime.conditioning import Conditioning
from districompile.runtime.drift import DriftMonitor
from districompile.runtime.face import ModuleFace
from districompile.runtime.gloo import start_gloo
from districompile.runtime.guard import CallGuard, guarded
from districompile.runtime.images import ImageTracker
from districompile.runtime.inputs import Call, InputChecker
from districompile.runtime.interface import check_content, check_engine, check_weights
from districompile.runtime.liveness import TIMEOUT, Liveness, check_timeout
from districompile.runtime.placeholders import Config as Config
from districompile.runtime.runner import LockstepRunner, ProcessRunner, Runner, world_size
from districompile.runtime.same_bundle import compare
from districompile.runtime.streams import Decision
from districompile.runtime.trace import Trace
from districompile.structure import check_classes, rebuild_output
from districompile.weights import WeightFile

_MOST_DRIFT = 1e6  # a sample that stays or jumps; JSON knows no infinity


class DistributedModule(ModuleFace):
    """One rank's part of a converted module (or all ranks, in lockstep): called like the original, by all ranks alike.

    Rank 0's inputs, and its decision which phase a call belongs to, hold for all (:mod:`~.agreement`). Which image a
    call belongs to is told from its inputs (:mod:`districompile.runtime.images`), or stated by :meth:`image`; ``phase``
    overrides the choice of the phase where it is set.
    """

    def __init__(
        self, plan: Plan, runner: Runner, device: torch.device, config: Mapping[str, Any] | None = None,
        trusted_packages: Collection[str] = (),
    ) -> None:  # fmt: skip
        super().__init__(plan, device, config or {})
        self._trusted = tuple(trusted_packages)
        self._runner = runner
        self._inputs = InputChecker(plan, device)
        small = [i.path for i in kinds_of(plan.inputs, self._inputs.timestep_path)[1]]
        self._images = ImageTracker(int(plan.options.get("warmup_steps", 4)), small)
        # Without a timestep every call is exact
        limit = 0.0 if self._inputs.timestep_path is None else float(plan.options.get("drift_limit", 0.0))
        self._drift = DriftMonitor(limit)
        self._image = next(i.path for i in plan.inputs if i.rows is not None)
        self._conditioning = Conditioning(plan.options.get("conditioning", ()))
        self._calls_guard = CallGuard()
        self._chosen_phase: Phase | None = None
        self._calls = {"exact": 0, "displaced": 0}
        self._phases: list[Phase] = []  # of the first stream of calls of an image

    @guarded
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original module's output for the original module's arguments; the same on every rank.

        Raises :class:`InputError` for a call that does not fit what was converted, :class:`LaunchError` where another
        rank is gone.
        """
        # What is kept between calls must not depend on the mode of one of them.
        with torch.inference_mode(False), torch.no_grad():
            try:
                call = self._inputs(args, kwargs)
            except InputError:
                self._runner.refuse()
                raise
            try:
                decision, leaves = self._runner.call(self._propose(call))
                if self._runner.leads and self._inputs.timestep_path is not None:
                    sample, output = call.tensors[self._image].clone(), leaves[0].clone()  # callers may write to theirs
                    self._images.observe(sample, output)
                    self._drift.observe(decision.stream, sample, output)
                self._count(decision)
            except BaseException:
                self._drift.reset()
                self._images.reset()  # what a failed call left is not to be built on
                self._conditioning.reset()
                raise
        return_dict = call.return_dict
        named = return_dict if isinstance(return_dict, bool) else None
        return rebuild_output(self.plan.output, leaves, named, self._trusted)

    def _propose(self, call: Call) -> Proposal:
        """The call as this rank sees it. On rank 0 with what its inputs show of the image."""
        if not self._runner.leads:
            return Proposal(Decision("warmup", 0, False), call.tensors, call.timestep)
        decision, fresh = self._images.next(
            call.timestep, call.given_timestep, call.given, call.tensors[self._image], self._phase is not None
        )
        if self._phase is None:
            decision = self._drift.check(decision)
        else:
            decision = Decision(self._phase, decision.stream, decision.reset)
            if decision.reset:
                self._drift.reset()
        return Proposal(self._conditioning.check(decision, call.given), call.tensors, call.timestep, fresh)

    def _count(self, decision: Decision) -> None:
        if decision.reset:
            self._calls, self._phases = {"exact": 0, "displaced": 0}, []
        if decision.stream == 0:
            self._phases.append(decision.phase)
        self._calls["exact" if decision.phase == "warmup" else "displaced"] += 1

    @property
    def leads(self) -> bool:
        """Whether this process's inputs and decisions hold for all ranks: rank 0, or all ranks in this process."""
        return self._runner.leads

    @property
    def image_calls(self) -> dict[str, int]:
        """How many calls of the image at hand were ``"exact"`` and ``"displaced"``, as rank 0 decided (on the other
        ranks: as they would have)."""
        return dict(self._calls)

    @property
    def drift_rates(self) -> list[float]:
        """How fast each call of the image at hand still changed it (:mod:`districompile.runtime.drift`).

        From its second call on, for the first stream of calls; on rank 0. Waits for the device."""
        return list(self._drift.rates(0))

    @property
    def image_drift(self) -> float | None:
        """The largest of :attr:`drift_rates` of the displaced calls of the image at hand, but for the last two: what a
        last step changes, no other builds on. None where there are none, or no limit."""
        rates = self.drift_rates
        pairs = list(zip(self._phases[1:], rates, strict=False)) if rates else []
        found = [rate for phase, rate in pairs[:-2] if phase == "steady"]
        return min(max(found), _MOST_DRIFT) if found else None

    @property
    def phase(self) -> Phase | None:
        """The phase that all calls run in; None (the default) follows the timesteps. Set it on all ranks."""
        return self._chosen_phase

    @phase.setter
    def phase(self, phase: Phase | None) -> None:
        if phase is not None and phase not in PHASES:
            raise InputError(f"there is no phase {phase!r}: use one of {', '.join(map(repr, PHASES))}, or None")
        self._chosen_phase = phase

    @property
    def _phase(self) -> Phase | None:
        """The phase of this thread's calls, where it does not follow the timesteps."""
        return "warmup" if self._calls_guard.exact else self._chosen_phase

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """Calls of this thread inside compute what one device computes: ``with unet.exact(): ...``."""
        earlier, self._calls_guard.exact = self._calls_guard.exact, True
        try:
            yield
        finally:
            self._calls_guard.exact = earlier

    @property
    def transport(self) -> str:
        """What moves bytes between the ranks: "peer", "nccl", "gloo", or "lockstep"."""
        return str(getattr(self._runner, "transport", "lockstep"))

    @property
    def peak_bytes(self) -> int:
        """Most memory that this process had on its GPU so far, CUDA's own not counted; 0 on the CPU. What other ranks
        write into directly is memory that PyTorch's own statistics do not see."""
        if self._device.type != "cuda":
            return 0
        return int(torch.cuda.max_memory_allocated(self._device)) + int(getattr(self._runner, "symmetric_bytes", 0))

    @contextlib.contextmanager
    def trace(self) -> Iterator[Trace]:
        """Record what this rank's calls inside spend their time on: ``with unet.trace() as trace: ...``, on all ranks
        alike. Raises :class:`InputError` in lockstep."""
        if not isinstance(self._runner, ProcessRunner):
            raise InputError("ranks in lockstep take turns: there is nothing to trace; start one process a rank")
        with self._runner.executor.trace() as trace:
            yield trace

    @contextlib.contextmanager
    def transfers_free(self) -> Iterator[None]:
        """Calls inside exchange nothing: their numbers are meaningless, their time is a bound on what hiding transfers
        can gain. On all ranks alike. Raises :class:`InputError` in lockstep."""
        if not isinstance(self._runner, ProcessRunner):
            raise InputError("ranks in lockstep exchange nothing between GPUs: start one process a rank")
        self._images.reset()
        try:
            with self._runner.transfers_free():
                yield
        finally:
            self._images.reset()

    def reset(self) -> None:
        """Start a new image with the next call, whatever its timestep (rank 0's word counts)."""
        self._images.reset()

    @contextlib.contextmanager
    def image(self) -> Iterator[None]:
        """Calls inside are steps of one image (rank 0's word counts): ``with unet.image(): ...``.

        For callers whose calls do not show it: a stochastic sampler with timesteps of its own, or a conditioning that
        changes from step to step. Nothing is measured then.
        """
        with self._images.stated():
            yield

    def close(self) -> None:
        """Leave together with the other ranks; calls after it are refused."""
        with self._calls_guard.closing():
            self._runner.close()

    def extra_repr(self) -> str:
        return f"ranks={world_size(self.plan)}, device={self._device}"


@contextlib.contextmanager
def image(module: torch.nn.Module) -> Iterator[None]:
    """Take the calls of ``module`` inside for steps of one image: :meth:`DistributedModule.image`.

    Does nothing for any other module, so that a script runs on the original as well.
    """
    with module.image() if isinstance(module, DistributedModule) else contextlib.nullcontext():
        yield


@torch.inference_mode(False)
def load(
    bundle: str | os.PathLike[str],
    *,
    rank: int | None = None,
    ranks: int | None = None,
    lockstep: bool = False,
    device: str | torch.device | None = None,
    verify: bool | Literal["quick"] = True,
    backend: Backend | None = None,
    start_timeout: float = 60.0,
    timeout: float = TIMEOUT,
    transport: str = "auto",
    cuda_graph: bool = True,
    trusted_packages: Collection[str] = (),
    native_code: bool = True,
) -> DistributedModule:
    """Load a bundle in each rank's process, and call it like the module it was made from.

    Rank and number of processes are torch.distributed's where that is initialised (over whichever backend), else
    ``rank`` and ``ranks``, else those of the launcher (RANK, WORLD_SIZE). ``lockstep`` loads all ranks into this
    process instead. ``device`` is by default the bundle's kind of device, number LOCAL_RANK. Hashes are checked by one
    process of a machine (``verify="quick"``: sizes alone), and the ranks compare what they have loaded.
    ``start_timeout`` bounds the meeting of the ranks, in seconds. ``timeout`` bounds, in seconds, how long a rank is
    waited for that gives no sign of life, and each transfer within a call; ten times that in the first calls, and for a
    rank to come to a call. Rank 0 may take any time between two calls. ``transport``: "peer" (copy engines between GPUs
    that reach each other's memory), "nccl" (one GPU a rank), "gloo" (anything, through host memory), or "auto", the
    first of these that works here. ``cuda_graph``: on a GPU, replay each call as one CUDA graph.

    A bundle is data, but for engines that are machine code (``inductor``, ``tensorrt``): ``native_code=False`` refuses
    those. The class of an output is imported only where it is one of
    :data:`~districompile.structure.OUTPUT_CLASSES`, or of one of the ``trusted_packages``; another output has the same
    fields, and the class :class:`~districompile.structure.OutputNamespace`.

    Raises :class:`BundleError`, :class:`LaunchError` for another number of processes than the bundle was made for, and
    :class:`BackendError` where the backend is not installed.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    opened = Bundle.open(Path(bundle), verify="quick" if verify is True and local_rank else verify)
    plan = opened.plan
    check_transport(transport)
    check_timeout(timeout)
    where = _device(opened, device, local_rank)
    chosen = backend or get_backend(str(opened.manifest["backend"]))
    check_native_code(opened, native_code, chosen)
    check_classes(plan.output, trusted_packages)
    loader = _Loader(opened, chosen, where)
    config = opened.manifest.get("config")
    needed = world_size(plan)
    if lockstep and plan.options.get("collectives") == "inside":
        raise LaunchError(
            f"{bundle} has the collectives of its exact phase inside of engines: they need one process for each GPU"
        )
    if lockstep or (needed == 1 and _running(ranks) == 1):
        runner: Runner = LockstepRunner(plan, [loader.engines(r) for r in range(plan.ranks)], where, static=True)
        return DistributedModule(plan, runner, where, config, trusted_packages)
    if _running(ranks) != needed:
        raise LaunchError(
            f"{bundle} was converted for {needed} processes, but this is one of {_running(ranks)}: start it with "
            f"`torchrun --nproc-per-node {needed} SCRIPT`, draw with `districompile run {bundle}`, "
            "or load it with lockstep=True"
        )
    if where.type == "cuda":
        torch.cuda.set_device(where)
    start_gloo(rank, ranks, start_timeout)
    liveness = Liveness.of_default_group(timeout, start_timeout)
    try:
        hashed = None if verify is not True else not local_rank
        compare(liveness, opened, loader.backend.name, transport, hashed)
        engines = loader.engines(dist.get_rank() % plan.ranks)
        liveness.exchange("loaded", {})  # some take longer than others; from here on ranks wait for each other
        runner = ProcessRunner(plan, engines, where, timeout, transport, cuda_graph, liveness)
    except BaseException as e:
        liveness.fail(e)
        liveness.close()
        raise
    return DistributedModule(plan, runner, where, config, trusted_packages)


def check_native_code(bundle: Bundle, allowed: bool, backend: Backend | None = None) -> None:
    """Raise :class:`BundleError` where native code is not ``allowed``, and the bundle's engines, or those that
    ``backend`` would load of it, are native code."""
    chosen = backend or get_backend(str(bundle.manifest["backend"]))
    if not allowed and runs_native_code(chosen):
        raise BundleError(
            f"{bundle.path} holds machine code, made by the {chosen.name} backend, and native code is not allowed: "
            "allow it if you trust whoever made the bundle, or convert with --backend onnxruntime or eager"
        )


class _Loader:
    """Loads the engines of a bundle over one mapping of its weights."""

    def __init__(self, bundle: Bundle, backend: Backend, device: torch.device) -> None:
        self._bundle, self.backend, self._device = bundle, backend, device
        self._weights: WeightFile = WeightFile.open(bundle.weights_path)
        check_weights(bundle.plan, self._weights)
        self._specs = {phase: value_specs(bundle.plan, phase) for phase in bundle.plan.phases}

    def engines(self, rank: int) -> dict[str, dict[str, Engine]]:
        """Engines of one rank by phase and segment; equal ones are loaded once, as segments of a rank run in turn."""
        loaded: dict[tuple[str, tuple[str, ...]], Engine] = {}
        engines: dict[str, dict[str, Engine]] = {}
        checked: set[Path] = set()
        for phase, plan in self._bundle.plan.phases.items():
            engines[phase] = {}
            specs = {v: by_rank[rank] for v, by_rank in self._specs[phase].items()}
            for name, segment in plan.segments.items():
                key = (segment.engines[rank], segment.outputs)
                path = self._bundle.engine_path(key[0], self.backend.suffix)
                if key not in loaded:
                    if path not in checked:
                        check_content(path, self.backend)
                    checked.add(path)
                    loaded[key] = self.backend.load(path, segment.outputs, self._weights, self._device)
                check_engine(path, segment, specs, loaded[key])
                engines[phase][name] = loaded[key]
        return engines


def _running(ranks: int | None) -> int:
    """How many processes there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return ranks if ranks is not None else int(os.environ.get("WORLD_SIZE", "1"))


def check_device(bundle: Bundle, device: str | None = None) -> str:
    """The kind of device that ``bundle`` runs on ("cuda", "cpu"): ``device`` if that is given and its engines can.

    Raises :class:`BundleError` where they cannot, or there is no such device here."""
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
