# SPDX-License-Identifier: Apache-2.0
"""Check that the values of a plan fit each other, so that running it cannot fail or compute something else.

The types of the fields are checked where the plan is read (:meth:`districompile.plan.plan.ExecutionPlan.from_json`).
Weights are compared with the weight file, and segments with their engines, where those are loaded
(:mod:`districompile.runtime.interface`).
"""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from typing_extensions import assert_never

from districompile.errors import BundleError
from districompile.ir.spec import PHASES, TensorSpec
from districompile.plan.options import check_options
from districompile.plan.plan import (
    Clear,
    Collective,
    Exchange,
    ExecutionPlan,
    Publish,
    Reduction,
    Run,
    SaveState,
    Schedule,
    SegmentInterface,
    SliceInput,
    Start,
    Wait,
)
from districompile.plan.plan_report import check_report

Specs = tuple[TensorSpec, ...]  # by rank

_MOST_RANKS = 4096
_MOST_BYTES = 1 << 48
_MOST_ROWS = 1 << 24
_PARAMETER = re.compile(r"\*{0,2}[^\W\d]\w*")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


def validate(plan: ExecutionPlan) -> None:
    """Raise :class:`BundleError`, with one line that names the value, for a plan that is not consistent."""
    _need(1 <= plan.ranks <= _MOST_RANKS, f"ranks is {plan.ranks}")
    check_options(plan.options, plan.ranks, plan.inputs)
    check_report(plan.report, plan.weights)
    _check_interface(plan)
    for name, spec in plan.weights.items():
        _check_spec(f"the weight {name}", spec)
    for rows, bounds in plan.bounds.items():
        ordered = all(a <= b for a, b in itertools.pairwise(bounds))
        fits = len(bounds) == plan.ranks + 1 and bounds[0] == 0 and str(bounds[-1]) == rows and ordered
        _need(fits, f"{rows} rows cannot be cut at {list(bounds)} for {plan.ranks} ranks")
    for name, collective in plan.collectives.items():
        _need(name == collective.name, f"the collective {name} calls itself {collective.name}")
        _check_collective(plan, collective)
    complete = tuple(p for p in PHASES if p in plan.phases) in (PHASES[:1], PHASES[:2], PHASES)
    complete = complete and len(plan.phases) == sum(p in PHASES for p in plan.phases)
    _need(("reused" in plan.phases) == (plan.options.reuse is not None), "the reused phase fits not the option reuse")
    _need(complete, f"the phases are {', '.join(plan.phases) or 'missing'}")
    checked: dict[str, _Phase] = {name: _Phase(plan, name) for name in PHASES if name in plan.phases}
    for phase in checked.values():
        phase.check()
    _check_phases_together(plan, checked)


def value_specs(plan: ExecutionPlan, phase: str) -> dict[str, Specs]:
    """Return the specs on each rank of every value that a step of ``phase`` can read, states included."""
    checked: dict[str, _Phase] = {name: _Phase(plan, name) for name in PHASES if name in plan.phases}
    for each in checked.values():
        each.check()
    states = {state: specs for each in checked.values() for state, specs in each.kept.items()}
    return {**states, **checked[phase].values}


def _need(holds: bool, problem: str) -> None:
    if not holds:
        raise BundleError(f"the plan does not hold together: {problem}")


def _check_spec(what: str, spec: TensorSpec) -> None:
    _need(all(0 <= n < _MOST_BYTES for n in spec.shape) and len(spec.shape) <= 64, f"{what} has shape {spec.shape}")
    _need(spec.nbytes < _MOST_BYTES, f"{what} would take {spec.nbytes} bytes")


def _check_specs(plan: ExecutionPlan, what: str, specs: Specs) -> None:
    _need(len(specs) == plan.ranks, f"{what} is described for {len(specs)} ranks of {plan.ranks}")
    for spec in specs:
        _check_spec(what, spec)
    same = {(spec.dtype, len(spec.shape)) for spec in specs}
    _need(len(same) == 1, f"{what} has another dtype or number of dims on another rank")


