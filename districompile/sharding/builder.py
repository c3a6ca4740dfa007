# SPDX-License-Identifier: Apache-2.0
"""The builder of SPMD graphs, for rules and passes: local operators, collectives, and sharded values.

The SPMD graph is *one* graph for all ranks. An argument that differs by rank is a
:class:`~districompile.ir.layout.PerRank`. All ranks therefore start the same collectives in the same order, and a pass
works on one graph for any number of ranks. :func:`~districompile.ir.meta.local_results` has each rank's fake result.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from districompile.ir.collectives import FetchArgs, ReduceArgs
from districompile.ir.graph import of_type, replace
from districompile.ir.layout import Factor, Layout, PerRank, Refused, ShardedAxis, at_rank, per_rank, scale_bounds
from districompile.ir.meta import copy_provenance, local_results, module_path_of, set_layout, set_origin
from districompile.ir.ops import ops
from districompile.sharding import parts
from districompile.sharding.value import ShardedValue as ShardedValue
from districompile.sharding.value import rows_of as rows_of
from districompile.sharding.value import values_in as values_in

if TYPE_CHECKING:
    from districompile.ir.unit import CompilationUnit

aten = torch.ops.aten


class ShardingBuilder:
    """Emits nodes of the SPMD graph. ``cut_points`` are the image's cut points (R+1 of them, 0 to 1).

    ``target`` is the node that is being partitioned or rewritten. Nodes get their provenance from it, collectives their
    names. In a rule it is a node of the global graph, and :attr:`out` is the result that the rule has to compute.
    """

    def __init__(self, graph: fx.Graph, cut_points: Sequence[float], fake_mode: FakeTensorMode) -> None:
        self.graph = graph
        self.cut_points = tuple(cut_points)
        self.ranks = len(cut_points) - 1
        self.fake_mode = fake_mode
        self.target: fx.Node | None = None
        self._memo: dict[Any, Any] = {}
        # Networks repeat themselves, and one capture is partitioned several times: equal operators on equal shapes run
        # once. The results live as long as their mode.
        self._fakes: dict[Any, Any] = vars(fake_mode).setdefault("districompile_results", {})

    @staticmethod
    def of(unit: CompilationUnit) -> ShardingBuilder:
        """Return a builder for a pass, which adds to the graph of ``unit``."""
        return ShardingBuilder(unit.graph, unit.cut_points, unit.captured.fake_mode)

    # -- the operator being partitioned -----------------------------------------------------------------------------

    @property
    def _target(self) -> fx.Node:
        if self.target is None:
            raise RuntimeError("the builder has no target: emit inside of `with builder.before(node)`")
        return self.target

    @property
    def operator(self) -> Any:
        """The operator being partitioned."""
        return self._target.target

    @property
    def out(self) -> FakeTensor:
        """The global result of the operator being partitioned, as a fake tensor (for its shape and dtype)."""
        return self._target.meta["val"]  # type: ignore[no-any-return]

    @property
    def out_shape(self) -> tuple[int, ...]:
        return tuple(int(s) for s in self.out.shape)

    def bounds(self, rows: int) -> tuple[int, ...]:
        """Return the bounds of ``rows`` rows of the image. Raise :class:`Refused` for fewer rows than ranks."""
        bounds = scale_bounds(self.cut_points, rows)
        if bounds is None:
            raise Refused(f"{rows} rows are too few for {self.ranks} ranks")
        return bounds

    # -- emission ---------------------------------------------------------------------------------------------------

    def emit(self, op: Any, *args: Any, name: str | None = None, **kwargs: Any) -> fx.Node:
        """Append a node, with each rank's fake result and the provenance of :attr:`target`.

        Arguments may hold sharded values, nodes and PerRanks. The node has the name of the target where it calls the
        target's operator, else ``name``, made unique.
        """
        args, kwargs = replace((args, kwargs), ShardedValue, lambda v: v.node)
        if name is None and self.target is not None and op is self.target.target:
            name = self.target.name
        node = self.graph.create_node("call_function", op, args, kwargs, name=name)
        self.set_results(node)
        if self.target is not None:
            copy_provenance(self.target, node)
            set_origin(node, self.target)
        return node

    @contextlib.contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """Emit before ``node``, with its provenance, in a ``with`` block: for passes."""
        self.target = node
        with self.graph.inserting_before(node):
            yield

    @contextlib.contextmanager
    def after(self, node: fx.Node) -> Iterator[None]:
        """Emit behind ``node``, with its provenance, in a ``with`` block: for passes."""
        self.target = node
        with self.graph.inserting_after(node):
            yield

    def set_results(self, node: fx.Node) -> None:
        """Compute each rank's fake result of a call: for a pass that changed its operator or its arguments."""
        node.meta["local"] = self._results(node.target, node.args, node.kwargs)

    def _results(self, op: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
        """Each rank's fake result of ``op``; equal arguments share one."""
        ranked = of_type((args, kwargs), PerRank)
        numbers = {n: i for i, n in enumerate(dict.fromkeys(of_type((args, kwargs), fx.Node)))}
        shared = repr(fx.map_arg((args, kwargs), lambda n: _Ordinal(numbers[n])))  # PerRanks print all their values
        out = []
        for r in range(self.ranks):
            operands = tuple(_signature(local_results(n)[r]) for n in numbers)
            key = (op, shared if not ranked else shared + repr([p.values[r] for p in ranked]), operands)
            if key not in self._fakes:
                mine = at_rank((args, kwargs), r)
                a, k = fx.map_arg(mine, lambda n, r=r: local_results(n)[r])  # type: ignore[misc]
                # Some operators refuse what would need a gradient (complex writes); weights may ask for one
                with self.fake_mode, torch.no_grad():
                    self._fakes[key] = op(*a, **k)
            out.append(self._fakes[key])
        return tuple(out)

    def value(self, node: fx.Node, layout: Layout, replicated: fx.Node | None = None) -> ShardedValue:
        """Return ``node`` as a sharded value. Raise ``RuntimeError`` where a rank's result has another shape."""
        for r, t in enumerate(local_results(node)):
            if tuple(t.shape) != layout.local_shape(r):
                raise RuntimeError(f"rank {r} computes {tuple(t.shape)}, layout {layout} says {layout.local_shape(r)}")
        set_layout(node, layout)
        return ShardedValue(node, layout, replicated)

    def call(self, op: Any, *args: Any, layout: Layout, **kwargs: Any) -> ShardedValue:
        """Emit ``op`` and return its result as a sharded value."""
        return self.value(self.emit(op, *args, **kwargs), layout)

    def replicated_value(self, node: fx.Node) -> ShardedValue:
        """Return ``node``, which holds the global tensor on every rank, as a sharded value."""
        return self.value(node, Layout.replicated(local_results(node)[0].shape))

    # -- moving rows ------------------------------------------------------------------------------------------------

    def own(self, bounds: Sequence[int]) -> tuple[int | PerRank[int], int | PerRank[int]]:
        """Return (start, stop) of each rank's rows."""
        return per_rank(bounds[:-1]), per_rank(bounds[1:])

    def slice_local(self, x: ShardedValue, layout: Layout) -> ShardedValue:
        """Slice each rank's part out of a replicated value; nothing is transferred."""
        axis = layout.sharded_axis
        if axis is None or x.layout.sharded_axis is not None:
            raise RuntimeError("slice_local takes a replicated value and a sharded layout")
        key = ("slice_local", x.node, layout)
        if key not in self._memo:
            self._memo[key] = self.value(self._slice_replicated(x.node, layout, axis), layout, x.node)
        return self._memo[key]  # type: ignore[no-any-return]

    def _slice_replicated(self, node: fx.Node, layout: Layout, axis: ShardedAxis) -> fx.Node:
        if axis.index == 0:
            return parts.own_rows(self, node, axis.dim, layout.merged_dim(axis.dim))
        factors, at = layout.all_factors()
        split = self.emit(aten.reshape.default, node, [f.size for f in factors])
        mine = parts.own_rows(self, split, at, axis.factor)
        return self.emit(aten.reshape.default, mine, self.local_sizes(layout))

    def drop_replicas(self, x: ShardedValue, *, any_order: bool = False) -> ShardedValue:
        """Make a partially replicated or segmented value plainly sharded: each rank owns one run of the rows.

        Replicated elements before the sharded rows are kept by the first rank, those behind them by the last one;
        nothing is transferred for that. Segments are put in order, for which ranks send rows; ``any_order`` leaves
        them. Any other value is returned unchanged.
        """
        axis = x.layout.sharded_axis
        if axis is None or not (axis.partially_replicated or (axis.segments and not any_order)):
            return x
        ordered = bool(axis.segments) and not any_order
        key = ("drop_replicas", x.node, ordered)
        if key not in self._memo:
            self._memo[key] = parts.in_order(self, x) if ordered else parts.drop_replicas(self, x)
        return self._memo[key]  # type: ignore[no-any-return]

    def local_sizes(self, layout: Layout) -> list[int | PerRank[int]]:
        """Return the local shape, with PerRank where ranks differ: for ``reshape`` and ``expand``."""
        return [per_rank(s) for s in zip(*(layout.local_shape(r) for r in range(self.ranks)), strict=True)]

    def fetch(
        self,
        x: ShardedValue,
        want: Sequence[tuple[int, int]],
        *,
        edge: str = "zeros",
        fill: float = 0.0,
        purpose: str = "other",
        any_order: bool = False,
    ) -> fx.Node:
        """Give each rank the rows [lo, hi) of the sharded dim, from wherever they are; ``want`` has one pair a rank.

        The dim is taken as one factor (see :meth:`Layout.merged_dim`), and ``want`` counts its elements. ``edge`` says
        what stands beyond the border: "zeros" (``fill``), "circular", "reflect" or "replicate". ``purpose`` is what
        ``--displace`` selects by. ``any_order`` allows the rank's own rows to come first: for attention, which gives
        the same result, and all ranks then have the same graph. Return a node, as the results of ranks overlap.
        """
        x = self.drop_replicas(x)
        dim, bounds, n = rows_of(x)
        lo, hi = [w[0] for w in want], [w[1] for w in want]
        key = ("fetch", x.node, tuple(lo), tuple(hi), edge, fill, any_order)
        if key in self._memo:
            return self._memo[key]  # type: ignore[no-any-return]
        inside = all(a >= 0 and b <= n for a, b in want)
        if lo == list(bounds[:-1]) and hi == list(bounds[1:]):
            node = x.node
        elif x.replicated is not None and (inside or edge == "zeros"):
            node = self._window(x.replicated, dim, n, want, fill)
        else:
            owned = zip(want, bounds, bounds[1:], strict=False)
            covers_own = all(a <= first and last <= b for (a, b), first, last in owned)
            order = "own_first" if any_order and covers_own else "rows"
            rank = per_rank(range(self.ranks))
            rows = (dim, tuple(bounds), tuple(lo), tuple(hi))
            args = FetchArgs(x.node, *rows, edge, order, float(fill), rank, self.module_path(), purpose)
            node = self.emit(ops.fetch.default, *args.node_args(), name=f"{self._target.name}_fetch")
        self._memo[key] = node
        return node

    def module_path(self) -> str:
        """Return the module path of the operator being partitioned, or its name where it has none."""
        return module_path_of(self._target)

    def window(self, x: ShardedValue, dim: int, want: Sequence[tuple[int, int]], fill: float = 0.0) -> fx.Node:
        """Slice rows [lo, hi) along ``dim`` out of a replicated value, for each rank; rows outside hold ``fill``."""
        return self._window(x.node, dim, x.shape[dim], want, fill)

    def _window(self, node: fx.Node, dim: int, n: int, want: Sequence[tuple[int, int]], fill: float) -> fx.Node:
        """Pad a replicated value once, where some rank reads past the border, then slice."""
        above = max(0, -min(a for a, _ in want))
        below = max(0, max(b for _, b in want) - n)
        if above or below:
            ndim = len(local_results(node)[0].shape)
            node = self.emit(aten.constant_pad_nd.default, node, [0, 0] * (ndim - 1 - dim) + [above, below], fill)
        start = per_rank(a + above for a, _ in want)
        return self.emit(aten.slice.Tensor, node, dim, start, per_rank(b + above for _, b in want))

    def gather(
        self, x: ShardedValue, *, purpose: str = "other", any_order: bool = False, held: bool = False
    ) -> ShardedValue:
        """Give every rank the global value. Segments are put in order, unless ``any_order`` or ``held`` leaves them.

        With ``held``, rows come in the held order (:mod:`districompile.ir.layout`) on every rank; with ``any_order``,
        a rank's own rows may come first, too.
        """
        axis = x.layout.sharded_axis
        if axis is None:
            return x
        key = ("gather", x.node, any_order, held)
        if x.replicated is not None:
            if not (held and axis.segments):
                return self.replicated_value(x.replicated)
            return self.held_order(self.replicated_value(x.replicated), axis.dim, x.layout.merged_dim(axis.dim))
        if key not in self._memo:
            self._memo[key] = self._gather(x, axis, purpose, any_order, held)
        return self._memo[key]  # type: ignore[no-any-return]

    def _gather(self, x: ShardedValue, axis: ShardedAxis, purpose: str, any_order: bool, held: bool) -> ShardedValue:
        if axis.index:  # rows are not outermost in their dim: give them a dim of their own first
            factors, at = x.layout.all_factors()
            split = Layout(tuple((f,) for f in factors))
            inner = self.call(aten.reshape.default, x, self.local_sizes(split), layout=split)
            node = parts.gather_rows(self, inner, at, purpose=purpose, any_order=False, held=False)
            return self.replicated_value(self.emit(aten.reshape.default, node, list(x.shape)))
        node = parts.gather_rows(self, x, axis.dim, purpose=purpose, any_order=any_order, held=held)
        return self.replicated_value(node)

    def held_order(self, x: ShardedValue, dim: int, factor: Factor) -> ShardedValue:
        """Reorder ``dim`` of ``x``, which is not sharded, as ranks hold the elements of ``factor``, one after another.

        Columns of a mask come thus in the order of keys that were gathered with ``held``.
        """
        key = ("held_order", x.node, dim, factor)
        if key not in self._memo:
            self._memo[key] = self.value(parts.to_held_order(self, x.node, dim, factor), x.layout)
        return self._memo[key]  # type: ignore[no-any-return]

    def reshard(self, x: ShardedValue, bounds: Sequence[int], *, purpose: str = "other") -> ShardedValue:
        """Shard ``x`` at other bounds along the same dim, which becomes one factor."""
        x = self.drop_replicas(x)
        axis = x.layout.sharded_axis
        assert axis is not None
        if tuple(axis.bounds) == tuple(bounds) and len(x.layout.dims[axis.dim]) == 1:
            return x
        factor = x.layout.merged_dim(axis.dim)
        layout = x.layout.with_dim(axis.dim, (Factor(factor.size, tuple(bounds)),))
        node = self.fetch(x, list(itertools.pairwise(bounds)), purpose=purpose)
        return self.value(node, layout, x.replicated)

    def redistribute(
        self, x: ShardedValue, dim: int, factors: Sequence[Factor], *, purpose: str = "other"
    ) -> ShardedValue:
        """Lay out dim ``dim`` of ``x`` as ``factors``, one of which is sharded.

        This is a slice where ``x`` is replicated, local slices where its parts are those of the target, a change of
        bounds where its rows are in that dim, and otherwise a gather and a slice.
        """
        want = x.layout.with_dim(dim, factors)
        axis = x.layout.sharded_axis
        if axis is None:
            return self.slice_local(x, want)
        if x.layout.dims[dim] == want.dims[dim]:
            return x
        target = want.dims[dim]
        if axis.dim == dim and len(target) == 1 and (axis.segments or target[0].segments):
            moved = parts.relaid(self, x, dim, target[0])
            if moved is not None:
                return moved
        plain = target[0].bounds is not None and not (target[0].partially_replicated or target[0].segments)
        if axis.dim == dim and axis.index == 0 and plain:
            bounds = want.merged_dim(dim).bounds
            assert bounds is not None
            moved = self.reshard(x, bounds, purpose=purpose)
            return self.value(moved.node, want, x.replicated)
        return self.slice_local(self.gather(x, purpose=purpose), Layout.replicated(x.shape).with_dim(dim, factors))

    def move_rows_outermost(self, x: ShardedValue) -> ShardedValue:
        """Make the rows the outermost factor of their dim.

        Where they are not (pixels column by column), the value is gathered, and the dim is sharded as one factor.
        """
        axis = x.layout.sharded_axis
        if axis is None or axis.index == 0:
            return x
        size = x.shape[axis.dim]
        return self.slice_local(self.gather(x), Layout.sharded_at(x.shape, axis.dim, self.bounds(size)))

    def reduce(self, x: fx.Node, op: Literal["sum", "max", "min"], *, purpose: str = "other") -> ShardedValue:
        """Combine partial results of one shape over the ranks: ``op`` is "sum", "max" or "min"."""
        if self.ranks == 1:
            return self.replicated_value(x)
        args = ReduceArgs(x, op, self.module_path(), purpose)
        return self.replicated_value(self.emit(ops.reduce.default, *args.node_args(), name=f"{self._target.name}_{op}"))


class _Ordinal(int):
    """The position of a node among the arguments, printed unlike a plain number."""

    def __repr__(self) -> str:
        return f"%{int(self)}"


def _signature(x: Any) -> Any:
    """What a fake result depends on: shape, strides and dtype of a tensor, through tuples."""
    if isinstance(x, torch.Tensor):
        return tuple(x.shape), x.stride(), x.dtype, x.device
    return tuple(_signature(v) for v in x) if isinstance(x, list | tuple) else repr(x)
