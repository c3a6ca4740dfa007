# SPDX-License-Identifier: Apache-2.0
"""Run calls on all ranks: in turn in this process, or as one of many processes."""

from __future__ import annotations

import atexit
import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from districompile.errors import InputError, LaunchError
from districompile.ir.spec import TensorSpec
from districompile.plan.plan import ExecutionPlan
from districompile.runtime.calls.agreement import Agreement, Proposal, kinds_of, message_of
from districompile.runtime.calls.call_tracker import Decision
from districompile.runtime.executor.engines import Engines, aliased_values, scratch_bytes
from districompile.runtime.executor.memory import plan_memory
from districompile.runtime.executor.planned import PlannedExecutor
from districompile.runtime.executor.state import ExecutorState
from districompile.runtime.executor.workspace import Workspace
from districompile.runtime.experimental.communicator import Communicator
from districompile.runtime.processes.liveness import FOREVER, Liveness
from districompile.runtime.transports.gloo import GlooGroup, new_group
from districompile.runtime.transports.kinds import Gather, Setup, TransportKind
from districompile.runtime.transports.select import choose_transport
from districompile.runtime.transports.simulated import SimulatedChannels

Tensors = Mapping[str, torch.Tensor]


class Runner(Protocol):
    """Run calls of a module.

    Inputs are by path, as in the module's call: with ``cfg`` split, they hold both halves of the batch. ``leads`` is
    whether the decisions of this process hold for all ranks.
    """

    leads: bool

    def call(self, proposal: Proposal) -> tuple[Decision, list[torch.Tensor]]:
        """Run one call. Return the decision for all ranks, and the output leaves of the whole image, in order."""

    def refuse(self) -> None:
        """Report to the other ranks that this one has invalid inputs, so that they do not wait for it."""

    def unknown(self, key: int) -> contextlib.AbstractContextManager[None]:
        """Agree that this call has a shape that is to be added, known by ``key``, which is below 0. It is added inside.

        Raises :class:`RanksDifferError`, on all ranks, for a rank that makes another call.
        """

    def add(self, plan: ExecutionPlan, engines: Any) -> None:
        """Add a shape with its engines: those of this rank, or of each rank in this process."""

    def close(self) -> None:
        """Release the runner's resources. The runner is not called again."""


def _half(plan: ExecutionPlan, inputs: Tensors, guidance_index: int) -> dict[str, torch.Tensor]:
    """Return the plan's inputs by value name, for one guidance half."""
    values = {}
    for spec in plan.inputs:
        tensor = inputs[spec.path]
        if plan.is_halved(spec):
            tensor = tensor.chunk(2)[guidance_index]
        values[spec.value] = tensor
    return values


