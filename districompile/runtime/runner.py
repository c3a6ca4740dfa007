"""Runs calls on all ranks: in this process (lockstep), or as one of many processes. Holds the state of the streams."""

from __future__ import annotations

import atexit
import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist

from districompile.errors import InputError, LaunchError
from districompile.ir.plan import InputSpec, Plan, TensorSpec, names_timestep
from districompile.runtime.agreement import Agreement, Proposal, kinds_of, message_of
from districompile.runtime.choose import choose_transport, make_link
from districompile.runtime.executor import Engines, Executor
from districompile.runtime.gloo import GlooTransport, new_group
from districompile.runtime.liveness import FOREVER, Liveness
from districompile.runtime.lockstep import LockstepGroup, LockstepLinks
from districompile.runtime.nccl import NcclCollectives
from districompile.runtime.peer import PeerLink, PeerShares
from districompile.runtime.state import StaticState
from districompile.runtime.static import StaticExecutor
from districompile.runtime.streams import Decision

Tensors = Mapping[str, torch.Tensor]


class Runner(Protocol):
    """Runs one call. Inputs are by path, as the module is called: with ``cfg`` split, both halves of the batch.
    ``leads``: whether the decisions of this process hold for all ranks."""

    leads: bool

    def call(self, proposal: Proposal) -> tuple[Decision, list[torch.Tensor]]:
        """What was decided for all ranks, and the output leaves of the whole image, in order."""

    def refuse(self) -> None:
        """This rank's caller gave inputs that it cannot take: the other ranks learn of it instead of waiting."""

    def close(self) -> None:
        """Release what the runner holds; it is not called again."""


def halves(plan: Plan) -> int:
    """Into how many parts guidance cuts the batch: 2 where the mesh has a ``cfg`` axis, else 1."""
    return 2 if plan.options.get("cfg") == "split" else 1


def world_size(plan: Plan) -> int:
    """How many processes share one image."""
    return plan.ranks * halves(plan)


def is_halved(plan: Plan, spec: InputSpec) -> bool:
    """Whether the input is passed with both guidance halves on dim 0, of which the plan sees one.

    ``plan.options["cfg_inputs"]`` lists their paths; without it they are the inputs with the batch of the cut input.
    """
    if halves(plan) == 1:
        return False
    listed = plan.options.get("cfg_inputs")
    if listed is not None:
        return spec.path in listed
    batches = {i.spec.shape[0] for i in plan.inputs if i.rows is not None}
    return len(spec.spec.shape) > 0 and spec.spec.shape[0] in batches


def called_spec(plan: Plan, spec: InputSpec) -> TensorSpec:
    """The tensor a caller passes for an input of the plan: both halves where it is halved."""
    if not is_halved(plan, spec):
        return spec.spec
    return TensorSpec((2 * spec.spec.shape[0], *spec.spec.shape[1:]), spec.spec.dtype)


def timestep_path(plan: Plan) -> str | None:
    """Which input tells the steps of a sampler apart: ``plan.options["timestep"]``, or one with a usual name."""
    paths = [i.path for i in plan.inputs if i.rows is None]
    named = plan.options.get("timestep")
    return named if named in paths else next(filter(names_timestep, paths), None)


def _half(plan: Plan, inputs: Tensors, half: int) -> dict[str, torch.Tensor]:
    """The plan's inputs by value name, for one guidance half."""
    values = {}
    for spec in plan.inputs:
        tensor = inputs[spec.path]
        if is_halved(plan, spec):
            tensor = tensor.chunk(2)[half]
        values[spec.value] = tensor
    return values


