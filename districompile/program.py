# SPDX-License-Identifier: Apache-2.0
"""A converted module: simulate all ranks in one process, inspect it, and save it as a bundle."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from districompile.backends.base import Backend
from districompile.backends.eager import EagerEngine
from districompile.errors import BackendError, ConvertError, InputError
from districompile.frontend.call_tree import packages_of, rebuild_output
from districompile.ir.captured import CapturedModule
from districompile.ir.flops import flops_of
from districompile.ir.printer import print_graph
from districompile.ir.segment import SegmentGraph
from districompile.ir.spec import BOTH_PHASES, PHASES, Phase
from districompile.ir.unit import CompilationUnit, Options
from districompile.passes import pipelines
from districompile.passes.manager import PassManager
from districompile.plan.experimental.joined import delivered, whole_plan, whole_segment
from districompile.plan.plan import ExecutionPlan
from districompile.plan.report import Report
from districompile.plan.schedule import PartitionedPhase
from districompile.progress import Progress
from districompile.runtime.calls.agreement import Proposal
from districompile.runtime.calls.call_tracker import Decision
from districompile.runtime.calls.inputs import InputChecker
from districompile.runtime.runner import SimulatedRunner
from districompile.saving import add_programs, save_programs
from districompile.sharding.compare import NodeError, compare_nodes
from districompile.sharding.registry import RuleSource, rules_for


class Program:
    """A converted module: its plan, its graphs, and a simulation of all ranks in this process.

    ``plan`` is the :class:`~districompile.plan.plan.ExecutionPlan`. Programs are made by :func:`convert`.
    """

    def __init__(
        self,
        captured: CapturedModule,
        plan: ExecutionPlan,
        phases: Mapping[str, PartitionedPhase],
        graphs: Mapping[str, fx.Graph],
        rules: Sequence[RuleSource] = (),
    ) -> None:
        self.plan = plan
        self._rules = tuple(rules)
        self.captured = captured
        self._phases = dict(phases)
        self._graphs = dict(graphs)
        self._runner: SimulatedRunner | None = None

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases that were compiled: the exact one, or also the displaced and perhaps the reused one."""
        return tuple(p for p in PHASES if p in self._phases)

    def simulate(self, *args: Any, phase: Phase = "exact", **kwargs: Any) -> Any:
        """Call the program as the module is called, on all ranks in this process, operator by operator.

        The ``displaced`` phase uses what the calls before it left (with ``cache-conditioning`` what was made of
        the last exact call's conditioning, too), and raises :class:`InputError` before the first one. Returns what the
        module returns.
        """
        self._need_phases()
        if phase not in self.phases:
            way = "convert again with reuse=" if phase == "reused" else BOTH_PHASES
            raise InputError(f"this module was converted for the {', '.join(self.phases)} phase only: {way}")
        device = self.captured.device
        if self._runner is None:
            self._runner = SimulatedRunner(self.plan, self._engines(), device)
        call = InputChecker(self.plan, device)(args, kwargs)
        with torch.no_grad():
            _, leaves = self._runner.call(Proposal(Decision(phase, 0, False), call.tensors))
        described = self.captured.output
        return_dict = call.return_dict if isinstance(call.return_dict, bool) else None
        return rebuild_output(described, leaves, return_dict, trusted=packages_of(described))

    def reset(self) -> None:
        """Drop the state of earlier calls. The next image starts with the exact phase."""
        self._runner = None

    def compare_nodes(self, *args: Any, **kwargs: Any) -> list[NodeError]:
        """Compare every operator of the exact phase with the original module's, for one call. Finds a wrong rule.

        The built-in passes partition the graph again. All activations are held in memory at once.
        """
        captured = self.captured
        ranks, options = self.plan.ranks, self.plan.options
        unit = CompilationUnit(
            captured.copy_graph(), "global", captured, Options(ranks, options.cfg),
            {i.value: i.rows for i in self.plan.inputs if i.rows is not None},
        )  # fmt: skip
        passes = [p for p in pipelines.cut(unit.options) if p.gives == "global"]
        call = InputChecker(self.plan, captured.device)(args, kwargs)
        with rules_for(self._rules):
            PassManager().run(unit, passes)
            return compare_nodes(unit, {i.value: call.tensors[i.path] for i in self.plan.inputs})

    def inexact_passes(self) -> list[str]:
        """Return passes of the user's own with ``exact = False``, as text: results may differ in every phase."""
        found = (p.text for p in self.plan.report.passes if not (p.built_in or p.exact))
        return list(dict.fromkeys(found))

    def report(self) -> Report:
        """Return the report: rows of each rank, what is exchanged where, bytes, fallbacks."""
        return Report(self.plan)

    def work(self, phase: Phase | None = None) -> list[float]:
        """Count the floating-point operations of each rank in one call, of the displaced phase where there is one."""
        phase = phase or self.phases[-1]
        return [sum(flops_of(n, r) for n in self._graphs[phase].nodes) for r in range(self.plan.ranks)]

    def graph(self, phase: Phase = "exact") -> fx.Graph:
        """Return the SPMD graph of a phase, as the last pass left it."""
        return self._graphs[phase]

    def graph_text(self, phase: Phase = "exact") -> str:
        """Print the SPMD graph of a phase to a string, one line a node."""
        return print_graph(self._graphs[phase])

    def weight(self, name: str) -> Tensor:
        """Read one of ``plan.weights``: a weight of the module, or one that a pass made of them."""
        return self.captured.weights[name][1]()

    def segments(self, phase: Phase) -> Iterable[tuple[tuple[str, str, int], SegmentGraph]]:
        """Yield the distinct segments of a phase as ((phase, segment, first rank), graph)."""
        for name, segment in self._phases[phase].segments.items():
            for rank in sorted(set(segment.rank_classes(self.plan.ranks))):
                yield (phase, name, rank), segment.build(rank)

    def _engines(self) -> list[dict[str, dict[str, EagerEngine]]]:
        self._need_phases()
        weights: dict[str, Tensor] = {}
        built: dict[tuple[str, str, int], EagerEngine] = {}
        for phase in self.phases:
            for key, segment in self.segments(phase):
                for n, _ in segment.weights:
                    if n not in weights:
                        weights[n] = self.captured.weight_on(n, self.captured.device)
                tensors = [weights[n] for n, _ in segment.weights]
                outputs = tuple(n for n, _ in segment.outputs)
                built[key] = EagerEngine(segment.graph, dict(segment.inputs), tensors, outputs)
        return [
            {
                p: {s: built[p, s, int(plan.engines[r])] for s, plan in self.plan.phases[p].segments.items()}
                for p in self.phases
            }
            for r in range(self.plan.ranks)
        ]

    def _need_phases(self) -> None:
        if not self._phases:
            raise ConvertError("this program stops after a pass (stop_after): it can be printed, not run or saved")

    def save(
        self, path: str | Path, backend: str | Backend = "onnxruntime", *, source: str | None = None,
        config: Mapping[str, Any] | None = None, collectives: str = "between", progress: Progress | None = None,
        made_with: Mapping[str, Any] | None = None, force: bool = False, shapes: Sequence[Program] = (),
    ) -> None:  # fmt: skip
        """Build the engines of all ranks and write the bundle. Nothing is left behind where that fails.

        ``backend`` is a name, or a backend with options of its own (``TensorRTBackend(target="sm89")``). ``source`` is
        where the model came from, for whoever needs the rest of its pipeline. ``collectives``: the exact phase is cut
        at every collective (``"between"``), or is one engine that holds them (``"inside"``: experimental, TensorRT
        alone). A bundle that is there is replaced where it was made of the same model with the same options
        (``made_with``, which the manifest records), or with ``force``. ``shapes`` are conversions of the same module
        for other shapes of its inputs: the bundle holds all of them over one copy of the weights. Raises
        :class:`BackendError` or :class:`BundleError`.
        """
        for program in (self, *shapes):
            program._need_phases()
        save_programs(
            Path(path), (self, *shapes), backend, source=source, config=config, collectives=collectives,
            progress=progress, made_with=made_with, force=force,
        )  # fmt: skip

    def add_to(
        self, path: str | Path, backend: str | Backend | None = None, progress: Progress | None = None
    ) -> list[str]:
        """Add this program to the bundle at ``path``, as a further shape of its model. Return the shape's name.

        The bundle keeps its weights, also where :func:`refit` has changed them, and its other shapes. It is replaced at
        once when the new one is complete: a failure leaves it as it was, and a process that has loaded it goes on.
        Nothing is done for a shape that is there; the result is then empty. ``backend`` is that of the bundle, with
        the same options. Raises :class:`BundleError` for a program of another model or conversion.
        """
        self._need_phases()
        return add_programs(Path(path), (self,), backend, progress)

    def layout(
        self, backend: Backend, collectives: str
    ) -> tuple[ExecutionPlan, Iterable[tuple[tuple[str, str, int], SegmentGraph]]]:
        """Return the plan and the segments to build, for collectives between engines or inside of them."""
        if collectives not in ("between", "inside"):
            raise ConvertError(f"collectives={collectives!r}: they are 'between' engines or 'inside' of them")
        between = (item for phase in self.phases for item in self.segments(phase))
        if collectives == "between":
            return self.plan, between
        reason = backend.collectives_inside
        if reason is not None:
            raise BackendError(f"collectives cannot be inside of engines: {reason}; use 'between'")
        if self.plan.options.transfer_bits is not None:
            raise BackendError("collectives inside of engines send values in full: leave out transfer_bits")
        left = delivered(*(plan for phase, plan in self.plan.phases.items() if phase != "exact"))
        exact = whole_plan(self._phases["exact"], left, self.plan.ranks)
        phases = {**self.plan.phases, "exact": exact}
        options = dataclasses.replace(self.plan.options, collectives="inside")
        (name,) = exact.segments
        whole = (
            (("exact", name, r), whole_segment(self._phases["exact"], left, r, backend.all_to_all_inside))
            for r in range(self.plan.ranks)
        )
        plan = dataclasses.replace(self.plan, phases=phases, options=options)
        later = (item for phase in self.phases if phase != "exact" for item in self.segments(phase))
        return plan, itertools.chain(whole, later)