def _called(plan: ExecutionPlan) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Return the inputs that change with every call, and those that stay the same, as callers pass them."""
    samples, conditioning = kinds_of(plan.inputs, plan.timestep_path)
    return {i.path: plan.called_spec(i) for i in samples}, {i.path: plan.called_spec(i) for i in conditioning}


class SimulatedRunner:
    """Run all ranks, and both guidance halves, in turn, in this process and on one device.

    ``engines`` are by rank of the patch axis. Both halves share them. ``more`` are the plans of further shapes, with
    their engines. All shapes use the same memory in turn. ``cuda_graph``: where a half has one rank, which takes no
    turns, capture calls on a GPU.
    """

    leads = True

    def __init__(
        self, plan: ExecutionPlan, engines: Sequence[Engines], device: torch.device,
        more: Sequence[tuple[ExecutionPlan, Sequence[Engines]]] = (), cuda_graph: bool = False,
    ) -> None:  # fmt: skip
        self.plan, self._device, self._cuda_graph = plan, device, cuda_graph
        self._groups = [SimulatedChannels(plan.ranks, device) for _ in range(plan.guidance_halves)]
        self._workspaces = [[Workspace(channel, device) for channel in group.channels] for group in self._groups]
        self._plans: list[ExecutionPlan] = []
        self._executors: list[list[list[PlannedExecutor]]] = []  # by shape, guidance half and rank
        # By shape, stream and guidance half, of each rank
        self._states: dict[tuple[int, int, int], list[ExecutorState]] = {}
        shapes = [(plan, engines), *more]
        for other, by_rank in shapes if more else ():
            for r in range(plan.ranks):
                memory = plan_memory(other, r, aliased_values(other, by_rank[r]))
                for workspaces in self._workspaces:
                    workspaces[r].expect(memory, scratch_bytes(by_rank[r]))
        for other, by_rank in shapes:
            self.add(other, by_rank)

    def add(self, plan: ExecutionPlan, engines: Sequence[Engines]) -> None:
        """Add a shape, whose number in proposals is that of shapes so far."""
        self._plans.append(plan)
        self._executors.append(
            [
                [
                    PlannedExecutor(plan, r, engines[r], channel, self._device, self._cuda_graph, spaces[r])
                    for r, channel in enumerate(group.channels)
                ]
                for group, spaces in zip(self._groups, self._workspaces, strict=True)
            ]
        )

    def call(self, proposal: Proposal) -> tuple[Decision, list[torch.Tensor]]:
        decision, inputs, shape = proposal.decision, proposal.inputs, proposal.shape
        if decision.reset:
            self._each(lambda executor, state: executor.reset(state))
        for half, executors in enumerate(self._executors[shape]):
            for rank, executor in enumerate(executors):
                mine = [s[rank] for (n, _, h), s in self._states.items() if (n, h) == (shape, half)]
                executor.claim(mine)
        try:
            halves = range(len(self._groups))
            outputs = [self._run(decision, shape, h, _half(self._plans[shape], inputs, h)) for h in halves]
        except BaseException:
            self._each(lambda executor, state: executor.drop(state))
            for group in self._groups:
                group.clear()
            raise
        if len(outputs) == 1:
            return decision, outputs[0]
        return decision, [torch.cat(leaves) for leaves in zip(*outputs, strict=True)]

    def unknown(self, key: int) -> contextlib.AbstractContextManager[None]:
        """Do nothing: there is no other process."""
        return contextlib.nullcontext()

    def refuse(self) -> None:
        """Do nothing: there is no other process."""

    def _each(self, action: Callable[[PlannedExecutor, ExecutorState], None]) -> None:
        for (shape, _, guidance_index), states in self._states.items():
            for executor, state in zip(self._executors[shape][guidance_index], states, strict=True):
                action(executor, state)

    def _run(self, decision: Decision, shape: int, guidance_index: int, values: Tensors) -> list[torch.Tensor]:
        executors, key = self._executors[shape][guidance_index], (shape, decision.stream, guidance_index)
        if key not in self._states:
            self._states[key] = [e.new_state() for e in executors]
        if len(executors) == 1:
            return executors[0].run(decision.phase, values, self._states[key][0])
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
    """Run this process as one of ``plan.world_size`` under torch.distributed.

    Rank ``g * plan.ranks + r`` is rank r of guidance half g. All processes construct and call it alike. Rank 0's inputs
    and decisions hold for all.

    ``more`` are the plans of further shapes, with their engines. All shapes use the same memory in turn.

    ``transport`` is a name of :mod:`~districompile.runtime.transports.registry` or an object, the same on all ranks.
    ``self.transport`` is the name of the one in use. ``liveness`` watches the other ranks; the default is a new one
    with ``timeout``.
    """

    def __init__(
        self, plan: ExecutionPlan, engines: Engines, device: torch.device, timeout: float,
        transport: str | TransportKind = "auto",
        cuda_graph: bool = True, liveness: Liveness | None = None,
        more: Sequence[tuple[ExecutionPlan, Engines]] = (),
    ) -> None:  # fmt: skip
        self._liveness = liveness or Liveness.of_default_group(timeout)
        with self._liveness.waiting():
            self._connect([(plan, engines), *more], device, transport, cuda_graph)

    def _connect(
        self, shapes: Sequence[tuple[ExecutionPlan, Engines]], device: torch.device, transport: str | TransportKind,
        cuda_graph: bool,
    ) -> None:  # fmt: skip
        plan, _ = shapes[0]
        self.plan, self._device, self._cuda_graph = plan, device, cuda_graph
        halves = plan.guidance_halves
        # Separate groups, so that these transfers cannot mix with the user's.
        self._world = GlooGroup(new_group(range(plan.world_size), FOREVER), liveness=self._liveness)
        self.leads = self._world.rank == 0
        self._guidance_index, self._patch_rank = divmod(self._world.rank, plan.ranks)
        groups = [new_group(range(g * plan.ranks, (g + 1) * plan.ranks), FOREVER) for g in range(halves)]
        group = groups[self._guidance_index]
        self._kind = choose_transport(transport, device, plan.ranks, self._world)
        self.transport = self._kind.name
        self._setup = Setup(device, plan.ranks, halves, self._world, group, self._liveness)
        self._channel = self._kind.channel(self._setup)
        self._shared_bytes = max(message_of(_called(p)[0]).nbytes for p, _ in shapes)
        self._shares = self._kind.shares(self._setup, self._channel, self._shared_bytes)
        self._gather: Gather | None = self._kind.gather(self._setup) if halves > 1 else None
        if plan.options.collectives == "inside":
            self._use_communicator([e for _, e in shapes], self._kind, group)
        self._workspace = Workspace(self._channel, device)
        self._agreement = Agreement(self._world, device)
        self._executors: list[PlannedExecutor] = []
        self._plans: list[ExecutionPlan] = []
        self._states: list[dict[int, ExecutorState]] = []  # by shape and stream
        self._shape = 0  # of the last call
        self._failure: BaseException | None = None
        self._closed = False
        for other, by_phase in shapes if len(shapes) > 1 else ():
            memory = plan_memory(other, self._patch_rank, aliased_values(other, by_phase))
            self._workspace.expect(memory, scratch_bytes(by_phase))
        for other, by_phase in shapes:
            self.add(other, by_phase)
        atexit.register(_close_at_exit, weakref.ref(self))

    def add(self, plan: ExecutionPlan, engines: Engines) -> None:
        """Add a shape, whose number in proposals is that of shapes so far. All ranks add it together."""
        samples, conditioning = _called(plan)
        if message_of(samples).nbytes > self._shared_bytes:
            self._shared_bytes = message_of(samples).nbytes
            self._shares = self._kind.shares(self._setup, self._channel, self._shared_bytes)
        self._executors.append(
            PlannedExecutor(
                plan, self._patch_rank, engines, self._channel, self._device, self._cuda_graph, self._workspace
            )
        )
        self._plans.append(plan)
        self._states.append({})
        self._agreement.add(samples, conditioning, self._shares)

    @property
    def executor(self) -> PlannedExecutor:
        """The executor of the last call's shape."""
        return self._executors[self._shape]

    def call(self, proposal: Proposal) -> tuple[Decision, list[torch.Tensor]]:
        if self._failure is not None:
            raise LaunchError(f"an earlier call failed ({self._failure}): start the processes again")
        try:
            self._liveness.enter(self.leads and not proposal.decision.reset)
            agreed, inputs = self._agreement.settle(proposal)
            self._liveness.of_kind((proposal.shape, agreed.phase, agreed.stream))
            return agreed, self._call(agreed, proposal.shape, inputs)
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
        except LaunchError as e:  # this rank has its own error to raise
            self._failure = e
        finally:
            self._liveness.leave()

    @contextlib.contextmanager
    def unknown(self, key: int) -> Iterator[None]:
        if self._failure is not None:
            raise LaunchError(f"an earlier call failed ({self._failure}): start the processes again")
        try:
            self._liveness.enter()
            try:
                self._agreement.unknown(key)
            finally:
                self._liveness.leave()
            yield  # not inside of a call, whose time is limited: a conversion takes longer
        except InputError:
            raise  # the same on all ranks, which are still in step
        except BaseException as e:
            self._failure = e
            self._liveness.fail(e)
            raise

    @property
    def symmetric_bytes(self) -> int:
        """Device memory of this rank outside PyTorch's allocator, in bytes."""
        return self._channel.symmetric_bytes

    @contextlib.contextmanager
    def transfers_free(self) -> Iterator[None]:
        """Apply :meth:`PlannedExecutor.transfers_free` to all streams."""
        with self.executor.transfers_free(self._states[self._shape].values()):
            yield

    def _use_communicator(self, shapes: Sequence[Engines], kind: TransportKind, group: dist.ProcessGroup) -> None:
        """Give the engines of the exact phase a communicator of the ranks that share the image."""
        if not kind.own_gpus:
            raise LaunchError(
                "this bundle's exact phase has its collectives inside of engines, which takes one NVIDIA GPU for each "
                "process: convert with --collectives between"
            )
        self._communicator = Communicator(GlooGroup(group, liveness=self._liveness), self._device)
        for engine in {id(e): e for engines in shapes for e in engines["exact"].values()}.values():
            engine.use_communicator(self._communicator.pointer)

    def _call(self, decision: Decision, shape: int, inputs: Tensors) -> list[torch.Tensor]:
        if decision.reset:
            for executor, states in zip(self._executors, self._states, strict=True):
                for state in states.values():
                    executor.reset(state)
        executor, states, self._shape = self._executors[shape], self._states[shape], shape
        executor.claim(states.values())
        if decision.stream not in states:
            states[decision.stream] = executor.new_state()
        values = _half(self._plans[shape], inputs, self._guidance_index)
        leaves = executor.run(decision.phase, values, states[decision.stream])
        if self._gather is None:
            return leaves
        gathered = [torch.cat(self._gather.all_gather(leaf)) for leaf in leaves]
        if not self._gather.waits_on_host:
            self._liveness.watch(torch.cuda.current_stream(self._device).record_event())
        return gathered

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._failure is None:
                self._channel.close()
                self._world.close()
            self._liveness.close()


def _close_at_exit(runner: weakref.ref[ProcessRunner]) -> None:
    """Close the runner together with the other ranks.

    Do nothing if this rank is failing, so that the others detect it at once.
    """
    found = runner()
    failing = getattr(sys, "last_type", None) is not None
    if found is not None and not failing and dist.is_initialized():
        with contextlib.suppress(Exception):
            found.close()
