"""Propagation: the walk over the whole graph that applies rules and builds the local graph.

It runs twice. On one imaginary rank it finds out where the image's rows are in every value (*annotate*); on the real
ranks it cuts (*localise*), with the annotation telling where a value that had to become whole can be cut again.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from districompile.cutter import Cutter, Value, values_in
from districompile.errors import ConvertError
from districompile.flops import flops_of
from districompile.ir.layout import Layout, NotOutermost, Refused
from districompile.ir.ops import ANY_STRIDES
from districompile.ir.walk import replace, source_line
from districompile.registry import find_rule, is_pointwise

aten = torch.ops.aten


@dataclasses.dataclass
class Fallback:
    """An operator computed on gathered inputs: which, why, and the bytes each rank receives for it."""

    node: str
    op: str
    reason: str
    bytes: int
    source: str


@dataclasses.dataclass
class Propagated:
    """The local graph, the layout of every value of the whole graph, and what it cost."""

    graph: fx.Graph
    values: dict[str, Any]
    fallbacks: list[Fallback]
    replicated: list[str]
    flops_cut: float
    flops_whole: float


def propagate(
    graph: fx.Graph, rows: Mapping[str, int], fractions: Sequence[float], fake_mode: FakeTensorMode,
    annotation: Mapping[str, Any] | None = None,
) -> Propagated:  # fmt: skip
    """Localise ``graph`` for ``len(fractions) - 1`` ranks. ``rows``: the cut dim of each placeholder that is cut, by
    name."""
    return _Propagation(graph, rows, fractions, fake_mode, annotation or {}).run()


class _Propagation:
    def __init__(
        self, graph: fx.Graph, rows: Mapping[str, int], fractions: Sequence[float], fake_mode: FakeTensorMode,
        annotation: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.graph, self.rows, self.annotation = graph, rows, annotation
        self.local = fx.Graph()
        self.cut = Cutter(self.local, fractions, fake_mode)
        self.env: dict[fx.Node, Any] = {}
        self.lost: set[fx.Node] = set()  # whole values whose rows an operator on gathered inputs has lost
        self.result = Propagated(self.local, {}, [], [], 0.0, 0.0)

    def run(self) -> Propagated:
        for node in self.graph.nodes:
            self.cut.target = node
            if node.op in ("placeholder", "get_attr"):
                value = self._leaf(node)
            elif node.op == "output":
                self._output(node)
                break
            elif node.op == "call_function":
                value = self._call(node)
            else:
                raise ConvertError(f"node {node.name}: a graph with {node.op} nodes cannot be cut")
            self.env[node] = value
            self.result.values[node.name] = value
        self.cut.target = None
        return self.result

    def _leaf(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            local = self.local.placeholder(node.name)
        else:
            local = self.local.create_node("get_attr", node.target, name=node.name)
        fake = node.meta["val"]
        local.meta.update(local=(fake,) * self.cut.ranks, val=fake)
        value = self.cut.whole_value(local)
        dim = self.rows.get(node.name)
        if dim is None:
            return value
        try:
            bounds = self.cut.bounds(value.shape[dim])
        except Refused:
            return value  # an input of a level with fewer rows than ranks
        return self.cut.take(value, Layout.cut_at(value.shape, dim, bounds))

    def _output(self, node: fx.Node) -> None:
        leaves = []
        for source in node.args[0]:  # type: ignore[union-attr]
            self.cut.target = source if isinstance(source, fx.Node) else node
            x = self.env[source] if isinstance(source, fx.Node) else source
            leaves.append(self.cut.gather(x, kind="output").node if isinstance(x, Value) else x)
        self.local.output(tuple(leaves))

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            return self.env[node.args[0]][node.args[1]]  # type: ignore[index]
        if _draws_numbers(node) and find_rule(node.target) is None:
            raise ConvertError(
                f"{node.target} ({node.name}, {source_line(node)}) draws random numbers inside the model, so ranks "
                "would not compute one image: pass the noise as an input"
            )
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.env[n])
        work = flops_of(node)
        if not any(v.is_cut for v in values_in((args, kwargs))):
            # Whole operands make whole results; only work that *could* be cut counts as lost
            value = self._settle(node, self._plain(node, args, kwargs))
            lost = any(n in self.lost for n in node.all_input_nodes)
            if lost or _has_rows(self.annotation.get(node.name)):
                self.result.flops_whole += work
            if lost and not any(v.is_cut for v in values_in(value)):
                self.lost.add(node)
            return value
        try:
            found = find_rule(node.target)
            if self._too_few_rows(node) and not (found is not None and found.few):
                self.result.replicated.append(node.name)
                self.result.flops_whole += work
                return self._plain(node, *self._gathered(args, kwargs))
            before = len(self.local.nodes)
            value = self._apply(node, args, kwargs)
            whole = self._whole_work(work, before)
            self.result.flops_whole += whole
            self.result.flops_cut += work - whole
            return self._settle(node, value)
        except Refused as refusal:
            # What the rule emitted before it refused is used by nothing: dead code, dropped later
            self.result.flops_whole += work
            return self._fall_back(node, args, kwargs, str(refusal))

    def _whole_work(self, work: float, before: int) -> float:
        """How much of an operator's work every rank does: read off what the ranks do together, beyond doing it once."""
        if not work or self.cut.ranks == 1:
            return 0.0
        made = itertools.islice(reversed(self.local.nodes), len(self.local.nodes) - before)
        done = sum(flops_of(n, r) for n in made for r in range(self.cut.ranks))
        return min(work, max(0.0, (done - work) / (self.cut.ranks - 1)))

    def _apply(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        found = find_rule("pointwise" if find_rule(node.target) is None and is_pointwise(node.target) else node.target)
        if found is None:
            raise Refused("the operator has no rule")
        if not found.mixed:
            args, kwargs = replace((args, kwargs), Value, self.cut.unmixed)
        try:
            try:
                value = found.function(self.cut, *args, **kwargs)
            except NotOutermost:
                args, kwargs = replace((args, kwargs), Value, self.cut.outermost)
                value = found.function(self.cut, *args, **kwargs)
            self._check_shape(node, value)
            return value
        except (
            AssertionError,
            AttributeError,
            LookupError,
            NotImplementedError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as e:
            # Arguments that the rule's author did not foresee: never a reason to refuse the network
            raise Refused(f"the rule failed: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}") from e

    def _check_shape(self, node: fx.Node, value: Any) -> None:
        """A result whose whole has another shape than the operator's is a mistake of its rule."""
        out = node.meta["val"]
        for part, fake in zip(value, out, strict=True) if isinstance(value, tuple) else [(value, out)]:
            if isinstance(part, Value) and isinstance(fake, torch.Tensor) and part.shape != tuple(fake.shape):
                raise ValueError(f"its result is {part.shape}, the operator's {tuple(fake.shape)}")

    def _too_few_rows(self, node: fx.Node) -> bool:
        for layout in _layouts(self.annotation.get(node.name)):
            cut = layout.cut
            if cut is not None:
                try:
                    self.cut.bounds(cut.rows)
                except Refused:
                    return True
        return False

    def _gathered(self, args: Any, kwargs: Any, kind: str = "other") -> tuple[Any, Any]:
        gathered = replace((args, kwargs), Value, lambda v: self.cut.gather(v, kind=kind))
        return gathered[0], gathered[1]

    def _fall_back(self, node: fx.Node, args: Any, kwargs: Any, reason: str) -> Any:
        cut_values = [v for v in values_in((args, kwargs)) if v.is_cut]
        size = sum(v.dtype.itemsize * math.prod(v.shape) for v in cut_values)
        self.result.fallbacks.append(Fallback(node.name, str(node.target), reason, size, source_line(node)))
        value = self._plain(node, *self._gathered(args, kwargs, "fallback"))
        if node.name in self.annotation:
            value = self._settle(node, value)
        else:
            value = (
                tuple(self._guess(v, cut_values) for v in value)
                if isinstance(value, tuple)
                else (self._guess(value, cut_values))
            )
        if not any(v.is_cut for v in values_in(value)):
            self.lost.add(node)
        return value

    def _guess(self, value: Any, cut_values: list[Value]) -> Any:
        """A whole result of an operator that no rule follows, cut again where its rows seem to be: where an operand has
        them, counted from the front or from the back, or else in any dim as long. A wrong guess is slow, never
        wrong."""
        if not isinstance(value, Value):
            return value
        for v in sorted(cut_values, key=lambda v: v.shape != value.shape):
            dim = v.cut_dim
            assert dim is not None
            size = v.shape[dim]
            for d in (dim, dim + value.ndim - v.ndim, *range(value.ndim)):
                if 0 <= d < value.ndim and value.shape[d] == size > 1:
                    return self.cut.take(value, Layout.whole(value.shape).with_dim(d, v.layout.dims[dim]))
        return value

    def _plain(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.target is aten.as_strided.default:
            args = (self._as_it_lay(node, args[0]), *args[1:])
        local = self.cut.emit(ANY_STRIDES.get(node.target, node.target), *args, **kwargs)
        return self._wrap(local, local.meta["local"])

    def _as_it_lay(self, node: fx.Node, x: Any) -> Any:
        """The operand of an operator that reads memory by strides, laid out in memory as in the original."""
        source: Any = node.args[0]
        if not source.meta["val"].is_contiguous():
            raise ConvertError(
                f"{node.target} ({node.name}, {source_line(node)}) reads the memory of a tensor that lies scattered; "
                "call contiguous() on it first"
            )
        return self.cut.emit(aten.clone.default, x, memory_format=torch.contiguous_format)

    def _wrap(self, node: fx.Node, local: tuple[Any, ...]) -> Any:
        if isinstance(local[0], FakeTensor):
            return self.cut.whole_value(node)
        if isinstance(local[0], list | tuple):
            out = []
            for i in range(len(local[0])):
                item = self.cut.emit(operator.getitem, node, i)
                out.append(self._wrap(item, item.meta["local"]))
            return tuple(out)
        return node

    def _settle(self, node: fx.Node, value: Any) -> Any:
        """Cut a whole result again where the annotation knows its rows and there are enough of them."""
        note = self.annotation.get(node.name)
        if isinstance(value, tuple) and isinstance(note, tuple):
            return tuple(self._settle_one(v, n) for v, n in zip(value, note, strict=True))
        return self._settle_one(value, note)

    def _settle_one(self, value: Any, note: Any) -> Any:
        if not (isinstance(value, Value) and isinstance(note, Value)) or value.is_cut or note.layout.cut is None:
            return value
        try:
            bounds = self.cut.bounds(note.layout.cut.rows)
        except Refused:
            return value
        return self.cut.take(value, note.layout.map_cut(lambda f: f.recut(bounds)))


def _draws_numbers(node: fx.Node) -> bool:
    """Whether the operator draws random numbers: those that only do so in training mode say whether they are in it."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {a.name: a.default_value for a in schema if a.has_default_value()}
    given.update(zip((a.name for a in schema), node.args, strict=False))
    given.update(node.kwargs)
    return given.get("train", given.get("training", True)) is not False


def _layouts(note: Any) -> list[Layout]:
    if isinstance(note, Value):
        return [note.layout]
    if isinstance(note, tuple):
        return [layout for n in note for layout in _layouts(n)]
    return []


def _has_rows(note: Any) -> bool:
    return any(layout.cut is not None for layout in _layouts(note))