def _check_interface(plan: ExecutionPlan) -> None:
    """Check inputs, signature, constants and the structure of the output."""
    names = [n.lstrip("*") for n in plan.signature]
    _need(all(map(_PARAMETER.fullmatch, plan.signature)) and _unique(names), f"the signature is {plan.signature}")
    paths = sorted(f"{path}." for path in (*(i.path for i in plan.inputs), *plan.constants))
    inside = next((a for a, b in itertools.pairwise(paths) if b.startswith(a)), None)
    _need(inside is None, f"another input or constant has the path of {str(inside)[:-1]}, or one inside of it")
    _need(_unique(i.value for i in plan.inputs), "two inputs have the same value")
    _need(any(i.rows is not None for i in plan.inputs), "no input is cut into rows")
    more = any(n.startswith("**") for n in plan.signature)
    order = []
    for spec in plan.inputs:
        _check_spec(spec.path, spec.spec)
        _need(spec.rows is None or 0 <= spec.rows < len(spec.spec.shape), f"{spec.path} has no dim {spec.rows}")
        parameter = spec.path.partition(".")[0]
        _need(more or parameter in names, f"the input {spec.path} is no parameter of {', '.join(names)}")
        order.append(names.index(parameter) if parameter in names else len(names))
    _need(order == sorted(order), "the inputs are in another order than the parameters")
    for path, value in plan.constants.items():
        _need(value is None or isinstance(value, bool | int | float | str), f"the constant {path} is {value!r}")
    leaves = list(_leaves(plan.output, "output"))
    _need(leaves == list(range(len(leaves))), f"the leaves of the output are numbered {leaves}")
    for name, phase in plan.phases.items():
        _need(len(phase.outputs) == len(leaves), f"{name} gives {len(phase.outputs)} of {len(leaves)} outputs")


_KINDS = {
    "leaf": {"index"},
    "constant": {"value"},
    "object": {"class", "items"},
    "dict": {"items"},
    "list": {"items"},
    "tuple": {"items"},
}


def _leaves(x: Any, where: str) -> Iterable[int]:
    """Yield the numbers of the leaves of a description (see :mod:`districompile.frontend.call_tree`), in order."""
    kind = x.get("kind") if isinstance(x, Mapping) else None
    _need(isinstance(kind, str) and kind in _KINDS, f"{where} is of the kind {kind!r}")
    _need(x.keys() == {"kind", *_KINDS[str(kind)]}, f"{where}, a {kind}, has the keys {', '.join(map(str, x))}")
    if kind == "leaf":
        _need(type(x["index"]) is int, f"{where} has the index {x['index']!r}")
        yield x["index"]
    elif kind == "constant":
        plain = x["value"] is None or isinstance(x["value"], bool | int | float | str)
        _need(plain, f"{where} is the constant {x['value']!r}")
    else:
        items = x["items"]
        _need(isinstance(items, tuple), f"{where} has the items {items!r}")
        if kind in ("object", "dict"):
            pairs = all(isinstance(i, tuple) and len(i) == 2 and isinstance(i[0], str | int) for i in items)
            _need(pairs and _unique(i[0] for i in items), f"{where} has other items than names with values")
            _need(kind == "dict" or isinstance(x["class"], str), f"{where} has the class {x.get('class')!r}")
        named = items if kind in ("object", "dict") else enumerate(items)
        for name, item in named:
            yield from _leaves(item, f"{where}.{name}")


def _unique(names: Iterable[object]) -> bool:
    return all(count == 1 for count in collections.Counter(names).values())


