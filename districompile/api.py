"""``dc.convert``: from a module to a program for N ranks, and what can be done with one."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from districompile.backends.base import Backend, BuildSegment, get_backend
from districompile.backends.build import build_segments
from districompile.backends.eager import EagerEngine
from districompile.bundle import WEIGHTS, BundleWriter, check_replaceable
from districompile.capture import Captured, bind_call, capture
from districompile.compare import NodeError, compare_nodes
from districompile.errors import BackendError, ConvertError
from districompile.flops import flops_of
from districompile.ir.inside import delivered, whole_plan, whole_segment
from districompile.ir.plan import PHASES, InputSpec, Phase, PhasePlan, Plan
from districompile.ir.printer import print_graph
from districompile.ir.program import PhaseProgram, build_program, check_plan
from districompile.passmanager import Pass, PassManager, import_pass, import_rules
from districompile.progress import Progress, tasks
from districompile.report import Report, phase_text
from districompile.runtime.agreement import Proposal
from districompile.runtime.inputs import InputChecker
from districompile.runtime.runner import LockstepRunner
from districompile.runtime.streams import Decision
from districompile.structure import flatten_call, packages_of, rebuild_output
from districompile.unit import DISPLACEABLE, DRIFT_LIMIT, OPTIMISATIONS, Options, Unit
from districompile.weights import WeightFile


def convert(
    module: torch.nn.Module | Captured,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    ranks: int,
    rows: Mapping[str, int] | None = None,
    cfg: str = "none",
    groupnorm: str = "forecast",
    displace: Sequence[str] | str = DISPLACEABLE,
    warmup_steps: int = 4,
    drift_limit: float = DRIFT_LIMIT,
    segments: int = 4,
    passes: Iterable[Pass | str] = (),
    rules: Iterable[str] = (),
    strict: bool = False,
    dump: str | Path | None = None,
    stop_after: str | None = None,
    skip: Sequence[str] = (),
    optimise: Sequence[str] | str = (),
    progress: Progress | None = None,
) -> Program:
    """Compile ``module``, called with ``args`` and ``kwargs``, into a program for ``ranks`` processes.

    A module captured already (:func:`districompile.capture`, with its arguments) may be given instead, several times.
    ``rows`` names the inputs that are cut, as they are passed, and the dim of their rows (``{"sample": 2}``); left
    out, it is every floating-point image or volume among the inputs. ``cfg="split"`` gives each half of the batch
    (guidance) to half of the ranks. ``groupnorm``, ``displace`` and ``warmup_steps`` say how the steady phase differs
    from the exact one; ``displace="none"`` makes it exact too. After ``warmup_steps`` exact steps,
    steps stay exact until the image has settled: until it changes at most ``drift_limit`` times as fast as the sampler
    moves it (:mod:`districompile.runtime.drift`; 0 turns this off). ``segments``: into how many engines the steady
    phase is cut at most. ``passes`` run on the local graph, before collectives are lowered; ``rules`` are modules that
    register operator rules. ``strict`` refuses a module with an operator that has to be computed whole. ``optimise``
    names exact optimisations of the graph ("all", or of :data:`~districompile.unit.OPTIMISATIONS`). ``dump`` is a
    folder for the graph after each pass.

    Raises :class:`districompile.Error` for everything a caller can get wrong, saying what to do.
    """
    for rule_module in rules:
        import_rules(rule_module)
    chosen = OPTIMISATIONS if optimise == "all" else optimise.split(",") if isinstance(optimise, str) else optimise
    options = _options(
        ranks, cfg, groupnorm, displace, warmup_steps, segments, strict, tuple(k for k in chosen if k), drift_limit
    )
    bars = tasks(progress)
    halved: Sequence[str] = ()
    if isinstance(module, Captured):
        if args or kwargs or cfg == "split":
            raise ConvertError(
                "a captured module has its arguments already, and cfg='split' halves them: pass the module"
            )
        captured = module
    else:
        if cfg == "split":
            args, kwargs, halved = _halve(module, args, dict(kwargs or {}), rows)
        with bars.task("capturing the graph"):
            captured = capture(module, args, kwargs)
    inputs = _with_rows(captured.inputs, rows)
    captured = dataclasses.replace(captured, inputs=inputs)
    cut = {i.value: i.rows for i in inputs if i.rows is not None}
    unit = Unit(captured.copy_graph(), "whole", captured, options, cut)
    manager = PassManager(Path(dump) if dump is not None else None, stop_after, tuple(skip))
    mine = [import_pass(p) if isinstance(p, str) else p for p in passes]
    with bars.task("cutting"):
        phases = _compile(unit, manager, mine)
        manager.finish()
    if manager.stopped:
        return Program(captured, _stub_plan(captured, options, unit), {}, {"warmup": unit.graph})
    captured = unit.captured  # passes may have joined weights
    plan = _plan(captured, unit, phases, options, manager, halved)
    return Program(captured, plan, {p: phases[p][1] for p in PHASES}, {p: phases[p][0].graph for p in PHASES})


def _options(
    ranks: int, cfg: str, groupnorm: str, displace: Sequence[str] | str, warmup_steps: int, segments: int, strict: bool,
    optimise: tuple[str, ...], drift_limit: float,
) -> Options:  # fmt: skip
    if cfg == "split":
        if ranks % 2:
            raise ConvertError(
                f"cfg='split' gives each guidance half to half of the ranks: {ranks} is odd, use an even number"
            )
        ranks //= 2
    if isinstance(displace, str):
        displace = DISPLACEABLE if displace == "all" else [k for k in displace.split(",") if k]
    kinds = tuple(k for k in displace if k != "none")
    return Options(ranks, cfg, groupnorm, kinds, warmup_steps, segments, strict, optimise, drift_limit)


def _pipelines() -> Any:
    # The content packages use this one; by name, so that they are loaded under their own
    return importlib.import_module("districompile.passes.pipelines")


def _compile(unit: Unit, manager: PassManager, mine: Sequence[Pass]) -> dict[str, tuple[Unit, PhaseProgram]]:
    pipelines = _pipelines()
    manager.run(unit, pipelines.cut(unit.options))
    manager.run(unit, mine)
    manager.run(unit, pipelines.lower(unit.options))
    if manager.stopped:
        return {}
    steady = manager.run(unit.for_phase("steady"), pipelines.steady(unit.options))
    second = build_program(steady.graph, "steady", unit.options.segments)
    warmup = unit.for_phase("warmup")
    first = build_program(warmup.graph, "warmup", states=second.states)
    return {"warmup": (warmup, first), "steady": (steady, second)}


def _plan(
    captured: Captured, unit: Unit, phases: Mapping[str, tuple[Unit, PhaseProgram]], options: Options,
    manager: PassManager, halved: Sequence[str],
) -> Plan:  # fmt: skip
    collectives = {name: c for p in PHASES for name, c in phases[p][1].collectives.items()}
    dropped = set(phases["warmup"][1].collectives) - set(phases["steady"][1].collectives)
    for name in dropped:  # nothing is read of them in the steady phase
        collectives[name] = dataclasses.replace(collectives[name], displaced=False)
    phase_plans: dict[str, PhasePlan] = {}
    used: set[str] = set()
    for name in PHASES:
        program = phases[name][1]
        check_plan(name, program.plan, collectives, [i.value for i in captured.inputs])
        classes = {s: tuple(map(str, segment.rank_classes(options.ranks))) for s, segment in program.segments.items()}
        plans = {s: dataclasses.replace(p, engines=classes[s]) for s, p in program.plan.segments.items()}
        used |= {w for p in plans.values() for w in p.weights}
        phase_plans[name] = dataclasses.replace(program.plan, segments=plans)
    report = dict(unit.report)
    fixed = tuple(report.pop("conditioning", ()))
    report["passes"] = [dataclasses.asdict(r) for r in manager.records]
    return Plan(
        ranks=options.ranks,
        inputs=captured.inputs,
        constants=captured.constants,
        signature=captured.signature,
        output=captured.output,
        collectives=collectives,
        phases=phase_plans,
        weights={name: spec for name, (spec, _) in captured.weights.items() if name in used},
        bounds={n: b for n, b in report.get("rows", {}).items() if b is not None},
        options={
            **dataclasses.asdict(options),
            "cfg_inputs": tuple(halved),
            "conditioning": fixed,
            **({} if captured.timestep is None else {"example_timestep": captured.timestep}),
        },
        report=report,
    )


def _stub_plan(captured: Captured, options: Options, unit: Unit) -> Plan:
    return Plan(options.ranks, captured.inputs, captured.constants, captured.signature, captured.output, {}, {}, {}, {},
                dataclasses.asdict(options), dict(unit.report))  # fmt: skip


def _with_rows(inputs: Sequence[InputSpec], rows: Mapping[str, int] | None) -> tuple[InputSpec, ...]:
    """The inputs with their cut dims, given or inferred."""
    if rows is None:
        rows = _inferred(inputs)
    known = {i.path: i for i in inputs}
    for path, dim in rows.items():
        if path not in known:
            raise ConvertError(f"rows names {path!r}, but the tensor inputs are: {', '.join(known)}")
        if not -len(known[path].spec.shape) <= dim < len(known[path].spec.shape):
            raise ConvertError(f"rows: {path} has {len(known[path].spec.shape)} dims, there is no dim {dim}")
    return tuple(dataclasses.replace(i, rows=rows[i.path] % len(i.spec.shape)) if i.path in rows else i for i in inputs)


def _inferred(inputs: Sequence[InputSpec]) -> dict[str, int]:
    """Images (B, C, H, W) and volumes (B, C, F, H, W): their height. A lone sequence called sample: its length."""
    spatial = {i.path: -2 for i in inputs if i.spec.dtype.is_floating_point and len(i.spec.shape) in (4, 5)}
    if not spatial:
        spatial = {i.path: 2 for i in inputs if i.path in ("sample", "x") and len(i.spec.shape) == 3}
    if not spatial:
        shapes = ", ".join(f"{i.path} {list(i.spec.shape)}" for i in inputs)
        raise ConvertError(f"cannot tell which input holds the image's rows ({shapes}): pass rows={{'NAME': DIM}}")
    return spatial


def _halve(
    module: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any], rows: Mapping[str, int] | None
) -> tuple[Sequence[Any], dict[str, Any], tuple[str, ...]]:
    """The arguments of one guidance half: every tensor with the batch of the image loses half of it."""
    signature, bound_args, bound_kwargs = bind_call(module, args, kwargs)
    leaves = flatten_call(signature, bound_args, bound_kwargs)
    images = [leaves[p] for p in rows or {} if p in leaves] or [
        v for v in leaves.values() if isinstance(v, Tensor) and v.ndim > 3
    ]
    batch = images[0].shape[0] if images else 0
    if batch == 0 or batch % 2:
        raise ConvertError(
            f"cfg='split' halves the batch, which is {batch}: pass both guidance halves, stacked on dim 0"
        )
    halved = tuple(p for p, v in leaves.items() if isinstance(v, Tensor) and v.ndim > 0 and v.shape[0] == batch)
    first = torch.utils._pytree.tree_map(
        lambda v: v[: batch // 2] if isinstance(v, Tensor) and v.ndim > 0 and v.shape[0] == batch else v,
        (bound_args, bound_kwargs),
    )
    return first[0], first[1], halved


class Program:
    """A converted module: its plan, its graphs, and a simulation of all ranks in this process."""

    def __init__(
        self, captured: Captured, plan: Plan, phases: Mapping[str, PhaseProgram], graphs: Mapping[str, fx.Graph]
    ) -> None:
        self.plan = plan
        self._captured = captured
        self._phases = dict(phases)
        self._graphs = dict(graphs)
        self._runner: LockstepRunner | None = None

    def simulate(self, *args: Any, phase: Phase = "warmup", **kwargs: Any) -> Any:
        """Call the program as the module is called, on all ranks in this process, operator by operator.

        The ``steady`` phase uses what the calls before it left (with ``hoist-conditioning`` what was made of the last
        exact call's conditioning, too), and raises :class:`InputError` before the first one. Returns what the module
        returns.
        """
        device = next((w().device for _, w in self._captured.weights.values()), torch.device("cpu"))
        if self._runner is None:
            self._runner = LockstepRunner(self.plan, self._engines(), device)
        call = InputChecker(self.plan, device)(args, kwargs)
        with torch.no_grad():
            _, leaves = self._runner.call(Proposal(Decision(phase, 0, False), call.tensors))
        described = self._captured.output
        return_dict = call.return_dict if isinstance(call.return_dict, bool) else None
        return rebuild_output(described, leaves, return_dict, trusted=packages_of(described))

    def reset(self) -> None:
        """Forget the state of the calls so far: the next image starts with the warm-up phase."""
        self._runner = None

    def compare_nodes(self, *args: Any, **kwargs: Any) -> list[NodeError]:
        """Every operator of the exact phase against the original model's, for one call: to find a rule that is wrong.

        The graph is cut anew by the built-in passes; all activations are held at once.
        """
        captured = self._captured
        ranks, options = self.plan.ranks, self.plan.options
        unit = Unit(
            captured.copy_graph(), "whole", captured, Options(ranks, str(options.get("cfg", "none"))),
            {i.value: i.rows for i in self.plan.inputs if i.rows is not None},
        )  # fmt: skip
        passes = [p for p in _pipelines().cut(unit.options) if p.gives == "whole"]
        PassManager().run(unit, passes)
        call = InputChecker(self.plan, torch.device("cpu"))(args, kwargs)
        return compare_nodes(unit, {i.value: call.tensors[i.path] for i in self.plan.inputs})

    def report(self) -> Report:
        """What is exchanged where, fallbacks, bytes, rows per rank."""
        return Report(self.plan)

    def work(self, phase: Phase = "steady") -> list[float]:
        """Floating-point operations of each rank in one call."""
        return [sum(flops_of(n, r) for n in self._graphs[phase].nodes) for r in range(self.plan.ranks)]

    def graph_text(self, phase: Phase = "warmup") -> str:
        """The SPMD graph of a phase, one line a node."""
        return print_graph(self._graphs[phase])

    def weight(self, name: str) -> Tensor:
        """The data of one of ``plan.weights``: those of the module, and those that passes made of them."""
        return self._captured.weights[name][1]()

    def segments(self, phase: Phase) -> Iterable[tuple[tuple[str, str, int], BuildSegment]]:
        """The distinct segments of a phase: ((phase, segment, first rank), graph)."""
        for name, segment in self._phases[phase].segments.items():
            for rank in sorted(set(segment.rank_classes(self.plan.ranks))):
                yield (phase, name, rank), segment.build(rank)

    def _engines(self) -> list[dict[str, dict[str, EagerEngine]]]:
        self._need_phases()
        weights: dict[str, Tensor] = {}
        built: dict[tuple[str, str, int], EagerEngine] = {}
        for phase in PHASES:
            for key, segment in self.segments(phase):
                tensors = [weights.setdefault(n, self._captured.weights[n][1]()) for n, _ in segment.weights]
                outputs = tuple(n for n, _ in segment.outputs)
                built[key] = EagerEngine(segment.graph, dict(segment.inputs), tensors, outputs)
        return [
            {
                p: {s: built[p, s, int(plan.engines[r])] for s, plan in self.plan.phases[p].segments.items()}
                for p in PHASES
            }
            for r in range(self.plan.ranks)
        ]

    def _need_phases(self) -> None:
        if not self._phases:
            raise ConvertError("this program stops after a pass (stop_after): it can be printed, not run or saved")

    def save(
        self, path: str | Path, backend: str | Backend = "onnxruntime", *, source: str | None = None,
        config: Mapping[str, Any] | None = None, collectives: str = "between", progress: Progress | None = None,
        made_with: Mapping[str, Any] | None = None, force: bool = False,
    ) -> None:  # fmt: skip
        """Build the engines of all ranks and write the bundle. Nothing is left behind where that fails.

        ``backend`` is a name, or a backend with options of its own (``TensorRTBackend(target="sm89")``). ``source`` is
        where the model came from, for whoever needs the rest of its pipeline. ``collectives``: the exact phase is cut
        at every collective (``"between"``), or is one engine that holds them (``"inside"``, TensorRT only). A
        bundle that is there is replaced where it was made of the same model with the same options (``made_with``, which
        the manifest records), or with ``force``. Raises :class:`BackendError` or :class:`BundleError`.
        """
        self._need_phases()
        chosen = get_backend(backend) if isinstance(backend, str) else backend
        made_with = made_with or {
            "class": self._captured.model_class, "source": source, "backend": chosen.name, "ranks": self.plan.ranks,
            "collectives": collectives, "options": self.plan.options,
        }  # fmt: skip
        check_replaceable(Path(path), made_with, force)
        plan, segments = self._layout(chosen, collectives)
        bars = tasks(progress)
        with BundleWriter(path) as writer:
            weights = self._write_weights(writer, bars)
            with bars.task("building engines", 1.0) as task:
                files = build_segments(chosen, segments, weights, writer.path("engines/_").parent, _advance(task))
            plan = _with_engines(plan, files)
            text = "\n\n".join([str(Report(plan)), *(f"{phase}\n{phase_text(plan, phase)}" for phase in PHASES)])
            describe = getattr(chosen, "describe", None)
            with bars.task("hashing files", 1.0) as task:
                writer.finish(
                    plan, text, backend=chosen.name, device=getattr(chosen, "device", "cpu"), source=source,
                    model_class=self._captured.model_class, engines=describe() if describe else None,
                    config=config if config is not None else self._captured.config, progress=_advance(task),
                    made_with=made_with,
                )  # fmt: skip

    def _layout(
        self, backend: Backend, collectives: str
    ) -> tuple[Plan, Iterable[tuple[tuple[str, str, int], BuildSegment]]]:
        """The plan, and the segments to build, with collectives where they are asked for."""
        if collectives not in ("between", "inside"):
            raise ConvertError(f"collectives={collectives!r}: they are 'between' engines or 'inside' of them")
        between = (item for phase in PHASES for item in self.segments(phase))
        if collectives == "between":
            return self.plan, between
        reason = getattr(backend, "collectives_inside", f"the {backend.name} backend cuts at every collective")
        if reason is not None:
            raise BackendError(f"collectives cannot be inside of engines: {reason}; use 'between'")
        left = delivered(self.plan.phases["steady"])
        warmup = whole_plan(self._phases["warmup"], left, self.plan.ranks)
        phases = {**self.plan.phases, "warmup": warmup}
        options = {**self.plan.options, "collectives": "inside"}
        (name,) = warmup.segments
        whole = ((("warmup", name, r), whole_segment(self._phases["warmup"], left, r)) for r in range(self.plan.ranks))
        plan = dataclasses.replace(self.plan, phases=phases, options=options)
        return plan, (item for source in (whole, self.segments("steady")) for item in source)

    def _write_weights(self, writer: BundleWriter, bars: Progress) -> WeightFile:
        path = writer.path(WEIGHTS)
        items = [(name, spec, self._captured.weights[name][1]) for name, spec in self.plan.weights.items()]
        with bars.task("writing weights", 1.0) as task:
            writer.known(WEIGHTS, WeightFile.write(path, items, _advance(task)))
        return WeightFile.open(path)


def _with_engines(plan: Plan, files: Mapping[tuple[str, str, int], str]) -> Plan:
    """The plan with engine files in place of rank classes."""
    phases = {}
    for name, phase in plan.phases.items():
        segments = {
            s: dataclasses.replace(p, engines=tuple(files[name, s, int(e)] for e in p.engines))
            for s, p in phase.segments.items()
        }
        phases[name] = dataclasses.replace(phase, segments=segments)
    return dataclasses.replace(plan, phases=phases)


def _advance(task: Any) -> Callable[[int, int], None]:
    """A bar of total 1, told of progress as (done, in all)."""
    shown = 0.0

    def update(done: int, total: int) -> None:
        nonlocal shown
        share = done / max(1, total)
        task.advance(max(0.0, share - shown))
        shown = share

    return update
