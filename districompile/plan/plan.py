# SPDX-License-Identifier: Apache-2.0
"""The plan: what one converted model does at run time, as plain data.

The compiler writes it, the bundle stores it (``plan.json``), the runtime executes it. Nothing here refers to a graph
or to a rule, so that ``runtime/`` needs neither.

Values are named tensors of one call on one rank. A step reads and writes values:

- ``SliceInput(value, source, dim, starts, stops)``: each rank's own rows of an input, which every rank is given whole.
- ``Run(segment)``: the engine of that segment and rank computes its outputs from its inputs.
- ``Start(collectives)``: starts the transfer of each collective's ``source`` value. Non-blocking.
- ``Wait(collectives)``: each collective's result becomes a value under the collective's own name.
- ``SaveState(state, value)``: at the end of the call, ``value`` becomes what the next call reads under the name
  ``state``.

``step.reads(schedule, collectives)`` and ``step.writes(schedule, collectives)`` name the values of the call that a step
reads and writes, given its schedule and the plan's collectives.

``Wait`` completes the transfer that was posted last, in this call or in the previous one, and remembers its result;
where nothing is under way it gives the remembered result again. So the exact phase is ``Run, Start, Wait, Run, ...``,
and the displaced phase is ``Wait, Run, Start`` over the same collectives: its first call reads what the last exact
call received.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag, TypeAdapter, ValidationError

from districompile.errors import BundleError
from districompile.ir.report_builder import Fallback, Flops, Kept, QuantisedLayer, Reuse, Tokens
from districompile.ir.spec import InputSpec, TensorSpec, usual_timestep
from districompile.plan.encode import encoded, frozen
from districompile.plan.options import PlanOptions
from districompile.plan.plan_report import PassRecord, PlanReport, QualitySearch, QualityTrial


def _class_name(x: object) -> str:
    return str(x.get("@")) if isinstance(x, dict) else type(x).__name__


@dataclasses.dataclass(frozen=True)
class RowSlice:
    """Rows that one rank sends to another: ``rows`` rows from row ``start`` of the sender's source value, put at row
    ``at`` of the receiver's result."""

    src: int
    dst: int
    start: int
    at: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A row exchange. Rank r contributes ``source`` (``specs[r]``) and receives a tensor of ``results[r]``, assembled
    from ``pieces`` along ``dim``; rows that no piece covers hold ``fill``. ``pattern`` says what the pieces amount
    to. ``source_rows[r]`` and ``result_rows[r]`` say which rows of the whole image these are, as runs (first, count)
    in order, ``first`` being -1 for rows outside of it: pieces are checked against them."""

    name: str
    module_path: str  # the operator it serves, as shown to users: "down_blocks.0.resnets.0.conv1"
    purpose: str  # "conv", "attention", "norm", "resize", "output", "fallback", "other": what --displace selects by
    source: str
    dim: int
    specs: tuple[TensorSpec, ...]
    results: tuple[TensorSpec, ...]
    pieces: tuple[RowSlice, ...]
    fill: float
    pattern: Literal["none", "neighbour", "all_gather", "general"]
    displaced: bool = False  # in the displaced phase
    source_rows: tuple[tuple[tuple[int, int], ...], ...] = ()
    result_rows: tuple[tuple[tuple[int, int], ...], ...] = ()

    def sent_bytes(self, rank: int) -> int:
        """Bytes that ``rank`` sends to other ranks in one call."""
        return sum(self.bytes_between(rank, other) for other in range(len(self.specs)) if other != rank)

    def bytes_between(self, src: int, dst: int) -> int:
        """Bytes that rank ``src`` sends to rank ``dst``, another one, in one call."""
        row = self.specs[src].nbytes // max(1, self.specs[src].shape[self.dim])
        return sum(p.rows for p in self.pieces if (p.src, p.dst) == (src, dst)) * row


@dataclasses.dataclass(frozen=True)
class Reduction:
    """An all-reduce of ``source`` over the ranks: ``op`` is ``"sum"``, ``"max"`` or ``"min"``. All ranks get bitwise
    the same result: contributions are combined in rank order."""

    name: str
    module_path: str
    purpose: str
    source: str
    op: Literal["sum", "max", "min"]
    specs: tuple[TensorSpec, ...]
    displaced: bool = False

    @property
    def results(self) -> tuple[TensorSpec, ...]:
        return self.specs

    def sent_bytes(self, rank: int) -> int:
        return self.specs[rank].nbytes * (len(self.specs) - 1)

    def bytes_between(self, src: int, dst: int) -> int:
        """Bytes that rank ``src`` sends to rank ``dst``, another one, in one call."""
        return self.specs[src].nbytes


Collective = Annotated[
    Annotated[Exchange, Tag("Exchange")] | Annotated[Reduction, Tag("Reduction")], Discriminator(_class_name)
]


@dataclasses.dataclass(frozen=True)
class SliceInput:
    """``value`` = rows [starts[r], stops[r]) of ``source``, after ``above`` and ``below`` rows of ``fill`` were added
    to it."""

    value: str
    source: str
    dim: int
    starts: tuple[int, ...]
    stops: tuple[int, ...]
    above: int = 0
    below: int = 0
    fill: float = 0.0

    def reads(self, schedule: Schedule, collectives: Mapping[str, Collective]) -> tuple[str, ...]:
        return (self.source,)

    def writes(self, schedule: Schedule, collectives: Mapping[str, Collective]) -> tuple[str, ...]:
        return (self.value,)


@dataclasses.dataclass(frozen=True)
class Run:
    """Run the engine of a segment. It may also read states, by their names."""

    segment: str

    def reads(self, schedule: Schedule, collectives: Mapping[str, Collective]) -> tuple[str, ...]:
        return schedule.segments[self.segment].inputs

    def writes(self, schedule: Schedule, collectives: Mapping[str, Collective]) -> tuple[str, ...]:
        return schedule.segments[self.segment].outputs


@dataclasses.dataclass(frozen=True)
class Start:
    """Start the transfer of each collective's source. The transfers travel together."""

    collectives: tuple[str, ...]

    def reads(self, schedule: Schedule, collectives: Mapping[str, Collective]) -> tuple[str, ...]:
        return tuple(collectives[name].source for name in self.collectives)

    def writes(self, schedule: Schedule, collectives: Mapping[str, Collective]) -> tuple[str, ...]:
        return ()


