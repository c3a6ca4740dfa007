# SPDX-License-Identifier: Apache-2.0
"""An interpreter of SPMD graphs for all ranks in one process: the semantics of ``fetch`` and ``reduce`` as plain code.

The tests of the lowering and of the rules compare with it. ``verify --nodes`` uses it to compare every node with the
original model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from districompile.ir.collectives import FetchArgs, ReduceArgs, is_fetch, is_reduce
from districompile.ir.layout import Layout, at_rank
from districompile.ir.ops import ANY_STRIDES
from districompile.ir.rows import wanted_rows

Ranked = list[Any]


def join(parts: Sequence[Tensor], layout: Layout) -> Tensor:
    """Assemble the global tensor from every rank's local one, laid out by ``layout``."""
    axis = layout.sharded_axis
    if axis is None:
        return parts[0]
    factors, at = layout.all_factors()
    last, pieces = len(parts) - 1, []
    local = [t.reshape([f.local(r) for f in factors]) for r, t in enumerate(parts)]
    offsets = [0] * len(parts)
    for part in axis.factor.parts:
        # Replicated parts are taken from the first and the last rank
        owners = range(len(parts)) if part.bounds is not None else [0 if part.start < axis.bounds[0] else last]
        pieces += [local[r].narrow(at, offsets[r], part.local(r)) for r in owners]
        offsets = [offset + part.local(r) for r, offset in enumerate(offsets)]
    return torch.cat(pieces, at).reshape(layout.shape)


def fetch_all(
    parts: Sequence[Tensor], dim: int, bounds: Sequence[int], lo: Sequence[int], hi: Sequence[int], edge: str,
    order: str, fill: float,
) -> list[Tensor]:  # fmt: skip
    """Compute the result of ``fetch`` on each rank, from every rank's local tensor."""
    rows_of_all = torch.cat(list(parts), dim)
    beyond = torch.full_like(rows_of_all.narrow(dim, 0, 1), fill)
    source = torch.cat([rows_of_all, beyond], dim)  # row -1
    out = []
    for rank in range(len(parts)):
        rows = wanted_rows(bounds, lo, hi, edge, order, rank)
        out.append(source.index_select(dim, torch.tensor([r % source.shape[dim] for r in rows], device=source.device)))
    return out


def reduce_all(parts: Sequence[Tensor], op: str) -> list[Tensor]:
    """Compute the result of ``reduce`` on each rank. Contributions are combined in rank order."""
    total = parts[0]
    for part in parts[1:]:
        total = (
            total + part if op == "sum" else torch.maximum(total, part) if op == "max" else torch.minimum(total, part)
        )
    return [total for _ in parts]


def interpret(
    graph: fx.Graph, inputs: Mapping[str, Tensor], weight: Callable[[str], Tensor], ranks: int,
    watch: Callable[[fx.Node, Ranked], None] | None = None,
) -> list[tuple[Any, ...]]:  # fmt: skip
    """Run an SPMD graph and return every rank's outputs.

    ``inputs`` are placeholders by name, ``weight`` returns a weight by name. ``watch`` is called with every node and
    its results.
    """
    env: dict[fx.Node, Ranked] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            env[node] = [inputs[node.name]] * ranks
        elif node.op == "get_attr":
            env[node] = [weight(str(node.target))] * ranks
        elif node.op == "output":
            return [tuple(fx.map_arg(node.args[0], lambda n, r=r: env[n][r])) for r in range(ranks)]  # type: ignore[misc]
        else:
            env[node] = _call(node, env, ranks)
        if watch is not None:
            watch(node, env[node])
    raise RuntimeError("the graph has no output")


def _call(node: fx.Node, env: dict[fx.Node, Ranked], ranks: int) -> Ranked:
    if is_fetch(node):
        f = FetchArgs.of(node)
        return fetch_all(env[f.x], f.dim, f.bounds, f.lo, f.hi, f.edge, f.order, f.fill)
    if is_reduce(node):
        reduced = ReduceArgs.of(node)
        return reduce_all(env[reduced.x], reduced.op)
    results: dict[Any, Any] = {}
    out = []
    operands = node.all_input_nodes
    for r in range(ranks):
        args, kwargs = at_rank((node.args, node.kwargs), r)
        key = (repr((args, kwargs)), tuple(id(env[n][r]) for n in operands))
        if key not in results:
            a, k = fx.map_arg((args, kwargs), lambda n, r=r: env[n][r])  # type: ignore[misc]
            results[key] = ANY_STRIDES.get(node.target, node.target)(*a, **k)
        out.append(results[key])
    return out
