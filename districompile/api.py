# SPDX-License-Identifier: Apache-2.0
"""Convert a module to a program for several ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from districompile.common.extensions import Extension, load_extensions
from districompile.errors import ConvertError
from districompile.frontend.call_tree import flatten_call
from districompile.frontend.capture import bind_call, capture
from districompile.ir.captured import CapturedModule
from districompile.ir.layer_size import Faster
from districompile.ir.report_builder import QuantisedLayer
from districompile.ir.spec import PHASE_CHOICES, PHASES, InputSpec, Phase, names_timestep
from districompile.ir.unit import (
    DISPLACEABLE,
    DRIFT_LIMIT,
    OPTIMISATIONS,
    CompilationUnit,
    Options,
    parse_optimise,
    parse_reuse,
)
from districompile.models.portable import portable_functions
from districompile.passes import pipelines
from districompile.passes.manager import Pass, PassManager
from districompile.plan.options import PlanOptions
from districompile.plan.plan import ExecutionPlan, Schedule
from districompile.plan.plan_report import finish_report
from districompile.plan.schedule import PartitionedPhase, build_program, check_plan
from districompile.program import Program
from districompile.progress import Progress, tasks
from districompile.sharding.registry import RuleSource, rules_for


def convert(
    module: torch.nn.Module | CapturedModule,
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
    passes: Iterable[Pass | type[Any] | str] = (),
    rules: Iterable[RuleSource] = (),
    extensions: Iterable[Extension] = (),
    strict: bool = False,
    dump: str | Path | None = None,
    stop_after: str | None = None,
    skip: Sequence[str] = (),
    optimise: Sequence[str] | str = (),
    phases: str = "both",
    reuse: str = "none",
    transfer_bits: int | None = None,
    quantise: str | Sequence[QuantisedLayer] = "none",
    calibration: Sequence[tuple[Sequence[Any], Mapping[str, Any]]] = (),
    faster: Faster | None = None,
    timestep: str | None = None,
    progress: Progress | None = None,
) -> Program:
    """Compile ``module``, called with ``args`` and ``kwargs``, into a program for ``ranks`` processes.

    Args:
        module: the module, or one that :func:`districompile.capture` captured with its arguments.
        args: positional example arguments. Only shapes, dtypes and Python values matter.
        kwargs: example arguments by name.
        ranks: the number of processes that share an image.
        rows: the sharded inputs, as they are passed, with the dim of their rows (``{"sample": 2}``). By default every
            floating-point image or volume among the inputs is sharded by height.
        cfg: ``"split"`` gives each half of the batch (guidance) to half of the ranks; ``"none"`` does not.
        groupnorm: the statistics of displaced group norms, of :data:`~districompile.ir.unit.GROUPNORM_MODES`.
        displace: the purposes of the exchanges that are displaced; ``"none"`` makes the displaced phase exact.
        warmup_steps: the least number of exact steps of an image.
        drift_limit: steps stay exact until the image changes at most this many times as fast as the sampler moves it
            (:mod:`districompile.runtime.calls.drift`). 0 turns this off.
        segments: the largest number of engines of the displaced phase.
        passes: objects, classes, or text (``"cse"``, ``"pkg.mod:Pass{layer=down;least=3}"``). Each runs at the stage
            that it needs: ``global`` before shardings are propagated, ``spmd`` before collectives are lowered,
            ``lowered`` for each phase.
        rules: modules that register rules of operators, their names, or
            :class:`~districompile.sharding.registry.RuleSet` objects, which hold for this conversion.
        extensions: modules, or functions, that register anything (:mod:`districompile.extend`), besides the extensions
            of installed packages.
        strict: refuse a module with an operator that no rule covers.
        dump: a folder for the graph after each pass.
        stop_after: the name of the last pass to run.
        skip: the names of passes to leave out.
        optimise: any of :data:`~districompile.ir.unit.OPTIMISATIONS`, or ``"all"`` that change no result. Without a
            displaced phase, ``exchange-before-norm`` is one of these.
        phases: ``"both"``; ``"exact"`` for a module whose calls do not repeat, such as a decoder, which then has no
            engines of displaced steps; or ``"auto"``, which is ``"exact"`` where the module takes no timestep, as calls
            without one are exact anyway.
        reuse: ``"deep=N"``: of N steps behind the exact ones, one computes everything, and the others take what deep
            levels or middle blocks compute from it. ``"deep=N:L"`` computes L levels, or L blocks at either end, in
            each step. ``"none"``: every step computes everything.
        transfer_bits: 8 sends what displaced steps exchange as differences of 8 bits to what was sent before, except
            for statistics of norms. None sends it as it is.
        quantise: ``"fp8"`` computes layers in 8 bits where calls of the module show that this is accurate;
            ``"fp8:40"`` asks for 40 dB of signal to noise at the output. The layers of an earlier conversion
            (``program.plan.report.quantised``) are taken as they are.
        calibration: the calls that ``quantise`` measures by, as (args, kwargs); by default the example arguments.
        faster: returns whether 8 bits make a layer of a size faster, such as ``backend.faster_in_8_bits``
            (:meth:`~districompile.backends.base.Backend.faster_in_8_bits`), which times it. ``quantise`` leaves other
            layers as they are. By default it chooses by accuracy alone.
        timestep: the input that differs between the steps of a sampler. By default it is one with a usual name, such as
            ``timestep``, ``t``, ``sigma`` or ``noise_labels``. Without one all calls are exact.
        progress: where progress is shown.

    Raises :class:`districompile.Error` for every mistake of a caller, with the way out. A mistake in a rule or a pass
    of the caller's own is a :class:`ConvertError` with the exception as its cause.
    """
    load_extensions(extensions)
    rules, added = tuple(rules), pipelines.add_passes(passes)
    layers = None if isinstance(quantise, str) else tuple(quantise)
    bits = quantise if isinstance(quantise, str) else "fp8" if layers else "none"
    options = _options(
        ranks, cfg, groupnorm, displace, warmup_steps, segments, strict, parse_optimise(optimise), drift_limit, reuse,
        transfer_bits, bits, timestep,
    )  # fmt: skip
    calls = [(args, dict(kwargs or {})), *calibration][bool(calibration) :]
    bars = tasks(progress)
    halved: Sequence[str] = ()
    if isinstance(module, CapturedModule):
        if args or kwargs or cfg == "split" or (options.quantise != "none" and layers is None):
            raise ConvertError(
                "a captured module has its arguments already; cfg='split' halves them, and quantise calls the module: "
                "pass the module"
            )
        captured = module
    else:
        if cfg == "split":
            args, kwargs, halved = _halve(module, args, dict(kwargs or {}), rows)
            calls = [_halve(module, a, dict(k), rows)[:2] for a, k in calls]
        with bars.task("capturing the graph"), rules_for(rules), portable_functions():
            captured = capture(module, args, kwargs, timestep)
    inputs = _with_rows(captured.inputs, rows)
    captured = dataclasses.replace(captured, inputs=inputs)
    wanted = _phases(phases, inputs, options)
    if wanted == ("exact",):  # then nothing is kept for a later call
        options = dataclasses.replace(
            options, displace=(), optimise=OPTIMISATIONS if optimise == "all" else options.optimise
        )
    cut = {i.value: i.rows for i in inputs if i.rows is not None}
    unit = CompilationUnit(captured.copy_graph(), "global", captured, options, cut, quantised=layers, faster=faster)
    if options.quantise != "none" and layers is None and isinstance(module, torch.nn.Module):
        unit.calibration = tuple(_values_of_call(module, captured, a, k) for a, k in calls)
    manager = PassManager(Path(dump) if dump is not None else None, stop_after, tuple(skip))
    with bars.task("cutting"), rules_for(rules):
        compiled = _compile(unit, manager, added, wanted)
        manager.finish()
    if manager.stopped:
        return Program(captured, _stub_plan(captured, options, unit), {}, {"exact": unit.graph}, rules)
    captured = unit.captured  # passes may have joined weights
    plan = _plan(captured, unit, compiled, options, manager, halved)
    programs: dict[str, PartitionedPhase] = {p: compiled[p][1] for p in wanted}
    return Program(captured, plan, programs, {p: compiled[p][0].graph for p in wanted}, rules)


def _phases(phases: str, inputs: Sequence[InputSpec], options: Options) -> tuple[Phase, ...]:
    """Return the phases to compile. Raise :class:`ConvertError` for an unknown word, or reuse without later steps."""
    if phases not in PHASE_CHOICES:
        raise ConvertError(f"phases={phases!r}: there are {', '.join(PHASE_CHOICES)}")
    beside = [i.path for i in inputs if i.rows is None]
    if options.timestep is not None and options.timestep not in beside:
        held = f"it has {', '.join(beside)}" if beside else "it has none"
        raise ConvertError(f"timestep={options.timestep!r}: the module has no such input beside its images: {held}")
    repeats = any(names_timestep(i.path, options.timestep) for i in inputs)
    if options.reuse is not None:
        if phases == "exact" or not repeats:
            why = "phases='exact' has none" if phases == "exact" else "a module without a timestep has none"
            raise ConvertError(f"reuse is for steps behind the exact ones, and {why}: convert without reuse")
        return PHASES
    return ("exact", "displaced") if phases == "both" or (phases == "auto" and repeats) else ("exact",)


def _options(
    ranks: int, cfg: str, groupnorm: str, displace: Sequence[str] | str, warmup_steps: int, segments: int, strict: bool,
    optimise: tuple[str, ...], drift_limit: float, reuse: str, transfer_bits: int | None, quantise: str,
    timestep: str | None,
) -> Options:  # fmt: skip
    if cfg == "split":
        if ranks % 2:
            raise ConvertError(
                f"cfg='split' gives each guidance half to half of the ranks: {ranks} is odd, use an even number"
            )
        ranks //= 2
    if isinstance(displace, str):
        displace = DISPLACEABLE if displace == "all" else [k for k in displace.split(",") if k]
    purposes = tuple(k for k in displace if k != "none")
    return Options(
        ranks, cfg, groupnorm, purposes, warmup_steps, segments, strict, optimise, drift_limit, *parse_reuse(reuse),
        transfer_bits, quantise, timestep,
    )  # fmt: skip


def _compile(
    unit: CompilationUnit, manager: PassManager, added: Sequence[Pass], phases: Sequence[Phase]
) -> dict[str, tuple[CompilationUnit, PartitionedPhase]]:
    manager.run(unit, pipelines.cut(unit.options, added))
    manager.run(unit, pipelines.lower(unit.options))
    options = unit.options
    later: dict[Phase, CompilationUnit] = {}
    if "displaced" in phases:
        later["displaced"] = manager.run(unit.for_phase("displaced"), pipelines.displaced(options, added))
    if "reused" in phases and not manager.stopped:
        later["reused"] = manager.run(later["displaced"].for_phase("reused"), pipelines.reused(options))
        manager.run(later["displaced"], pipelines.saving(options))
    exact = manager.run(unit.for_phase("exact"), [*pipelines.exact(options, added), *pipelines.saving(options)])
    if manager.stopped:
        return {}
    found: dict[str, tuple[CompilationUnit, PartitionedPhase]] = {}
    states: dict[str, str] = {}  # what the phases behind read, with the value that is saved for it
    initial: dict[str, str] = {}  # by the exact phase, where that is another value
    for phase in reversed(later):
        graph = later[phase].graph
        computed = {n.name for n in graph.nodes if n.op == "call_function"}
        mine = {state: value for state, value in states.items() if value in computed}
        program = build_program(graph, phase, options.segments, mine)
        states |= program.states
        initial |= program.initial
        found[phase] = later[phase], program
    cleared = tuple(unit.report.differences)
    like = found["displaced"][1] if "displaced" in found else None
    found["exact"] = exact, build_program(exact.graph, "exact", options.segments, {**states, **initial}, cleared, like)
    return {phase: found[phase] for phase in PHASES if phase in found}


def _plan(
    captured: CapturedModule,
    unit: CompilationUnit,
    phases: Mapping[str, tuple[CompilationUnit, PartitionedPhase]],
    options: Options,
    manager: PassManager,
    halved: Sequence[str],
) -> ExecutionPlan:
    present = [p for p in PHASES if p in phases]
    collectives = {name: c for p in present for name, c in phases[p][1].collectives.items()}
    read = {name for p in present[1:] or present for name in phases[p][1].collectives}
    for name in set(phases["exact"][1].collectives) - read:  # nothing is read of them in later phases
        collectives[name] = dataclasses.replace(collectives[name], displaced=False)
    phase_plans: dict[str, Schedule] = {}
    used: set[str] = set()
    for name in present:
        program = phases[name][1]
        check_plan(name, program.plan, collectives, [i.value for i in captured.inputs])
        classes = {s: tuple(map(str, segment.rank_classes(options.ranks))) for s, segment in program.segments.items()}
        plans = {s: dataclasses.replace(p, engines=classes[s]) for s, p in program.plan.segments.items()}
        used |= {w for p in plans.values() for w in p.weights}
        phase_plans[name] = dataclasses.replace(program.plan, segments=plans)
    return ExecutionPlan(
        ranks=options.ranks,
        inputs=captured.inputs,
        constants=captured.constants,
        signature=captured.signature,
        output=captured.output,
        collectives=collectives,
        phases=phase_plans,
        weights={name: spec for name, (spec, _) in captured.weights.items() if name in used},
        bounds={n: b for n, b in unit.report.rows.items() if b is not None},
        options=PlanOptions(
            **dataclasses.asdict(options),
            cfg_inputs=tuple(halved),
            conditioning=unit.report.conditioning,
            example_timestep=captured.timestep,
        ),
        report=finish_report(unit.report, manager.records),
    )


def _stub_plan(captured: CapturedModule, options: Options, unit: CompilationUnit) -> ExecutionPlan:
    return ExecutionPlan(
        options.ranks,
        captured.inputs,
        captured.constants,
        captured.signature,
        captured.output,
        {},
        {},
        {},
        {},
        PlanOptions(**dataclasses.asdict(options)),
        finish_report(unit.report),
    )


def _values_of_call(
    module: torch.nn.Module, captured: CapturedModule, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the tensors of a call by placeholder. Raise :class:`ConvertError` for a call unlike the example."""
    leaves = flatten_call(*bind_call(module, args, dict(kwargs)))
    found: dict[str, Tensor] = {}
    for i in captured.inputs:
        value = leaves.get(i.path)
        if not isinstance(value, Tensor) or tuple(value.shape) != i.spec.shape or value.dtype != i.spec.dtype:
            given = "nothing" if not isinstance(value, Tensor) else f"{value.dtype} {list(value.shape)}"
            raise ConvertError(
                f"calibration: {i.path} is {given}, and {i.spec.dtype} {list(i.spec.shape)} is converted"
            )
        if value.device.type == "meta":
            raise ConvertError(f"quantise: the call has no values (the input {i.path} is on the meta device)")
        found[i.value] = value
    return found


def _with_rows(inputs: Sequence[InputSpec], rows: Mapping[str, int] | None) -> tuple[InputSpec, ...]:
    """Add the dims of rows, given or inferred, to the inputs."""
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
    """Infer the dims of rows: the height of images (B, C, H, W) and volumes (B, C, F, H, W). Without any of those, the
    length of a sequence (B, C, L) that is called ``sample`` or ``x``."""
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
    """Return the arguments of one guidance half: each tensor with the image's batch keeps the first half of it."""
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