@dataclasses.dataclass(frozen=True)
class Wait:
    """Complete the latest transfer of each collective. Its result becomes the value of that name."""

    collectives: tuple[str, ...]

    def reads(self, schedule: Schedule, collectives: Mapping[str, Collective]) -> tuple[str, ...]:
        return ()

    def writes(self, schedule: Schedule, collectives: Mapping[str, Collective]) -> tuple[str, ...]:
        return self.collectives


@dataclasses.dataclass(frozen=True)
class SaveState:
    """Keep ``value`` for the next call, under the name ``state``. It writes no value of its own call."""

    state: str
    value: str

    def reads(self, schedule: Schedule, collectives: Mapping[str, Collective]) -> tuple[str, ...]:
        return (self.value,)

    def writes(self, schedule: Schedule, collectives: Mapping[str, Collective]) -> tuple[str, ...]:
        return ()


@dataclasses.dataclass(frozen=True)
class Publish:
    """Take values that an engine made for what was received of the collectives of their names. Later ``Wait`` steps
    give these. Only plans with collectives inside of engines have this step."""

    collectives: tuple[str, ...]

    def reads(self, schedule: Schedule, collectives: Mapping[str, Collective]) -> tuple[str, ...]:
        return self.collectives

    def writes(self, schedule: Schedule, collectives: Mapping[str, Collective]) -> tuple[str, ...]:
        return ()


@dataclasses.dataclass(frozen=True)
class Clear:
    """Set what was received of the collectives to zero. Later ``Wait`` steps give that, until more is received."""

    collectives: tuple[str, ...]

    def reads(self, schedule: Schedule, collectives: Mapping[str, Collective]) -> tuple[str, ...]:
        return ()

    def writes(self, schedule: Schedule, collectives: Mapping[str, Collective]) -> tuple[str, ...]:
        return ()


Step = Annotated[
    Annotated[SliceInput, Tag("SliceInput")]
    | Annotated[Run, Tag("Run")]
    | Annotated[Start, Tag("Start")]
    | Annotated[Wait, Tag("Wait")]
    | Annotated[SaveState, Tag("SaveState")]
    | Annotated[Publish, Tag("Publish")]
    | Annotated[Clear, Tag("Clear")],
    Discriminator(_class_name),
]


