# SPDX-License-Identifier: Apache-2.0
"""A bundle as a ``torch.nn.Module``, called like the module that it was converted from."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from districompile.bundle.bundle import Bundle
from districompile.bundle.weights import WeightFile
from districompile.errors import InputError
from districompile.frontend.call_tree import rebuild_output
from districompile.ir.spec import BOTH_PHASES, PHASES, InputSpec, Phase
from districompile.plan.plan import ExecutionPlan
from districompile.runtime.calls.agreement import Proposal, kinds_of
from districompile.runtime.calls.call_tracker import Decision
from districompile.runtime.calls.conditioning import Conditioning
from districompile.runtime.calls.drift import DriftMonitor
from districompile.runtime.calls.images import ImageTracker
from districompile.runtime.calls.inputs import Call
from districompile.runtime.calls.reuse import ReuseCounter
from districompile.runtime.calls.shapes import ShapeSelector, key_of
from districompile.runtime.calls.timesteps import steps_left
from districompile.runtime.face.face import ModuleFace
from districompile.runtime.face.guard import CallGuard, guarded
from districompile.runtime.face.placeholders import Config as Config
from districompile.runtime.growth import Growth
from districompile.runtime.runner import ProcessRunner, Runner
from districompile.runtime.trace import Trace

# Calls of a phase until all is there: on a GPU the first runs step by step, and the next are captured, once for each
# state of the double buffers.
_WARM = {"cuda": 4, "cpu": 1}
_MOST_DRIFT = 1e6  # bound for a sample that stays or jumps: JSON has no infinity


class DistributedModule(ModuleFace):
    """One rank's part of a converted module, or all ranks simulated in one process.

    It is called like the original module, by all ranks alike. Rank 0's inputs hold for all ranks, and so does its
    choice of the phase of a call (:mod:`~.agreement`). The image that a call belongs to follows from its inputs
    (:mod:`districompile.runtime.calls.images`), unless :meth:`image` states it. ``phase``, if set, overrides the
    choice.
    """

    def __init__(
        self, plans: Mapping[str, ExecutionPlan], runner: Runner, device: torch.device,
        config: Mapping[str, Any] | None = None, trusted_packages: Collection[str] = (), bundle: str = "BUNDLE",
        growth: tuple[Growth, Callable[[Bundle, ExecutionPlan], Any]] | None = None,
        weight_file: WeightFile | None = None,
    ) -> None:  # fmt: skip
        plan = next(iter(plans.values()))
        super().__init__(plan, device, config or {})
        self._trusted = tuple(trusted_packages)
        self._runner = runner
        self._weight_file = weight_file
        self._shapes = ShapeSelector(plans, device, bundle, growth is not None)
        self._growth = growth
        self._shape = 0  # the number of the last call's shape
        self._inputs = self._shapes.checkers[0]
        small = [i.path for i in kinds_of(plan.inputs, self._inputs.timestep_path)[1]]
        self._images = ImageTracker(plan.options.warmup_steps, small)
        # Without a timestep every call is exact.
        limit = 0.0 if self._inputs.timestep_path is None else plan.options.drift_limit
        self._drift = DriftMonitor(limit)
        self._image = next(i.path for i in plan.inputs if i.rows is not None)
        self._conditioning = Conditioning(plan.options.conditioning)
        self._reuse = ReuseCounter(plan.options.reuse)
        self._calls_guard = CallGuard()
        self._chosen_phase: Phase | None = None
        self._warned = False
        self._calls = self._no_calls()
        self._phases: list[Phase] = []  # of the first stream of calls of an image

    @guarded
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the original module's output for its arguments. It is the same on every rank.

        Raises :class:`InputError` for a call that does not fit the conversion, and :class:`LaunchError` if another rank
        is gone.
        """
        # State that is kept between calls must not depend on the autograd mode of one of them.
        with torch.inference_mode(False), torch.no_grad():
            shape, call = self._bind(args, kwargs)
            try:
                self._switch(shape)
                decision, leaves = self._runner.call(self._propose(call))
                if self._runner.leads and self._inputs.timestep_path is not None:
                    sample, output = call.tensors[self._image].clone(), leaves[0].clone()  # callers may write to theirs
                    self._images.observe(sample, output)
                    self._drift.observe(decision.stream, sample, output)
                self._count(decision)
            except BaseException:
                self._drift.reset()
                self._images.reset()  # no later call may build on the state of a failed one
                self._conditioning.reset()
                self._reuse.reset()
                raise
        return_dict = call.return_dict
        named = return_dict if isinstance(return_dict, bool) else None
        return rebuild_output(self.plan.output, leaves, named, self._trusted)

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, Call]:
        """Return the number of a call's shape, and the call. A shape that is not there is added if that is allowed."""
        while True:
            try:
                found = self._shapes.bind(args, kwargs)
                sizes = self._shapes.wanted(args, kwargs) if found is None else {}
            except InputError:
                self._runner.refuse()
                raise
            if found is not None:
                return found
            assert self._growth is not None
            growth, load = self._growth
            with self._runner.unknown(key_of(sizes)):
                name, plan, engines = growth.add(sizes, args, kwargs, load)
                self._runner.add(plan, engines)
            self._shapes.add(name, plan)

    def _switch(self, shape: int) -> None:
        """Begin a new image where a call has another shape than the last one: no state of that one fits it."""
        if shape != self._shape:
            self._shape = shape
            self._images.reset()
            self._drift.reset()
            plan = list(self._shapes.plans.values())[shape]
            self._conditioning = Conditioning(plan.options.conditioning)

    def _propose(self, call: Call) -> Proposal:
        """Describe the call as this rank sees it; on rank 0, with the evidence of its inputs about the image."""
        if not self._runner.leads:
            return Proposal(Decision("exact", 0, False), call.tensors, call.timestep, shape=self._shape)
        decision, fresh = self._images.next(
            call.timestep, call.given_timestep, call.given, call.tensors[self._image], self._phase is not None
        )
        if decision.reset and self._phase is None:
            self._warn_of_few_steps(call)
        if self._phase is None:
            decision = self._drift.check(decision)
        else:
            decision = Decision(self._phase, decision.stream, decision.reset)
            if decision.reset:
                self._drift.reset()
        decision = self._conditioning.check(decision, call.given)
        if self._phase is None and "reused" in self.plan.phases:
            decision = self._reuse.check(decision, self._drift.must_be_full)
        if decision.phase not in self.plan.phases:
            decision = dataclasses.replace(decision, phase="exact")
        return Proposal(decision, call.tensors, call.timestep, fresh, self._shape)

    def _warn_of_few_steps(self, call: Call) -> None:
        """Warn once that an image has no more steps than those that are exact in any case."""
        steps, exact = steps_left(call.given_timestep), self.plan.options.warmup_steps
        if self._warned or call.timestep is None or steps is None or not 1 < steps <= exact:
            return
        self._warned = True
        warnings.warn(
            f"all {steps} steps of this image are exact, because the first {exact} steps of each image are: convert "
            "with fewer warmup_steps (--warmup-steps 1) for displaced ones, which change the image a little",
            stacklevel=2,
        )

    def _count(self, decision: Decision) -> None:
        if decision.reset:
            self._calls, self._phases = self._no_calls(), []
        if decision.stream == 0:
            self._phases.append(decision.phase)
        self._calls[decision.phase] += 1
        self._reuse.count(decision)

    def _no_calls(self) -> dict[str, int]:
        """Return the counts of an image without calls, by phase."""
        return {p: 0 for p in PHASES if p != "reused" or p in self.plan.phases}

    @property
    def shapes(self) -> tuple[str, ...]:
        """The names of the shapes that calls may have (:mod:`districompile.plan.shapes`)."""
        return tuple(self._shapes.plans)

    @property
    def plans(self) -> dict[str, ExecutionPlan]:
        """The plan of each of :attr:`shapes`. ``plan`` is the first one."""
        return dict(self._shapes.plans)

    @property
    def leads(self) -> bool:
        """Whether this process's inputs and decisions hold for all ranks: rank 0, or all ranks in this process."""
        return self._runner.leads

    @property
    def image_calls(self) -> dict[str, int]:
        """How many calls of the current image were ``"exact"``, ``"displaced"`` and, where compiled, ``"reused"``.

        On rank 0, as it decided. On the other ranks, as they would have decided.
        """
        return dict(self._calls)

    @property
    def drift_rates(self) -> list[float]:
        """How fast each call of the current image still changed it (:mod:`districompile.runtime.calls.drift`).

        Starts at the image's second call, and covers the first stream of calls. On rank 0 only. Waits for the device.
        """
        return list(self._drift.rates(0))

    @property
    def image_drift(self) -> float | None:
        """The largest of :attr:`drift_rates` over the calls of the current image that are not exact.

        None without such calls, or without a limit. The last two are left out, because no later step builds on what the
        last step changes.
        """
        rates = self.drift_rates
        pairs = list(zip(self._phases[1:], rates, strict=False)) if rates else []
        found = [rate for phase, rate in pairs[:-2] if phase != "exact"]
        return min(max(found), _MOST_DRIFT) if found else None

    @property
    def phase(self) -> Phase | None:
        """The phase that all calls run in; None (the default) follows the timesteps. Set it on all ranks."""
        return self._chosen_phase

    @phase.setter
    def phase(self, phase: Phase | None) -> None:
        if phase is not None and phase not in PHASES:
            raise InputError(f"there is no phase {phase!r}: use one of {', '.join(map(repr, PHASES))}, or None")
        if phase is not None and phase not in self.plan.phases:
            compiled = ", ".join(self.plan.phases)
            way = "convert again with --reuse, in Python with reuse=" if phase == "reused" else BOTH_PHASES
            raise InputError(f"the module was converted for the {compiled} phase only: {way}")
        self._chosen_phase = phase

    @property
    def _phase(self) -> Phase | None:
        """The phase of this thread's calls; None if it follows the timesteps."""
        return "exact" if self._calls_guard.exact else self._chosen_phase

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """Make this thread's calls inside compute what one device computes: ``with unet.exact(): ...``."""
        earlier, self._calls_guard.exact = self._calls_guard.exact, True
        try:
            yield
        finally:
            self._calls_guard.exact = earlier

    @property
    def weight_file(self) -> WeightFile | None:
        """The weights that the engines read at each call; None if engines hold weights of their own."""
        return self._weight_file

    @property
    def transport(self) -> str:
        """The transport between the ranks: "peer", "nccl", "gloo", or "lockstep" for simulated ranks."""
        return str(getattr(self._runner, "transport", "lockstep"))

    @property
    def peak_bytes(self) -> int:
        """The peak GPU memory of this process so far, without CUDA's own; 0 on the CPU.

        Includes symmetric memory, which PyTorch's statistics leave out.
        """
        if self._device.type != "cuda":
            return 0
        return int(torch.cuda.max_memory_allocated(self._device)) + int(getattr(self._runner, "symmetric_bytes", 0))

    @contextlib.contextmanager
    def trace(self) -> Iterator[Trace]:
        """Record how this rank's calls inside spend their time: ``with unet.trace() as trace: ...``.

        Use it on all ranks alike. Raises :class:`InputError` for simulated ranks.
        """
        if not isinstance(self._runner, ProcessRunner):
            raise InputError("this process is not one rank, so there is nothing to trace: start one process a rank")
        with self._runner.executor.trace() as trace:
            yield trace

    @contextlib.contextmanager
    def transfers_free(self) -> Iterator[None]:
        """Make the calls inside exchange nothing, to time them as if transfers were free.

        Use it on all ranks alike. Their outputs are meaningless. Their time is a bound on what hiding transfers can
        gain. Raises :class:`InputError` for simulated ranks.
        """
        if not isinstance(self._runner, ProcessRunner):
            raise InputError("this process is not one rank, so no transfers can be left out: start one process a rank")
        self._images.reset()
        try:
            with self._runner.transfers_free():
                yield
        finally:
            self._images.reset()

    def warm_up(self) -> None:
        """Make a few calls of each shape and drop their results, so that the first image takes no longer than others.

        They load kernels and libraries, and capture CUDA graphs. All ranks call it alike, before an image. The next
        call starts a new image.
        """
        with self._calls_guard.call(self.reset), torch.inference_mode(False), torch.no_grad():
            for number, plan in enumerate(self._shapes.plans.values()):
                inputs = {i.path: _zeros(plan, i, self._device) for i in plan.inputs}
                timestep = None if plan.timestep_path is None else float(inputs[plan.timestep_path].reshape(-1)[0])
                for phase in PHASES:
                    for n in range(_WARM[self._device.type] if phase in plan.phases else 0):
                        first = n == 0 and phase == "exact"
                        decision = Decision(phase, 0, first)
                        self._runner.call(Proposal(decision, inputs, timestep, first, number))
            self.reset()

    def reset(self) -> None:
        """Start a new image with the next call, whatever its timestep. Only rank 0's reset counts."""
        self._images.reset()

    @contextlib.contextmanager
    def image(self) -> Iterator[None]:
        """Treat the calls inside as steps of one image: ``with unet.image(): ...``.

        Only rank 0's statement counts. It serves callers whose inputs do not show the image: a stochastic sampler with
        its own timesteps, or conditioning that changes from step to step. Nothing is measured inside.
        """
        with self._images.stated():
            yield

    def stop(self) -> None:
        """End the current image on all ranks. Call it on rank 0, in place of the image's next call.

        That call then raises :class:`RanksDifferError` on the other ranks. The next call starts a new image everywhere.
        """
        self._drift.reset()
        self._images.reset()
        self._conditioning.reset()
        self._reuse.reset()
        self._runner.refuse()

    def close(self) -> None:
        """Close the module together with the other ranks. Later calls are refused."""
        with self._calls_guard.closing():
            self._runner.close()

    def extra_repr(self) -> str:
        return f"ranks={self.plan.world_size}, device={self._device}"


def _zeros(plan: ExecutionPlan, spec: InputSpec, device: torch.device) -> torch.Tensor:
    """Return zeros in place of an input; for the timestep, the one that the module was converted with."""
    wanted = plan.called_spec(spec)
    value = 0.0 if spec.path != plan.timestep_path else float(plan.options.example_timestep or 0.0)
    return torch.full(wanted.shape, value, dtype=wanted.dtype, device=device)


@contextlib.contextmanager
def image(module: torch.nn.Module) -> Iterator[None]:
    """Treat the calls of ``module`` inside as steps of one image: :meth:`DistributedModule.image`.

    ``module`` may also be a network of a pipeline that :func:`districompile.enable` was called for.
    Does nothing for any other module, so that a script runs on the original as well.
    """
    stated = module.image if isinstance(module, DistributedModule) else getattr(module.forward, "image", None)
    with contextlib.nullcontext() if stated is None else stated():
        yield
