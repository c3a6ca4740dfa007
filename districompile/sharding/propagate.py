# SPDX-License-Identifier: Apache-2.0
"""Sharding propagation: apply the rules to the global graph, in order, and build the SPMD graph.

It runs twice. With one rank it finds the rows of the image in every value (``propagate-shardings``). With all ranks it
partitions the graph (``partition``). The shardings of the first run then show where a replicated value can be sharded
again.
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

import districompile.passes.rules.table  # noqa: F401  (registers the rules that ship with the package)
from districompile.errors import ConvertError
from districompile.ir.collectives import is_fetch, is_reduce
from districompile.ir.flops import flops_of
from districompile.ir.graph import described, replace, source_line
from districompile.ir.layout import Layout, NotOutermost, Refused
from districompile.ir.meta import local_results
from districompile.ir.ops import ANY_STRIDES
from districompile.ir.report_builder import Fallback
from districompile.sharding.builder import ShardedValue, ShardingBuilder, values_in
from districompile.sharding.registry import find_rule, is_pointwise

aten = torch.ops.aten
_FORESEEN = (
    AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


@dataclasses.dataclass
class Propagated:
    """The SPMD graph, the sharded value of every node of the global graph, fallbacks, and FLOPs.

    ``replicated`` names the nodes that every rank computes because their rows are too few. ``flops_cut`` are divided
    among the ranks, ``flops_whole`` are computed on every rank.
    """

    graph: fx.Graph
    values: dict[str, Any]
    fallbacks: list[Fallback]
    replicated: list[str]
    flops_cut: float
    flops_whole: float


def propagate(
    graph: fx.Graph, rows: Mapping[str, int], cut_points: Sequence[float], fake_mode: FakeTensorMode,
    shardings: Mapping[str, Any] | None = None, tokens: Mapping[str, int] | None = None,
) -> Propagated:  # fmt: skip
    """Partition ``graph`` for ``len(cut_points) - 1`` ranks.

    ``rows`` maps a placeholder to its sharded dim, by name. ``shardings`` are the ``values`` of a run with one rank.
    ``tokens`` maps a replicated value to the dim in which each rank takes its own part of it. Raise
    :class:`ConvertError` for an operator that draws random numbers, and for a mistake in a user's rule.
    """
    return _Propagation(graph, rows, cut_points, fake_mode, shardings or {}, tokens or {}).run()


def carried(node: fx.Node, operand: fx.Node, dim: int, cut_points: Sequence[float], fake_mode: FakeTensorMode) -> Any:
    """Return what the rule of ``node`` makes of ``operand`` sharded at ``dim``, all other operands replicated.

    Return None where the rule refuses, or where ranks would have to send anything.
    """
    return _Propagation(node.graph, {}, cut_points, fake_mode, {}, {}).apply_alone(node, operand, dim)


class _Propagation:
    def __init__(
        self, graph: fx.Graph, rows: Mapping[str, int], cut_points: Sequence[float], fake_mode: FakeTensorMode,
        shardings: Mapping[str, Any], tokens: Mapping[str, int],
    ) -> None:  # fmt: skip
        self.graph, self.rows, self.shardings, self.tokens = graph, rows, shardings, tokens
        self.spmd = fx.Graph()
        self.builder = ShardingBuilder(self.spmd, cut_points, fake_mode)
        self.env: dict[fx.Node, Any] = {}
        self.unsharded: set[fx.Node] = set()  # replicated values that a fallback computed from sharded ones
        self.result = Propagated(self.spmd, {}, [], [], 0.0, 0.0)

    def run(self) -> Propagated:
        for node in self.graph.nodes:
            self.builder.target = node
            if node.op in ("placeholder", "get_attr"):
                value = self._divided(self._leaf(node, node.op == "get_attr"), self.rows.get(node.name))
            elif node.op == "output":
                self._output(node)
                break
            elif node.op == "call_function":
                value = self._call(node)
            else:
                raise ConvertError(f"node {node.name}: a graph with {node.op} nodes cannot be partitioned")
            if node.name in self.tokens:
                value = self._divided(value, self.tokens[node.name])
            self.env[node] = value
            self.result.values[node.name] = value
        self.builder.target = None
        return self.result

    def apply_alone(self, node: fx.Node, operand: fx.Node, dim: int) -> Any:
        """Apply the rule of one node; see :func:`carried`."""
        self.builder.target = node
        for n in node.all_input_nodes:
            leaf = self._leaf(n, n.op == "get_attr")
            self.env[n] = self._divided(leaf, dim) if n is operand else leaf
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.env[n])
        try:
            if not self.env[operand].is_sharded:
                return None
            value = self._apply(node, args, kwargs)
        except (Refused, ConvertError):  # a user's rule that fails here may never be needed
            return None
        return None if any(is_fetch(n) or is_reduce(n) for n in self.spmd.nodes) else value

    def _leaf(self, node: fx.Node, weight: bool) -> ShardedValue:
        if weight:
            leaf = self.spmd.create_node("get_attr", node.target, name=node.name)
        else:
            leaf = self.spmd.placeholder(node.name)
        fake = node.meta["val"]
        leaf.meta.update(local=(fake,) * self.builder.ranks, val=fake)
        return self.builder.replicated_value(leaf)

    def _divided(self, value: Any, dim: int | None) -> Any:
        """Take each rank's part of a replicated value, if it has one for all ranks."""
        if dim is None or not isinstance(value, ShardedValue) or value.is_sharded:
            return value
        try:
            bounds = self.builder.bounds(value.shape[dim])
        except Refused:
            return value  # such as an input of a level with fewer rows than ranks
        return self.builder.slice_local(value, Layout.sharded_at(value.shape, dim, bounds))

    def _output(self, node: fx.Node) -> None:
        leaves = []
        for source in node.args[0]:  # type: ignore[union-attr]
            self.builder.target = source if isinstance(source, fx.Node) else node
            x = self.env[source] if isinstance(source, fx.Node) else source
            leaves.append(self.builder.gather(x, purpose="output").node if isinstance(x, ShardedValue) else x)
        self.spmd.output(tuple(leaves))

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
        if not any(v.is_sharded for v in values_in((args, kwargs))):
            # Replicated operands give replicated results; only work that could be sharded is counted
            value = self._reshard(node, self._replicated(node, args, kwargs))
            unsharded = any(n in self.unsharded for n in node.all_input_nodes)
            if unsharded or _has_rows(self.shardings.get(node.name)):
                self.result.flops_whole += work
            if unsharded and not any(v.is_sharded for v in values_in(value)):
                self.unsharded.add(node)
            return value
        try:
            found = find_rule(node.target)
            if self._too_few_rows(node) and not (found is not None and found.allow_fewer_rows_than_ranks):
                self.result.replicated.append(node.name)
                self.result.flops_whole += work
                return self._replicated(node, *self._gathered(args, kwargs))
            before = len(self.spmd.nodes)
            value = self._apply(node, args, kwargs)
            repeated = self._repeated_work(work, before)
            self.result.flops_whole += repeated
            self.result.flops_cut += work - repeated
            return self._reshard(node, value)
        except Refused as refusal:
            # The nodes that the rule emitted before it refused are dead code, which is eliminated later
            self.result.flops_whole += work
            return self._fall_back(node, args, kwargs, str(refusal))

    def _repeated_work(self, work: float, before: int) -> float:
        """Return the part of an operator's work that every rank repeats, from the work of the nodes it emitted."""
        if not work or self.builder.ranks == 1:
            return 0.0
        emitted = itertools.islice(reversed(self.spmd.nodes), len(self.spmd.nodes) - before)
        done = sum(flops_of(n, r) for n in emitted for r in range(self.builder.ranks))
        return min(work, max(0.0, (done - work) / (self.builder.ranks - 1)))

    def _apply(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        found = find_rule("pointwise" if find_rule(node.target) is None and is_pointwise(node.target) else node.target)
        if found is None:
            raise Refused("the operator has no rule")
        if not found.partially_replicated:
            args, kwargs = replace((args, kwargs), ShardedValue, self.builder.drop_replicas)
        elif not found.built_in:  # its author may not know of segments
            args, kwargs = replace((args, kwargs), ShardedValue, self._without_segments)
        try:
            try:
                value = found.function(self.builder, *args, **kwargs)
            except NotOutermost:
                args, kwargs = replace((args, kwargs), ShardedValue, self.builder.move_rows_outermost)
                value = found.function(self.builder, *args, **kwargs)
            if not found.built_in:
                _check_types(node, value)
            self._check_shape(node, value)
            return value
        except Refused:
            raise
        except Exception as e:
            message = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
            if not found.built_in:
                name = getattr(found.function, "__name__", str(found.function))
                raise ConvertError(
                    f"rule {found.module}.{name} failed for {described(node)} on {self.builder.ranks} ranks: {message}"
                ) from e
            if isinstance(e, _FORESEEN):
                # A built-in rule met arguments that it does not cover: a fallback, so that no network is refused for it
                raise Refused(f"the rule failed: {message}") from e
            raise

    def _without_segments(self, x: ShardedValue) -> ShardedValue:
        axis = x.layout.sharded_axis
        return self.builder.drop_replicas(x) if axis is not None and axis.segments else x

    def _check_shape(self, node: fx.Node, value: Any) -> None:
        """Raise ``ValueError`` where a rule's result has another global shape than the operator's."""
        out = node.meta["val"]
        for part, fake in zip(value, out, strict=True) if isinstance(value, tuple) else [(value, out)]:
            if isinstance(part, ShardedValue) and isinstance(fake, torch.Tensor) and part.shape != tuple(fake.shape):
                raise ValueError(f"its result is {part.shape}, the operator's {tuple(fake.shape)}")

    def _too_few_rows(self, node: fx.Node) -> bool:
        for layout in _layouts(self.shardings.get(node.name)):
            axis = layout.sharded_axis
            if axis is not None:
                try:
                    self.builder.bounds(axis.rows)
                except Refused:
                    return True
        return False

    def _gathered(self, args: Any, kwargs: Any, purpose: str = "other") -> tuple[Any, Any]:
        gathered = replace((args, kwargs), ShardedValue, lambda v: self.builder.gather(v, purpose=purpose))
        return gathered[0], gathered[1]

    def _fall_back(self, node: fx.Node, args: Any, kwargs: Any, reason: str) -> Any:
        """Compute an operator on gathered inputs, and record the reason."""
        sharded = [v for v in values_in((args, kwargs)) if v.is_sharded]
        size = sum(v.dtype.itemsize * math.prod(v.shape) for v in sharded)
        self.result.fallbacks.append(Fallback(node.name, str(node.target), reason, size, source_line(node)))
        value = self._replicated(node, *self._gathered(args, kwargs, "fallback"))
        if node.name in self.shardings:
            value = self._reshard(node, value)
        else:
            value = (
                tuple(self._shard_like(v, sharded) for v in value)
                if isinstance(value, tuple)
                else (self._shard_like(value, sharded))
            )
        if not any(v.is_sharded for v in values_in(value)):
            self.unsharded.add(node)
        return value

    def _shard_like(self, value: Any, sharded: list[ShardedValue]) -> Any:
        """Shard the replicated result of an operator without a rule where its rows seem to be.

        That is the dim where an operand has them, counted from the front or from the back, or else any dim of equal
        size. A wrong choice costs time, and changes no result.
        """
        if not isinstance(value, ShardedValue):
            return value
        for v in sorted(sharded, key=lambda v: v.shape != value.shape):
            dim = v.sharded_dim
            assert dim is not None
            size = v.shape[dim]
            for d in (dim, dim + value.ndim - v.ndim, *range(value.ndim)):
                if 0 <= d < value.ndim and value.shape[d] == size > 1:
                    return self.builder.slice_local(
                        value, Layout.replicated(value.shape).with_dim(d, v.layout.dims[dim])
                    )
        return value

    def _replicated(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Compute an operator on every rank, on replicated operands."""
        if node.target is aten.as_strided.default:
            args = (self._as_stored(node, args[0]), *args[1:])
        call = self.builder.emit(ANY_STRIDES.get(node.target, node.target), *args, **kwargs)
        return self._wrap(call, local_results(call))

    def _as_stored(self, node: fx.Node, x: Any) -> Any:
        """Copy the operand of an operator that reads memory by strides, so that it has the original strides."""
        source: Any = node.args[0]
        if not source.meta["val"].is_contiguous():
            raise ConvertError(
                f"{node.target} ({node.name}, {source_line(node)}) reads the memory of a tensor that is not "
                "contiguous; call contiguous() on it first"
            )
        return self.builder.emit(aten.clone.default, x, memory_format=torch.contiguous_format)

    def _wrap(self, node: fx.Node, results: tuple[Any, ...]) -> Any:
        if isinstance(results[0], FakeTensor):
            return self.builder.replicated_value(node)
        if isinstance(results[0], list | tuple):
            out = []
            for i in range(len(results[0])):
                item = self.builder.emit(operator.getitem, node, i)
                out.append(self._wrap(item, local_results(item)))
            return tuple(out)
        return node

    def _reshard(self, node: fx.Node, value: Any) -> Any:
        """Shard a replicated result whose rows are known, if there are enough for all ranks."""
        known = self.shardings.get(node.name)
        if isinstance(value, tuple) and isinstance(known, tuple):
            return tuple(self._reshard_one(v, k) for v, k in zip(value, known, strict=True))
        return self._reshard_one(value, known)

    def _reshard_one(self, value: Any, known: Any) -> Any:
        if (
            not (isinstance(value, ShardedValue) and isinstance(known, ShardedValue))
            or value.is_sharded
            or known.layout.sharded_axis is None
        ):
            return value
        try:
            layout = known.layout.map_sharded(lambda f: f.resharded(self.builder.bounds))
        except Refused:
            return value
        return self.builder.slice_local(value, layout)


def _draws_numbers(node: fx.Node) -> bool:
    """Return whether the operator draws random numbers; one with a training flag does so in training mode only."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {a.name: a.default_value for a in schema if a.has_default_value()}
    given.update(zip((a.name for a in schema), node.args, strict=False))
    given.update(node.kwargs)
    return given.get("train", given.get("training", True)) is not False


def _check_types(node: fx.Node, value: Any) -> None:
    """Raise ``TypeError`` where a rule returns something else than sharded values for the operator's tensors."""
    out = node.meta["val"]
    many = isinstance(out, list | tuple)
    if many and not (isinstance(value, tuple) and len(value) == len(out)):
        raise TypeError(f"its result is a {type(value).__name__}, not a tuple of {len(out)}")
    for part, fake in zip(value, out, strict=True) if many else [(value, out)]:
        unused = many and part is None  # a result that nothing reads
        if isinstance(fake, torch.Tensor) and not unused and not isinstance(part, ShardedValue):
            raise TypeError(f"its result is a {type(part).__name__}, not a ShardedValue: see builder.value")


def _layouts(known: Any) -> list[Layout]:
    if isinstance(known, ShardedValue):
        return [known.layout]
    if isinstance(known, tuple):
        return [layout for n in known for layout in _layouts(n)]
    return []


def _has_rows(known: Any) -> bool:
    return any(layout.sharded_axis is not None for layout in _layouts(known))