@dataclasses.dataclass(frozen=True)
class SegmentInterface:
    """A segment's interface: value names in order, and its engine for each rank (a content hash; equal for equal
    ranks)."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...]
    engines: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The steps of one phase. ``outputs`` are the values that make up the module's output leaves, in order. ``values``
    has the shape and dtype of each output of a segment, by rank."""

    steps: tuple[Step, ...]
    segments: dict[str, SegmentInterface]
    outputs: tuple[str, ...]
    values: dict[str, tuple[TensorSpec, ...]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def waited_before_posted(self) -> frozenset[str]:
        """Collectives whose ``Wait`` in this phase may read what an earlier call received."""
        posted: set[str] = set()
        early: set[str] = set()
        for step in self.steps:
            if isinstance(step, Start):
                posted.update(step.collectives)
            elif isinstance(step, Wait):
                early.update(n for n in step.collectives if n not in posted)
        return frozenset(early)


@dataclasses.dataclass(frozen=True)
class ExecutionPlan:
    """Everything the runtime needs besides the engines and the weights."""

    ranks: int  # on the mesh's patch axis
    inputs: tuple[InputSpec, ...]
    constants: dict[str, Any]  # path -> the baked value (None, bool, int, float, str) of each non-tensor input
    signature: tuple[str, ...]  # parameter names of forward, in order
    output: Any  # JSON description of the output structure: see districompile/frontend/call_tree.py
    collectives: dict[str, Collective]
    phases: dict[str, Schedule]
    weights: dict[str, TensorSpec]
    bounds: dict[str, tuple[int, ...]]  # rows of the image (as a string) -> where they are cut
    options: PlanOptions = dataclasses.field(default_factory=PlanOptions)
    report: PlanReport = dataclasses.field(default_factory=PlanReport)

    @property
    def guidance_halves(self) -> int:
        """The number of parts that guidance cuts the batch into: 2 where the mesh has a ``cfg`` axis, else 1."""
        return 2 if self.options.cfg == "split" else 1

    @property
    def world_size(self) -> int:
        """The number of processes that share one image."""
        return self.ranks * self.guidance_halves

    @property
    def timestep_path(self) -> str | None:
        """The input that differs between the steps of a sampler: the one of ``options``, or one with a usual name."""
        paths = [i.path for i in self.inputs if i.rows is None]
        named = self.options.timestep
        return named if named in paths else usual_timestep(paths)

    def is_halved(self, spec: InputSpec) -> bool:
        """Whether callers pass an input with both guidance halves on dim 0, of which a rank sees one.

        ``cfg_inputs`` of ``options`` lists their paths. Without it they are the inputs with the batch of a cut input.
        """
        if self.guidance_halves == 1:
            return False
        listed = self.options.cfg_inputs
        if listed is not None:
            return spec.path in listed
        batches = {i.spec.shape[0] for i in self.inputs if i.rows is not None}
        return len(spec.spec.shape) > 0 and spec.spec.shape[0] in batches

    def called_spec(self, spec: InputSpec) -> TensorSpec:
        """The tensor that callers pass for an input: with both guidance halves where it is halved."""
        if not self.is_halved(spec):
            return spec.spec
        return TensorSpec((2 * spec.spec.shape[0], *spec.spec.shape[1:]), spec.spec.dtype)

    def to_json(self) -> str:
        return json.dumps(encoded(self), indent=1)

    @staticmethod
    def from_json(text: str) -> ExecutionPlan:
        """Read what :meth:`to_json` wrote. Raise :class:`BundleError` for a field that is missing, unknown or of
        another type. Whether the values fit each other is checked by :func:`districompile.plan.validate.validate`."""
        try:
            _check_fields(json.loads(text))
            plan = _adapter().validate_json(text, strict=True)
        except ValidationError as e:
            first = e.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise BundleError(f"plan.json cannot be read: {where}: {first['msg']}") from None
        except (ValueError, RecursionError) as e:
            raise BundleError(f"plan.json cannot be read: {e}") from None
        return dataclasses.replace(plan, output=frozen(plan.output))


@functools.cache
def _adapter() -> TypeAdapter[ExecutionPlan]:
    return TypeAdapter(ExecutionPlan)


_CLASSES: dict[str, type[Any]] = {
    c.__name__: c
    for c in (
        TensorSpec,
        RowSlice,
        Exchange,
        Reduction,
        SliceInput,
        Run,
        Start,
        Wait,
        SaveState,
        Publish,
        Clear,
        SegmentInterface,
        Schedule,
        InputSpec,
        PlanOptions,
        Fallback,
        QuantisedLayer,
        Flops,
        Tokens,
        Kept,
        Reuse,
        PassRecord,
        QualitySearch,
        QualityTrial,
        PlanReport,
        ExecutionPlan,
    )
}


def _check_fields(x: Any) -> None:
    """Raise ``ValueError`` unless every object has all fields of its class, also those with a default, and no other:
    a misspelt field must not become a default."""
    if isinstance(x, list):
        for v in x:
            _check_fields(v)
    if not isinstance(x, dict):
        return
    if "@" in x:
        cls = _CLASSES.get(x["@"]) if isinstance(x["@"], str) else None
        if cls is None:
            raise ValueError(f"there is no class {x['@']!r}")
        odd = {f.name for f in dataclasses.fields(cls)} ^ (x.keys() - {"@"})
        if odd:
            raise ValueError(f"a {cls.__name__} lacks or has too much: {min(odd)!r}")
        if cls is ExecutionPlan:  # all of their fields have defaults
            for name, kept in (("options", PlanOptions), ("report", PlanReport)):
                if not isinstance(x[name], dict) or x[name].get("@") != kept.__name__:
                    raise ValueError(f"{name} is not a {kept.__name__}")
    for v in x.values():
        _check_fields(v)