class LockstepRunner:
    """All ranks, and both guidance halves, in this process, on one device. ``engines`` holds those of each rank of the
    patch axis. ``static``: in fixed memory, as processes run; else in whatever memory is free, which is the yardstick.
    """

    leads = True

    def __init__(self, plan: Plan, engines: Sequence[Engines], device: torch.device, static: bool = False) -> None:
        self.plan, self._engines, self._device = plan, engines, device
        self._groups: list[LockstepGroup | LockstepLinks] = []
        self._executors: list[list[Any]] = []
        for _ in range(halves(plan)):
            if static:
                links = LockstepLinks(plan.ranks, device)
                self._groups.append(links)
                self._executors.append(
                    [StaticExecutor(plan, r, engines[r], link, device) for r, link in enumerate(links.links)]
                )
            else:
                group = LockstepGroup(plan.ranks)
                self._groups.append(group)
                self._executors.append(
                    [Executor(plan, r, engines[r], t, device) for r, t in enumerate(group.transports)]
                )
        self._states: dict[tuple[int, int], list[Any]] = {}  # (stream, half) -> by rank

    def call(self, proposal: Proposal) -> tuple[Decision, list[torch.Tensor]]:
        decision, inputs = proposal.decision, proposal.inputs
        if decision.reset:
            self._each(lambda executor, state: executor.reset(state))
        try:
            outputs = [self._run(decision, h, _half(self.plan, inputs, h)) for h in range(len(self._groups))]
        except BaseException:
            self._each(lambda executor, state: executor.drop(state))
            for group in self._groups:
                group.clear()
            raise
        if len(outputs) == 1:
            return decision, outputs[0]
        return decision, [torch.cat(leaves) for leaves in zip(*outputs, strict=True)]

    def refuse(self) -> None:
        """There is no other process."""

    def _each(self, action: Callable[[Any, Any], None]) -> None:
        for (_, half), states in self._states.items():
            for executor, state in zip(self._executors[half], states, strict=True):
                action(executor, state)

    def _run(self, decision: Decision, half: int, values: Tensors) -> list[torch.Tensor]:
        executors, key = self._executors[half], (decision.stream, half)
        if key not in self._states:
            self._states[key] = [e.new_state() for e in executors]
        runs = [e.iterate(decision.phase, values, s) for e, s in zip(executors, self._states[key], strict=True)]
        outputs: dict[int, list[torch.Tensor]] = {}
        while len(outputs) < len(runs):
            for rank, run in enumerate(runs):
                try:
                    next(run)
                except StopIteration as end:
                    outputs.setdefault(rank, end.value)
        return outputs[0]

    def close(self) -> None:
        self._states.clear()


