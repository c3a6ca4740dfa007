"""The plan: what one converted model does at run time, as plain data.

The compiler writes it, the bundle stores it (``plan.json``), the runtime executes it. Nothing here refers to a graph
or to a rule, so that ``runtime/`` needs neither.

Values are named tensors of one call on one rank. A step reads and writes values:

- ``Take(value, source, dim, starts, stops)``: each rank's own rows of an input, which every rank is given whole; a
view.
- ``Run(segment)``: the engine of that segment and rank computes its outputs from its inputs.
- ``Post(collectives)``: starts the transfer of each collective's ``source`` value. Non-blocking.
- ``Wait(collectives)``: each collective's result becomes a value under the collective's own name.
- ``Keep(state, value)``: at the end of the call, ``value`` becomes what the next call reads under the name ``state``.

``Wait`` completes the transfer that was posted last, in this call or in the previous one, and remembers its result;
where nothing is under way it gives the remembered result again. So the exact phase is ``Run, Post, Wait, Run, ...``,
and the displaced phase is ``Wait, Run, Post`` over the same collectives: its first call reads what the last exact
call received.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, PlainValidator, Tag, TypeAdapter, ValidationError

from districompile.errors import BundleError

Phase = Literal["warmup", "steady"]
PHASES: tuple[Phase, ...] = ("warmup", "steady")

_DTYPES: dict[str, torch.dtype] = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
        torch.int8, torch.uint8, torch.bool, torch.complex64,
    )
}  # fmt: skip


_TIMESTEPS = ("timestep", "timesteps", "t", "time", "sigma", "sigmas")


def names_timestep(path: str) -> bool:
    """Whether an input is called what samplers call the time of a step."""
    return path in _TIMESTEPS


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float16`` -> ``"float16"``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """``"float16"`` -> ``torch.float16``; raises :class:`BundleError` for an unknown name."""
    try:
        return _DTYPES[name]
    except KeyError:
        raise BundleError(f"unknown dtype {name!r} in the plan") from None


def _read_dtype(x: object) -> torch.dtype:
    if isinstance(x, torch.dtype):
        return x
    name = x.get("@dtype") if isinstance(x, dict) else None
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"{name!r} is no dtype")
    return _DTYPES[name]


def _class_name(x: object) -> str:
    return str(x.get("@")) if isinstance(x, dict) else type(x).__name__


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: Annotated[torch.dtype, PlainValidator(_read_dtype)]

    @property
    def nbytes(self) -> int:
        n = self.dtype.itemsize
        for s in self.shape:
            n *= s
        return n


@dataclasses.dataclass(frozen=True)
class Piece:
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
    site: str  # the operator it serves, as shown to users: "down_blocks.0.resnets.0.conv1"
    kind: str  # "conv", "attention", "norm", "resize", "output", "fallback", "other": what --displace selects by
    source: str
    dim: int
    specs: tuple[TensorSpec, ...]
    results: tuple[TensorSpec, ...]
    pieces: tuple[Piece, ...]
    fill: float
    pattern: Literal["none", "neighbour", "all_gather", "general"]
    displaced: bool = False  # in the steady phase
    source_rows: tuple[tuple[tuple[int, int], ...], ...] = ()
    result_rows: tuple[tuple[tuple[int, int], ...], ...] = ()

    def sent_bytes(self, rank: int) -> int:
        """Bytes that ``rank`` sends to other ranks in one call."""
        spec = self.specs[rank]
        row = spec.nbytes // max(1, spec.shape[self.dim])
        return sum(p.rows for p in self.pieces if p.src == rank and p.dst != rank) * row


@dataclasses.dataclass(frozen=True)
class Reduction:
    """An all-reduce of ``source`` over the ranks: ``op`` is ``"sum"``, ``"max"`` or ``"min"``. All ranks get bitwise
    the same result: contributions are combined in rank order."""

    name: str
    site: str
    kind: str
    source: str
    op: Literal["sum", "max", "min"]
    specs: tuple[TensorSpec, ...]
    displaced: bool = False

    @property
    def results(self) -> tuple[TensorSpec, ...]:
        return self.specs

    def sent_bytes(self, rank: int) -> int:
        return self.specs[rank].nbytes * (len(self.specs) - 1)


Collective = Annotated[
    Annotated[Exchange, Tag("Exchange")] | Annotated[Reduction, Tag("Reduction")], Discriminator(_class_name)
]


@dataclasses.dataclass(frozen=True)
class Take:
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


@dataclasses.dataclass(frozen=True)
class Run:
    segment: str


@dataclasses.dataclass(frozen=True)
class Post:
    collectives: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Wait:
    collectives: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Keep:
    state: str
    value: str


@dataclasses.dataclass(frozen=True)
class Deliver:
    """An engine with collectives inside gave the results of ``collectives`` as values of their names: from here on they
    are what a ``Wait`` gives."""

    collectives: tuple[str, ...]


Step = Annotated[
    Annotated[Take, Tag("Take")]
    | Annotated[Run, Tag("Run")]
    | Annotated[Post, Tag("Post")]
    | Annotated[Wait, Tag("Wait")]
    | Annotated[Keep, Tag("Keep")]
    | Annotated[Deliver, Tag("Deliver")],
    Discriminator(_class_name),
]


@dataclasses.dataclass(frozen=True)
class SegmentPlan:
    """A segment's interface: value names in order, and its engine for each rank (a content hash; equal for equal
    ranks)."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...]
    engines: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class PhasePlan:
    """The steps of one phase; ``outputs`` are the values that make up the module's output leaves, in order, and
    ``values`` what each output of a segment is on each rank."""

    steps: tuple[Step, ...]
    segments: dict[str, SegmentPlan]
    outputs: tuple[str, ...]
    values: dict[str, tuple[TensorSpec, ...]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def waited_before_posted(self) -> frozenset[str]:
        """Collectives whose ``Wait`` in this phase may read what an earlier call received."""
        posted: set[str] = set()
        early: set[str] = set()
        for step in self.steps:
            if isinstance(step, Post):
                posted.update(step.collectives)
            elif isinstance(step, Wait):
                early.update(n for n in step.collectives if n not in posted)
        return frozenset(early)


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """One tensor of the module's signature. ``path`` is where it is passed ("sample", "added_cond_kwargs.time_ids",
    "residuals.0"); every rank is given the whole tensor. ``rows`` is the dim that is cut, if any."""

    path: str
    value: str
    spec: TensorSpec
    rows: int | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything the runtime needs besides the engines and the weights."""

    ranks: int  # on the mesh's patch axis
    inputs: tuple[InputSpec, ...]
    constants: dict[str, Any]  # path -> the baked value (None, bool, int, float, str) of each non-tensor input
    signature: tuple[str, ...]  # parameter names of forward, in order
    output: Any  # JSON description of the output structure: see districompile/structure.py
    collectives: dict[str, Collective]
    phases: dict[str, PhasePlan]
    weights: dict[str, TensorSpec]
    bounds: dict[str, tuple[int, ...]]  # rows of the image (as a string) -> where they are cut
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # cfg, groupnorm, warmup_steps, displace, ...
    report: dict[str, Any] = dataclasses.field(default_factory=dict)  # fallbacks, FLOPs, per-site figures

    def to_json(self) -> str:
        return json.dumps(_encode(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read what :meth:`to_json` wrote. Raise :class:`BundleError` for a field that is missing, unknown or of
        another type. Whether the values fit each other is checked by :func:`districompile.ir.validate.validate`."""
        try:
            _check_fields(json.loads(text))
            plan = _adapter().validate_json(text, strict=True)
        except ValidationError as e:
            first = e.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise BundleError(f"plan.json cannot be read: {where}: {first['msg']}") from None
        except (ValueError, RecursionError) as e:
            raise BundleError(f"plan.json cannot be read: {e}") from None
        return dataclasses.replace(
            plan, output=_frozen(plan.output), options=_frozen(plan.options), report=_frozen(plan.report)
        )


@functools.cache
def _adapter() -> TypeAdapter[Plan]:
    return TypeAdapter(Plan)


_CLASSES: dict[str, type[Any]] = {
    c.__name__: c
    for c in (
        TensorSpec,
        Piece,
        Exchange,
        Reduction,
        Take,
        Run,
        Post,
        Wait,
        Keep,
        Deliver,
        SegmentPlan,
        PhasePlan,
        InputSpec,
        Plan,
    )
}


def _encode(x: Any) -> Any:
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        fields = {f.name: _encode(getattr(x, f.name)) for f in dataclasses.fields(x)}
        return {"@": type(x).__name__, **fields}
    if isinstance(x, torch.dtype):
        return {"@dtype": dtype_name(x)}
    if isinstance(x, Mapping):
        return {str(k): _encode(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_encode(v) for v in x]
    return x


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
    for v in x.values():
        _check_fields(v)


def _frozen(x: Any) -> Any:
    """Lists as tuples."""
    if isinstance(x, dict):
        return {k: _frozen(v) for k, v in x.items()}
    return tuple(_frozen(v) for v in x) if isinstance(x, list) else x
