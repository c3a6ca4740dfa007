# SPDX-License-Identifier: Apache-2.0
"""Write the programs of one model, one for each shape, into a bundle, and add further shapes to a bundle."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from districompile.backends.base import Backend
from districompile.backends.build import build_segments
from districompile.backends.registry import get_backend
from districompile.bundle.bundle import ENGINES, WEIGHTS, Bundle, BundleWriter, check_replaceable
from districompile.bundle.own_vae import keep_vae
from districompile.bundle.refit import share_files
from districompile.bundle.shared_weights import SharedWeights
from districompile.bundle.weights import WeightFile
from districompile.common.locks import held
from districompile.errors import BundleError
from districompile.ir.operators import Provider, foreign_operators, name_of, provider_of
from districompile.ir.segment import SegmentGraph
from districompile.ir.spec import PHASES, TensorSpec
from districompile.plan.plan import ExecutionPlan
from districompile.plan.report import Report
from districompile.plan.shapes import check_alike, input_shapes, shape_key, shape_name
from districompile.plan.steps_text import phase_text
from districompile.progress import Progress, tasks

if TYPE_CHECKING:
    from districompile.program import Program

Key = tuple[str, str, int]  # phase, segment, rank


@dataclasses.dataclass(frozen=True)
class Part:
    """What a bundle holds of one program: its plan, its segments, and where its weights are read."""

    plan: ExecutionPlan
    segments: list[tuple[Key, SegmentGraph]]
    weights: Mapping[str, tuple[TensorSpec, Callable[[], Tensor]]]

    def with_names(self, renamed: Mapping[str, str]) -> Part:
        """Return the part with other names of weights."""
        if not renamed:
            return self

        def new(name: str) -> str:
            return renamed.get(name, name)

        phases = {}
        for phase, schedule in self.plan.phases.items():
            faces = {
                s: dataclasses.replace(f, weights=tuple(map(new, f.weights))) for s, f in schedule.segments.items()
            }
            phases[phase] = dataclasses.replace(schedule, segments=faces)
        report = dataclasses.replace(
            self.plan.report, joined={new(n): parts for n, parts in self.plan.report.joined.items()}
        )
        plan = dataclasses.replace(
            self.plan, phases=phases, report=report, weights={new(n): s for n, s in self.plan.weights.items()}
        )
        segments = [
            (key, dataclasses.replace(g, weights=tuple((new(n), s) for n, s in g.weights))) for key, g in self.segments
        ]
        return Part(plan, segments, {new(n): w for n, w in self.weights.items()})

    def with_engines(self, files: Mapping[Key, str]) -> ExecutionPlan:
        """Return the plan with engine files in place of rank classes."""
        phases = {}
        for name, phase in self.plan.phases.items():
            segments = {
                s: dataclasses.replace(p, engines=tuple(files[name, s, int(e)] for e in p.engines))
                for s, p in phase.segments.items()
            }
            phases[name] = dataclasses.replace(phase, segments=segments)
        return dataclasses.replace(self.plan, phases=phases)


def save_programs(
    path: Path, programs: Sequence[Program], backend: str | Backend, *, source: str | None,
    config: Mapping[str, Any] | None, collectives: str, progress: Progress | None, made_with: Mapping[str, Any] | None,
    force: bool,
) -> None:  # fmt: skip
    """Write the bundle of ``programs``, the shapes of one model. See :meth:`Program.save`."""
    chosen, first = get_backend(backend), programs[0]
    made_with = made_with or {
        "class": first.captured.model_class, "source": source, "backend": chosen.name, "ranks": first.plan.ranks,
        "collectives": collectives, "options": first.plan.options.to_dict(),
        **({"shapes": [input_shapes(p.plan) for p in programs]} if len(programs) > 1 else {}),
    }  # fmt: skip
    check_replaceable(path, made_with, force)
    shared = SharedWeights()
    parts = [_part(program, chosen, collectives, shared) for program in programs]
    bars = tasks(progress)
    with BundleWriter(path) as writer:
        weights = _write_weights(writer, shared, bars)
        plans = _named(_build(writer, parts, chosen, weights, bars), {})
        check_alike(plans)
        (_, plan), *others = plans.items()
        with bars.task("hashing files", 1.0) as task:
            writer.finish(
                plan, _text(plan), backend=chosen.name, device=chosen.device, source=source,
                model_class=first.captured.model_class, engines=chosen.describe(),
                config=config if config is not None else first.captured.config, progress=_advance(task),
                made_with=made_with, operators=_providers(parts) if chosen.calls_operators else {},
                shapes={name: (other, _text(other)) for name, other in others},
            )  # fmt: skip


def add_programs(
    path: Path, programs: Sequence[Program], backend: str | Backend | None = None, progress: Progress | None = None
) -> list[str]:
    """Add the shapes of ``programs`` to the bundle at ``path``. Return the names of those that it did not have.

    See :meth:`Program.add_to`.
    """
    with held(path):
        bundle = Bundle.open(path, verify="quick")
        there = {shape_key(input_shapes(plan)) for plan in bundle.plans.values()}
        new = [p for p in programs if shape_key(input_shapes(p.plan)) not in there]
        if not new:
            return []
        chosen = _backend_of(bundle, backend)
        old = WeightFile.open(bundle.weights_path)
        shared = SharedWeights(old, bundle.joined, refitted=bool(bundle.manifest.get("refits")))
        parts = [_part(p, chosen, bundle.plan.options.collectives, shared) for p in new]
        bars = tasks(progress)
        with BundleWriter(path) as writer:
            if shared.grown:
                weights = _write_weights(writer, shared, bars)
            else:
                writer.share(WEIGHTS, bundle)
                weights = old
            engines = {n.removeprefix(f"{ENGINES}/") for n in bundle.manifest["files"] if n.startswith(f"{ENGINES}/")}
            plans = _named(_build(writer, parts, chosen, weights, bars, engines), bundle.plans)
            check_alike({**bundle.plans, **plans})
            with bars.task("hashing files", 1.0) as task:
                built = [p.relative_to(writer.folder).as_posix() for p in writer.folder.rglob("*") if p.is_file()]
                share_files(bundle, writer, old, weights, built)
                keep_vae(bundle, writer)
                for name, plan in plans.items():
                    writer.plan(plan, _text(plan), name)
                operators = {n: dataclasses.asdict(p) for n, p in _providers(parts).items()}
                writer.finish_like(
                    bundle, progress=_advance(task), added=[*(bundle.manifest.get("added") or ()), *plans],
                    operators={**bundle.manifest.get("operators", {}), **(operators if chosen.calls_operators else {})},
                )  # fmt: skip
        return list(plans)


def _backend_of(bundle: Bundle, backend: str | Backend | None) -> Backend:
    """Return the backend of a bundle. Raises :class:`BundleError` unless it builds for the same devices."""
    name = str(bundle.manifest["backend"])
    chosen = get_backend(backend or name)
    there, here = bundle.manifest.get("engines"), json.loads(json.dumps(chosen.describe(), default=str))
    if chosen.name != name or there != here:
        raise BundleError(
            f"{bundle.path} was built by {name} {_facts(there)}, and new shapes would be by {chosen.name} "
            f"{_facts(here)}: give the same backend and its options on the same kind of machine, or convert again"
        )
    return chosen


def _facts(described: Mapping[str, Any] | None) -> str:
    return "" if not described else "(" + ", ".join(f"{k} {v}" for k, v in described.items()) + ")"


def _part(program: Program, backend: Backend, collectives: str, shared: SharedWeights) -> Part:
    plan, segments = program.layout(backend, collectives)
    weights = {name: program.captured.weights[name] for name in plan.weights}
    joined = {n: parts for n, parts in plan.report.joined.items() if n in weights}
    part = Part(plan, list(segments), weights)
    return part.with_names(shared.add(weights, joined))


def _build(
    writer: BundleWriter, parts: Sequence[Part], backend: Backend, weights: WeightFile, bars: Progress,
    known: Collection[str] = (),
) -> list[ExecutionPlan]:  # fmt: skip
    """Build the engines of all parts, each distinct one once, and return the plans that name them."""
    segments = [((i, *key), segment) for i, part in enumerate(parts) for key, segment in part.segments]
    with bars.task("building engines", 1.0) as task:
        folder = writer.path(f"{ENGINES}/_").parent
        files = build_segments(backend, segments, weights, folder, _advance(task), known)
    places = [{key: (i, *key) for key, _ in part.segments} for i, part in enumerate(parts)]
    return [
        part.with_engines({key: files[place] for key, place in mine.items()})
        for part, mine in zip(parts, places, strict=True)
    ]


def _named(plans: Iterable[ExecutionPlan], taken: Collection[str]) -> dict[str, ExecutionPlan]:
    named: dict[str, ExecutionPlan] = {}
    for plan in plans:
        named[shape_name(plan, {*taken, *named})] = plan
    return named


def _write_weights(writer: BundleWriter, shared: SharedWeights, bars: Progress) -> WeightFile:
    path = writer.path(WEIGHTS)
    items = [(name, spec, read) for name, (spec, read) in shared.items.items()]
    with bars.task("writing weights", 1.0) as task:
        writer.known(WEIGHTS, WeightFile.write(path, items, _advance(task)))
    return WeightFile.open(path)


def _text(plan: ExecutionPlan) -> str:
    return "\n\n".join(
        [str(Report(plan)), *(f"{phase}\n{phase_text(plan, phase)}" for phase in PHASES if phase in plan.phases)]
    )


def _providers(parts: Iterable[Part]) -> dict[str, Provider]:
    """The operators of other packages in segments, and who declared them."""
    graphs = [segment.graph.graph for part in parts for _, segment in part.segments]
    found = dict.fromkeys(op for graph in graphs for op in foreign_operators(graph))
    return {name_of(op): provider_of(op) for op in found}


def _advance(task: Any) -> Callable[[int, int], None]:
    """Return a callback (done, total) that advances a progress bar of total 1."""
    shown = 0.0

    def update(done: int, total: int) -> None:
        nonlocal shown
        share = done / max(1, total)
        task.advance(max(0.0, share - shown))
        shown = share

    return update