def _check_collective(plan: ExecutionPlan, c: Collective) -> None:
    _check_specs(plan, c.name, c.specs)
    if isinstance(c, Reduction):
        _need(len(set(c.specs)) == 1, f"{c.name} reduces tensors of different shapes")
        return
    _check_specs(plan, c.name, c.results)
    _need(0 <= c.dim < len(c.specs[0].shape), f"{c.name} has no dim {c.dim}")
    others = {(s.dtype, *s.shape[: c.dim], None, *s.shape[c.dim + 1 :]) for s in (*c.specs, *c.results)}
    _need(len(others) == 1, f"{c.name} sends and receives tensors that differ not in rows alone")
    _need(c.fill == c.fill, f"{c.name} fills with NaN")
    taken: list[list[range]] = [[] for _ in range(plan.ranks)]
    for p in c.pieces:
        _need(0 <= p.src < plan.ranks and 0 <= p.dst < plan.ranks, f"{c.name} goes from rank {p.src} to {p.dst}")
        sent, received = c.specs[p.src].shape[c.dim], c.results[p.dst].shape[c.dim]
        _need(p.rows >= 1, f"{c.name} sends {p.rows} rows")
        _need(0 <= p.start <= sent - p.rows, f"{c.name} sends rows from {p.start} on that rank {p.src} does not have")
        _need(0 <= p.at <= received - p.rows, f"{c.name} puts rows at {p.at} that rank {p.dst} has no room for")
        taken[p.dst].append(range(p.at, p.at + p.rows))
    for dst, parts in enumerate(taken):
        parts.sort(key=lambda part: part.start)
        apart = all(a.stop <= b.start for a, b in itertools.pairwise(parts))
        _need(apart, f"{c.name} puts rows of two ranks at one place on rank {dst}")
    if c.source_rows or c.result_rows:
        _check_rows(plan, c)


def _check_rows(plan: ExecutionPlan, c: Exchange) -> None:
    """Check that the pieces transfer each row of the image to its place in the result, and nothing else."""
    sources = _rows_of(plan, c, c.source_rows, c.specs)
    results = _rows_of(plan, c, c.result_rows, c.results)
    found = [np.full_like(rows, -1) for rows in results]
    for p in c.pieces:
        found[p.dst][p.at : p.at + p.rows] = sources[p.src][p.start : p.start + p.rows]
    for rank, (rows, wanted) in enumerate(zip(found, results, strict=True)):
        _need(np.array_equal(rows, wanted), f"{c.name} gives rank {rank} other rows of the image than it should")


def _rows_of(
    plan: ExecutionPlan, c: Exchange, runs: tuple[tuple[tuple[int, int], ...], ...], specs: Specs
) -> list[np.ndarray[Any, Any]]:
    _need(len(runs) == plan.ranks, f"{c.name} names the rows of {len(runs)} ranks")
    found = []
    for by_rank, spec in zip(runs, specs, strict=True):
        fits = all(first >= -1 and 0 < count <= _MOST_ROWS and first <= _MOST_BYTES for first, count in by_rank)
        _need(fits and sum(n for _, n in by_rank) == spec.shape[c.dim], f"{c.name} names other rows than it has")
        parts = [np.full(n, -1) if first < 0 else np.arange(first, first + n) for first, n in by_rank]
        found.append(np.concatenate([np.empty(0, dtype=np.int64), *parts]))
    return found


