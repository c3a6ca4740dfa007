"""What rules are written with: values with layouts, and the emission of local operators and collectives.

The local graph is *one* graph for all ranks (SPMD): an argument that differs by rank is a
:class:`~districompile.ir.layout.PerRank`. So all ranks post the same collectives in the same order by construction,
and a pass works on one graph whatever the number of ranks. ``node.meta["local"]`` holds each rank's fake result.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from districompile.ir.layout import Cut, Factor, Layout, PerRank, Refused, at_rank, per_rank, scale_bounds
from districompile.ir.ops import ops
from districompile.ir.walk import of_type, replace
from districompile.value import Value as Value
from districompile.value import rows_of as rows_of
from districompile.value import values_in as values_in

aten = torch.ops.aten


class Cutter:
    """Emits the local graph. ``fractions`` are the image's cut points (R+1 of them, 0 to 1).

    ``target`` is the node of the whole graph that is being localised: its module path names the collectives, its result
    is what the rule has to make.
    """

    def __init__(self, graph: fx.Graph, fractions: Sequence[float], fake_mode: FakeTensorMode) -> None:
        self.graph = graph
        self.fractions = tuple(fractions)
        self.ranks = len(fractions) - 1
        self.fake_mode = fake_mode
        self.target: fx.Node | None = None
        self._memo: dict[Any, Any] = {}
        # Networks repeat themselves, and one capture is cut several times: equal operators on equal shapes are run
        # once. The results live as long as their mode does.
        self._fakes: dict[Any, Any] = vars(fake_mode).setdefault("districompile_results", {})

    # -- what is being localised ------------------------------------------------------------------------------------

    @property
    def operator(self) -> Any:
        """The operator being localised."""
        assert self.target is not None
        return self.target.target

    @property
    def out(self) -> FakeTensor:
        """The whole result of the operator being localised, as a fake tensor (for its shape and dtype)."""
        assert self.target is not None
        return self.target.meta["val"]  # type: ignore[no-any-return]

    @property
    def out_shape(self) -> tuple[int, ...]:
        return tuple(int(s) for s in self.out.shape)

    def bounds(self, rows: int) -> tuple[int, ...]:
        """Where ``rows`` rows of the image are cut; refuses where there are fewer rows than ranks."""
        bounds = scale_bounds(self.fractions, rows)
        if bounds is None:
            raise Refused(f"{rows} rows are too few for {self.ranks} ranks")
        return bounds

    # -- emission ---------------------------------------------------------------------------------------------------

    def emit(self, op: Any, *args: Any, name: str | None = None, **kwargs: Any) -> fx.Node:
        """Append a node. Arguments may hold Values, nodes and PerRanks; each rank's result is computed on fake
        tensors."""
        args, kwargs = replace((args, kwargs), Value, lambda v: v.node)
        if name is None and self.target is not None and op is self.target.target:
            name = self.target.name
        node = self.graph.create_node("call_function", op, args, kwargs, name=name)
        node.meta["local"] = self.local_results(op, args, kwargs)
        self.tag(node)
        return node

    def tag(self, node: fx.Node) -> None:
        """Copy where the node comes from: module path, source line."""
        if self.target is not None:
            for key in ("site", "stack_trace", "nn_module_stack"):
                if key in self.target.meta:
                    node.meta[key] = self.target.meta[key]
            node.meta["origin"] = self.target.name

    def local_results(self, op: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
        """Each rank's fake result of ``op``; equal arguments share one."""
        ranked = of_type((args, kwargs), PerRank)
        numbers = {n: i for i, n in enumerate(dict.fromkeys(of_type((args, kwargs), fx.Node)))}
        shared = repr(fx.map_arg((args, kwargs), lambda n: _Ordinal(numbers[n])))  # PerRanks print all their values
        out = []
        for r in range(self.ranks):
            operands = tuple(_signature(n.meta["local"][r]) for n in numbers)
            key = (op, shared if not ranked else shared + repr([p.values[r] for p in ranked]), operands)
            if key not in self._fakes:
                mine = at_rank((args, kwargs), r)
                a, k = fx.map_arg(mine, lambda n, r=r: n.meta["local"][r])  # type: ignore[misc]
                # Some operators refuse what would need a gradient (complex writes); weights may ask for one
                with self.fake_mode, torch.no_grad():
                    self._fakes[key] = op(*a, **k)
            out.append(self._fakes[key])
        return tuple(out)

    def value(self, node: fx.Node, layout: Layout, whole: fx.Node | None = None) -> Value:
        """``node`` as a Value; checks on every rank that the local result has the shape the layout says."""
        for r, t in enumerate(node.meta["local"]):
            if tuple(t.shape) != layout.local_shape(r):
                raise RuntimeError(
                    f"rule of {self.target}: rank {r} computes {tuple(t.shape)}, "
                    f"layout {layout} says {layout.local_shape(r)}"
                )
        node.meta["layout"] = layout
        return Value(node, layout, whole)

    def call(self, op: Any, *args: Any, layout: Layout, **kwargs: Any) -> Value:
        """Emit ``op`` and wrap its result."""
        return self.value(self.emit(op, *args, **kwargs), layout)

    def whole_value(self, node: fx.Node) -> Value:
        return self.value(node, Layout.whole(node.meta["local"][0].shape))

    # -- moving rows ------------------------------------------------------------------------------------------------

    def own(self, bounds: Sequence[int]) -> tuple[int | PerRank[int], int | PerRank[int]]:
        """(start, stop) of each rank's rows."""
        return per_rank(bounds[:-1]), per_rank(bounds[1:])

    def take(self, x: Value, layout: Layout) -> Value:
        """Each rank's part of a whole value: a slice, no transfer."""
        cut = layout.cut
        if cut is None or x.layout.cut is not None:
            raise RuntimeError("take cuts a whole value")
        key = ("take", x.node, layout)
        if key not in self._memo:
            self._memo[key] = self.value(self._slice_whole(x.node, layout), layout, x.node)
        return self._memo[key]  # type: ignore[no-any-return]

    def _slice_whole(self, node: fx.Node, layout: Layout) -> fx.Node:
        cut = layout.cut
        assert cut is not None
        if cut.index == 0:
            return self._own_rows(node, cut.dim, layout.coarse(cut.dim))
        flat, at = layout.flat()
        split = self.emit(aten.reshape.default, node, [f.size for f in flat])
        return self.emit(aten.reshape.default, self._own_rows(split, at, cut.factor), self.local_sizes(layout))

    def _own_rows(self, node: fx.Node, dim: int, factor: Factor) -> fx.Node:
        """Each rank's rows of a whole tensor, between the replicated parts where the factor is mixed."""
        assert factor.bounds is not None
        start, stop = self.own(factor.bounds)
        mine = self.emit(aten.slice.Tensor, node, dim, start, stop)
        if not factor.mixed:
            return mine
        parts = [mine]
        if factor.bounds[0]:
            parts.insert(0, self.emit(aten.slice.Tensor, node, dim, 0, factor.bounds[0]))
        if factor.bounds[-1] < factor.size:
            parts.append(self.emit(aten.slice.Tensor, node, dim, factor.bounds[-1], factor.size))
        return self.emit(aten.cat.default, parts, dim)

    def unmixed(self, x: Value) -> Value:
        """``x`` without replicated parts: what stood before the cut rows is the first rank's, what stood behind them
        the last one's. Nothing is sent. Any other value is given back as it is."""
        cut = x.layout.cut
        if cut is None or not cut.mixed:
            return x
        if self.ranks == 1:
            return self.value(x.node, x.layout.map_cut(lambda f: f.unmixed), x.whole)
        key = ("unmixed", x.node)
        if key not in self._memo:
            self._memo[key] = self._unmixed(x, cut)
        return self._memo[key]  # type: ignore[no-any-return]

    def _unmixed(self, x: Value, cut: Cut) -> Value:
        node, dim, factor = x.node, cut.dim, cut.factor
        layout = x.layout.map_cut(lambda f: f.unmixed)
        if cut.index:
            flat, dim = x.layout.flat()
            node = self.emit(aten.reshape.default, node, self.local_sizes(Layout(tuple((f,) for f in flat))))
        else:
            factor = x.layout.coarse(dim)
        node = self.emit(aten.slice.Tensor, node, dim, *self._owned(factor))
        if cut.index:
            node = self.emit(aten.reshape.default, node, self.local_sizes(layout))
        return self.value(node, layout, x.whole)

    def _owned(self, factor: Factor) -> tuple[int | PerRank[int], int | PerRank[int]]:
        """(start, stop) of what each rank keeps of a mixed factor's local part when replicas are dropped."""
        assert factor.bounds is not None
        last, after = self.ranks - 1, factor.size - factor.bounds[-1]
        starts = [0 if r == 0 else factor.bounds[0] for r in range(self.ranks)]
        stops = [factor.local(r) - (0 if r == last else after) for r in range(self.ranks)]
        return per_rank(starts), per_rank(stops)

    def local_sizes(self, layout: Layout) -> list[int | PerRank[int]]:
        """The local shape, with PerRank where ranks differ: for ``reshape`` and ``expand``."""
        return [per_rank(s) for s in zip(*(layout.local_shape(r) for r in range(self.ranks)), strict=True)]

    def fetch(
        self, x: Value, want: Sequence[tuple[int, int]], *, edge: str = "zeros", fill: float = 0.0, kind: str = "other",
        any_order: bool = False,
    ) -> fx.Node:  # fmt: skip
        """Rows [lo, hi) of the cut dim's whole, for each rank; rows outside hold ``fill`` or come from the other side.

        The dim is taken as one factor (see :meth:`Layout.coarse`), and ``want`` counts its elements. ``edge`` is
        "zeros", "circular", "reflect" or "replicate". ``any_order`` allows the rank's own rows to come first (attention
        does not care, and all ranks then have the same graph). Returns a node, as the result overlaps between ranks.
        """
        x = self.unmixed(x)
        cut = x.layout.cut
        assert cut is not None
        bounds = x.layout.coarse(cut.dim).bounds
        assert bounds is not None
        lo, hi = [w[0] for w in want], [w[1] for w in want]
        key = ("fetch", x.node, tuple(lo), tuple(hi), edge, fill, any_order)
        if key in self._memo:
            return self._memo[key]  # type: ignore[no-any-return]
        n = bounds[-1]
        inside = all(a >= 0 and b <= n for a, b in want)
        if lo == list(bounds[:-1]) and hi == list(bounds[1:]):
            node = x.node
        elif x.whole is not None and (inside or edge == "zeros"):
            node = self._window_of_whole(x.whole, cut.dim, n, want, fill)
        else:
            owned = zip(want, bounds, bounds[1:], strict=False)
            covers_own = all(a <= first and last <= b for (a, b), first, last in owned)
            order = "own_first" if any_order and covers_own else "rows"
            rank: Any = per_rank(range(self.ranks))
            site = self.site()
            assert self.target is not None
            node = self.emit(
                ops.fetch.default, x.node, cut.dim, list(bounds), lo, hi, edge, order, float(fill), rank, site, kind,
                name=f"{self.target.name}_fetch",
            )  # fmt: skip
        self._memo[key] = node
        return node

    def site(self) -> str:
        """The module path of the operator being localised, or its name where it has none."""
        assert self.target is not None
        return str(self.target.meta.get("site") or self.target.name)

    def window(self, x: Value, dim: int, want: Sequence[tuple[int, int]], fill: float = 0.0) -> fx.Node:
        """Rows [lo, hi) along ``dim`` of a whole value, for each rank; rows outside hold ``fill``."""
        return self._window_of_whole(x.node, dim, x.shape[dim], want, fill)

    def _window_of_whole(
        self, node: fx.Node, dim: int, n: int, want: Sequence[tuple[int, int]], fill: float
    ) -> fx.Node:
        """Rows [lo, hi) of a value that every rank holds whole: pad once where some rank looks past the border, then
        slice."""
        above = max(0, -min(a for a, _ in want))
        below = max(0, max(b for _, b in want) - n)
        if above or below:
            ndim = len(node.meta["local"][0].shape)
            node = self.emit(aten.constant_pad_nd.default, node, [0, 0] * (ndim - 1 - dim) + [above, below], fill)
        start = per_rank(a + above for a, _ in want)
        return self.emit(aten.slice.Tensor, node, dim, start, per_rank(b + above for _, b in want))

    def gather(self, x: Value, *, kind: str = "other", any_order: bool = False) -> Value:
        """All of ``x`` on every rank."""
        if not x.is_cut:
            return x
        if x.whole is not None:
            return self.whole_value(x.whole)
        key = ("gather", x.node, any_order)
        if key not in self._memo:
            self._memo[key] = self._gather(x, kind, any_order)
        return self._memo[key]  # type: ignore[no-any-return]

    def _gather(self, x: Value, kind: str, any_order: bool) -> Value:
        cut = x.layout.cut
        assert cut is not None
        if cut.index:  # rows are not outermost in their dim: give them a dim of their own first
            flat, at = x.layout.flat()
            split = Layout(tuple((f,) for f in flat))
            inner = self.call(aten.reshape.default, x, self.local_sizes(split), layout=split)
            node = self._gather_rows(inner, at, kind, False)
            return self.whole_value(self.emit(aten.reshape.default, node, list(x.shape)))
        return self.whole_value(self._gather_rows(x, cut.dim, kind, any_order))

    def _gather_rows(self, x: Value, dim: int, kind: str, any_order: bool) -> fx.Node:
        factor = x.layout.coarse(dim)
        bounds = factor.bounds
        assert bounds is not None
        if not factor.mixed:
            return self.fetch(x, [(0, factor.size)] * self.ranks, kind=kind, any_order=any_order)
        before, after, n = bounds[0], factor.size - bounds[-1], factor.rows
        own = per_rank(before + b - a for a, b in itertools.pairwise(bounds))
        mine = self.emit(aten.slice.Tensor, x, dim, before, own)
        layout = x.layout.with_dim(dim, (Factor(n, tuple(b - before for b in bounds)),))
        rows = self.fetch(self.value(mine, layout), [(0, n)] * self.ranks, kind=kind, any_order=any_order)
        parts = [rows]
        if before:
            parts.insert(0, self.emit(aten.slice.Tensor, x, dim, 0, before))
        if after:
            parts.append(self.emit(aten.slice.Tensor, x, dim, own, _plus(own, after)))
        return self.emit(aten.cat.default, parts, dim)

    def rebound(self, x: Value, bounds: Sequence[int], *, kind: str = "other") -> Value:
        """``x`` cut at other bounds along the same dim (which must be one factor)."""
        x = self.unmixed(x)
        cut = x.layout.cut
        assert cut is not None
        if tuple(cut.bounds) == tuple(bounds) and len(x.layout.dims[cut.dim]) == 1:
            return x
        factor = x.layout.coarse(cut.dim)
        layout = x.layout.with_dim(cut.dim, (Factor(factor.size, tuple(bounds)),))
        node = self.fetch(x, list(itertools.pairwise(bounds)), kind=kind)
        return self.value(node, layout, x.whole)

    def align(self, x: Value, dim: int, factors: Sequence[Factor], *, kind: str = "other") -> Value:
        """``x`` with its dim ``dim`` laid out as ``factors`` (which hold a cut): a slice, a change of bounds or, at
        worst, all of it."""
        want = x.layout.with_dim(dim, factors)
        cut = x.layout.cut
        if cut is None:
            return self.take(x, want)
        if x.layout.dims[dim] == want.dims[dim]:
            return x
        target = want.dims[dim]
        if cut.dim == dim and cut.index == 0 and target[0].bounds is not None and not target[0].mixed:
            bounds = want.coarse(dim).bounds
            assert bounds is not None
            moved = self.rebound(x, bounds, kind=kind)
            return self.value(moved.node, want, x.whole)
        return self.take(self.gather(x, kind=kind), Layout.whole(x.shape).with_dim(dim, factors))

    def outermost(self, x: Value) -> Value:
        """``x`` with the rows outermost in their dim: where they are not (pixels column by column), the dim is cut anew
        as a whole, which takes all of it."""
        cut = x.layout.cut
        if cut is None or cut.index == 0:
            return x
        size = x.shape[cut.dim]
        return self.take(self.gather(x), Layout.cut_at(x.shape, cut.dim, self.bounds(size)))

    def reduce(self, x: fx.Node, op: str, *, kind: str = "other") -> Value:
        """Sum, max or min over the ranks of partial results that all have one shape."""
        if self.ranks == 1:
            return self.whole_value(x)
        assert self.target is not None
        name = f"{self.target.name}_{op}"
        return self.whole_value(self.emit(ops.reduce.default, x, op, self.site(), kind, name=name))


class _Ordinal(int):
    """The position of a node among the arguments, told apart from plain numbers when printed."""

    def __repr__(self) -> str:
        return f"%{int(self)}"


def _signature(x: Any) -> Any:
    """What a fake result depends on: shape, strides and dtype of a tensor, through tuples."""
    if isinstance(x, torch.Tensor):
        return tuple(x.shape), x.stride(), x.dtype, x.device
    return tuple(_signature(v) for v in x) if isinstance(x, list | tuple) else repr(x)


def _plus(x: int | PerRank[int], k: int) -> int | PerRank[int]:
    return per_rank(v + k for v in x.values) if isinstance(x, PerRank) else x + k