class ProcessRunner:
    """This process as one of ``world_size(plan)`` under torch.distributed: rank ``g * plan.ranks + r`` is rank r of
    guidance half g. All processes must construct it, and call it, alike; rank 0's inputs and decisions are taken.

    ``transport`` is one of :data:`~districompile.runtime.choose.TRANSPORTS`, the same on all ranks; ``self.transport``
    says what "auto" became. ``liveness`` watches over the others; without it one with ``timeout`` is made."""

    def __init__(
        self, plan: Plan, engines: Engines, device: torch.device, timeout: float, transport: str = "auto",
        cuda_graph: bool = True, liveness: Liveness | None = None,
    ) -> None:  # fmt: skip
        self._liveness = liveness or Liveness.of_default_group(timeout)
        with self._liveness.waiting():
            self._connect(plan, engines, device, transport, cuda_graph)

    def _connect(
        self, plan: Plan, engines: Engines, device: torch.device, transport: str, cuda_graph: bool
    ) -> None:  # fmt: skip
        self.plan, self._device = plan, device
        rank, parts = dist.get_rank(), halves(plan)
        self.leads = rank == 0
        self._half, patch_rank = divmod(rank, plan.ranks)
        # Groups of our own, so that nothing here can be mixed up with the user's transfers.
        self._world = GlooTransport(new_group(range(plan.ranks * parts), FOREVER), liveness=self._liveness)
        patch = [new_group(range(g * plan.ranks, (g + 1) * plan.ranks), FOREVER) for g in range(parts)]
        self.transport = choose_transport(transport, device, plan.ranks, self._world)
        self._link = make_link(self.transport, patch[self._half], self._half, parts, device, self._liveness)
        # What concerns the whole call goes from device to device where ranks have GPUs of their own
        shares: PeerShares | NcclCollectives | None = None
        self._across: GlooTransport | NcclCollectives | None = None
        direct = self.transport != "gloo" and dist.is_nccl_available()
        backend = "nccl" if direct else "gloo"
        samples, conditioning = (
            {i.path: called_spec(plan, i) for i in listed} for listed in kinds_of(plan.inputs, timestep_path(plan))
        )
        if self.transport == "peer" and parts == 1:
            shares = PeerShares(cast(PeerLink, self._link), message_of(samples).nbytes)
        elif direct:
            shares = NcclCollectives(new_group(range(plan.ranks * parts), FOREVER, backend), device)
        if parts > 1:
            pairs = [new_group(range(r, plan.ranks * parts, plan.ranks), FOREVER, backend) for r in range(plan.ranks)]
            mine = pairs[patch_rank]
            self._across = NcclCollectives(mine, device) if direct else GlooTransport(mine, liveness=self._liveness)
        if plan.options.get("collectives") == "inside":
            self._join(engines, patch[self._half], device)
        self.executor = StaticExecutor(plan, patch_rank, engines, self._link, device, cuda_graph)
        self._states: dict[int, StaticState] = {}
        self._failure: BaseException | None = None
        self._agreement = Agreement(self._world, device, samples, conditioning, shares)
        self._closed = False
        atexit.register(_close_at_exit, weakref.ref(self))

    def call(self, proposal: Proposal) -> tuple[Decision, list[torch.Tensor]]:
        if self._failure is not None:
            raise LaunchError(f"an earlier call failed ({self._failure}): start the processes again")
        try:
            self._liveness.enter(self.leads and not proposal.decision.reset)
            agreed, inputs = self._agreement.settle(proposal)
            self._liveness.of_kind((agreed.phase, agreed.stream))
            return agreed, self._call(agreed, inputs)
        except InputError:
            raise  # the same on all ranks, which are still in step
        except BaseException as e:
            self._failure = e
            self._liveness.fail(e)
            raise
        finally:
            self._liveness.leave()

    def refuse(self) -> None:
        if self._failure is not None:
            return
        self._liveness.enter()
        try:
            self._agreement.refuse()
        except LaunchError as e:  # this rank has an error of its own to raise
            self._failure = e
        finally:
            self._liveness.leave()

    @property
    def symmetric_bytes(self) -> int:
        """Device memory of this rank outside of PyTorch's allocator."""
        return self._link.symmetric_bytes

    @contextlib.contextmanager
    def transfers_free(self) -> Iterator[None]:
        """As :meth:`StaticExecutor.transfers_free`, for all streams."""
        with self.executor.transfers_free(self._states.values()):
            yield

    def _join(self, engines: Engines, group: dist.ProcessGroup, device: torch.device) -> None:
        """Give the engines of the exact phase a communicator of the ranks that share the image."""
        from districompile.runtime.communicator import Communicator

        if self.transport not in ("peer", "nccl"):
            raise LaunchError(
                "this bundle's exact phase has its collectives inside of engines, which takes one NVIDIA GPU for each "
                "process: convert with --collectives between"
            )
        self._communicator = Communicator(GlooTransport(group, liveness=self._liveness), device)
        for engine in engines["warmup"].values():
            engine.use_communicator(self._communicator.pointer)

    def _call(self, decision: Decision, inputs: Tensors) -> list[torch.Tensor]:
        if decision.reset:
            for state in self._states.values():
                self.executor.reset(state)
        if decision.stream not in self._states:
            self._states[decision.stream] = self.executor.new_state()
        values = _half(self.plan, inputs, self._half)
        leaves = self.executor.run(decision.phase, values, self._states[decision.stream])
        if self._across is None:
            return leaves
        gathered = [torch.cat(self._across.all_gather(leaf)) for leaf in leaves]
        if isinstance(self._across, NcclCollectives):
            self._liveness.watch(torch.cuda.current_stream(self._device).record_event())
        return gathered

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._failure is None:
                self._link.close()
                self._world.close()
            self._liveness.close()


def _close_at_exit(runner: weakref.ref[ProcessRunner]) -> None:
    """Leave together with the other ranks, unless this one is failing: then they must learn of it at once."""
    found = runner()
    failing = getattr(sys, "last_type", None) is not None
    if found is not None and not failing and dist.is_initialized():
        with contextlib.suppress(Exception):
            found.close()