class _Phase:
    """A check of one phase, step by step. ``values`` are the specs of all values, ``kept`` those of saved states."""

    def __init__(self, plan: ExecutionPlan, name: str) -> None:
        self.plan, self.name = plan, name
        self.phase: Schedule = plan.phases[name]
        self.values: dict[str, Specs] = {i.value: (i.spec,) * plan.ranks for i in plan.inputs}
        self.kept: dict[str, Specs] = {}
        self.states: set[str] = {s.state for p in plan.phases.values() for s in p.steps if isinstance(s, SaveState)}
        self.recalled: set[str] = set()
        self.posted: list[str] = []
        self.waited: list[str] = []
        self.early: set[str] = set()
        self.delivered: list[str] = []
        self._ran: set[str] = set()

    def check(self) -> None:
        for key, segment in self.phase.segments.items():
            self._check_segment(key, segment)
        for value, specs in self.phase.values.items():
            _check_specs(self.plan, value, specs)
        made = {v for s in self.phase.segments.values() for v in s.outputs}
        self._need(made == self.phase.values.keys(), "it describes other values than its segments give")
        for step in self.phase.steps:
            if isinstance(step, SliceInput):
                self._take(step)
            elif isinstance(step, Run):
                self._run(step)
            elif isinstance(step, Start):
                self._post(step)
            elif isinstance(step, Wait):
                self._wait(step)
            elif isinstance(step, Publish):
                self._deliver(step)
            elif isinstance(step, Clear):
                self._clear(step)
            elif isinstance(step, SaveState):
                self._keep(step)
            else:
                assert_never(step)
        self._need(self._ran == self.phase.segments.keys(), "a segment is never run")
        for value in self.phase.outputs:
            self._specs(value, "gives the output")
        steps, collectives = self.phase.steps, self.plan.collectives
        read = {*self.phase.outputs, *(v for s in steps for v in s.reads(self.phase, collectives))}
        made = {v for s in steps if not isinstance(s, Wait) for v in s.writes(self.phase, collectives)}
        lost = made - read
        self._need(not lost, f"nothing reads {min(lost, default='')}")

    def _need(self, holds: bool, problem: str) -> None:
        _need(holds, f"{self.name}: {problem}")

    def _specs(self, value: str, what: str) -> Specs:
        self._need(value in self.values, f"{what} {value} before it exists")
        return self.values[value]

    def _define(self, value: str, specs: Specs) -> None:
        self._need(value not in self.values and value not in self.states, f"{value} is made twice")
        self.values[value] = specs

    def _collective(self, name: str) -> Collective:
        self._need(name in self.plan.collectives, f"there is no collective {name}")
        return self.plan.collectives[name]

    def _check_segment(self, key: str, s: SegmentInterface) -> None:
        self._need(key == s.name, f"the segment {key} calls itself {s.name}")
        unique = _unique(s.inputs) and _unique(s.outputs) and _unique(s.weights) and bool(s.outputs)
        self._need(unique, f"the segment {key} names an input, output or weight twice, or no output")
        unknown = {*s.weights} - {*self.plan.weights}
        self._need(not unknown, f"the segment {key} needs the unknown weight {min(unknown, default='')}")
        self._need(len(s.engines) == self.plan.ranks, f"the segment {key} has {len(s.engines)} engines")
        for engine in s.engines:
            self._need(_FILE.fullmatch(engine) is not None, f"the segment {key} has an engine named {engine!r}")

    def _take(self, t: SliceInput) -> None:
        source = {i.value: i for i in self.plan.inputs}.get(t.source)
        # Tokens of an input without rows, such as a text, may be divided, too
        divided = source is not None and source.rows in (None, t.dim) and 0 <= t.dim < len(source.spec.shape)
        self._need(divided, f"{t.value} is taken of {t.source}, no input that is divided in dim {t.dim}")
        specs = self._specs(t.source, "takes rows of")
        ranks, shape = self.plan.ranks, specs[0].shape
        self._need(len(t.starts) == len(t.stops) == ranks, f"{t.value} is taken for other ranks than there are")
        rows = shape[t.dim]
        self._need(0 <= t.above <= rows and 0 <= t.below <= rows, f"{t.value} is padded by {t.above} and {t.below}")
        end = rows + t.above + t.below
        inside = all(0 <= a < b <= end for a, b in zip(t.starts, t.stops, strict=True))
        ordered = all(a <= b for x in (t.starts, t.stops) for a, b in itertools.pairwise(x))
        self._need(inside and ordered, f"{t.value} takes rows {t.starts} to {t.stops} of {end}")
        self._need(t.fill == t.fill, f"{t.value} is padded with NaN")
        sizes = [b - a for a, b in zip(t.starts, t.stops, strict=True)]
        taken = (TensorSpec((*shape[: t.dim], n, *shape[t.dim + 1 :]), specs[0].dtype) for n in sizes)
        self._define(t.value, tuple(taken))

    def _run(self, step: Run) -> None:
        self._need(step.segment in self.phase.segments, f"there is no segment {step.segment}")
        self._need(step.segment not in self._ran, f"the segment {step.segment} runs twice")
        self._ran.add(step.segment)
        segment = self.phase.segments[step.segment]
        for value in segment.inputs:
            if value in self.states:
                self.recalled.add(value)
            else:
                self._specs(value, f"the segment {step.segment} reads")
        for value in segment.outputs:
            if value in self.plan.collectives:  # computed inside of an engine
                c = self.plan.collectives[value]
                same = self.phase.values[value] == c.results
                self._need(same, f"{value} is described in two ways")
            self._define(value, self.phase.values[value])

    def _post(self, step: Start) -> None:
        self._need(bool(step.collectives), "a step posts nothing")
        for name in step.collectives:
            c = self._collective(name)
            self._need(name not in self.posted, f"{name} is posted twice")
            same = self._specs(c.source, f"{name} sends") == c.specs
            self._need(same, f"{name} sends {c.source} as another shape or dtype than it has")
            self.posted.append(name)

    def _wait(self, step: Wait) -> None:
        self._need(bool(step.collectives), "a step waits for nothing")
        for name in step.collectives:
            c = self._collective(name)
            self._need(name not in self.waited, f"{name} is waited for twice")
            if name not in self.posted:
                early = self.name != "exact" and c.displaced
                self._need(early, f"{name} is waited for before it is posted")
                self.early.add(name)
            else:
                self._need(self.name == "exact" or not c.displaced, f"{name} is displaced, and waited for at once")
            self.waited.append(name)
            self._define(name, c.results)

    def _deliver(self, step: Publish) -> None:
        self._need(self.plan.options.collectives == "inside", "an engine delivers what it does not hold")
        for name in step.collectives:
            self._collective(name)
            self._need(name not in self.delivered and name not in self.posted, f"{name} is delivered twice")
            self._specs(name, "delivers")
            self.delivered.append(name)

    def _clear(self, step: Clear) -> None:
        for name in step.collectives:
            self._collective(name)
            once = name not in self.delivered and name not in self.posted and name not in self.waited
            self._need(once, f"{name} is cleared, and received as well")
            self.delivered.append(name)

    def _keep(self, step: SaveState) -> None:
        self._need(step.state not in self.kept, f"the state {step.state} is written twice")
        self.kept[step.state] = self._specs(step.value, f"the state {step.state} keeps")


def _check_phases_together(plan: ExecutionPlan, phases: Mapping[str, _Phase]) -> None:
    """Check that the exact phase leaves all that a phase reads of earlier calls, and reads nothing of them itself."""
    exact, later = phases["exact"], [p for name, p in phases.items() if name != "exact"]
    _need(not exact.recalled, f"exact: {min(exact.recalled, default='')} is read of an earlier call")
    for phase in later:
        lost = phase.recalled - exact.kept.keys()
        _need(not lost, f"exact: it does not keep {min(lost, default='')}")
        lost = phase.early - {*exact.posted, *exact.delivered}
        _need(not lost, f"exact: it does not leave {min(lost, default='')}")
        lost = phase.early - {*phase.posted}
        _need(not lost, f"{phase.name}: it does not send {min(lost, default='')} again")
        for state, specs in phase.kept.items():
            _need(exact.kept.get(state, specs) == specs, f"the state {state} has two shapes")
        for name in phase.posted:
            late = plan.collectives[name].displaced and name not in phase.early
            _need(not late, f"{phase.name}: {name} is displaced, and not read of the call before")
    idle = plan.collectives.keys() - {*exact.values, *(n for p in phases.values() for n in p.posted)}
    _need(not idle, f"nothing posts {min(idle, default='')}")
    _check_outputs(plan, [exact, *later])


def _check_outputs(plan: ExecutionPlan, phases: Sequence[_Phase]) -> None:
    """Check that every rank returns the global output, of the same spec in both phases."""
    for values in zip(*(p.phase.outputs for p in phases), strict=True):
        found = {spec for p, v in zip(phases, values, strict=True) for spec in p.values[v]}
        _need(len(found) == 1, f"the output {values[0]} differs between ranks or phases")
