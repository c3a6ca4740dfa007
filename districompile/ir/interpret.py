"""Runs an SPMD graph on all ranks at once, in this process: the meaning of ``fetch`` and ``reduce``, as plain code.

It is what the lowering is tested against, what rules are tested with, and what compares every node with the original
model when an error has to be found (``verify --nodes``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from districompile.ir.layout import Layout, at_rank
from districompile.ir.ops import ANY_STRIDES, ops
from districompile.ir.rows import wanted_rows

Ranked = list[Any]


def join(parts: Sequence[Tensor], layout: Layout) -> Tensor:
    """The whole tensor from every rank's part."""
    cut = layout.cut
    if cut is None:
        return parts[0]
    flat, at = layout.flat()
    pieces = []
    for r, part in enumerate(parts):
        piece = part.reshape([f.local(r) for f in flat])
        start = 0 if r == 0 else cut.bounds[0]  # replicated parts of a mixed dim: the first and the last rank's
        stop = piece.shape[at] - (0 if r == len(parts) - 1 else cut.size - cut.bounds[-1])
        pieces.append(piece.narrow(at, start, stop - start))
    return torch.cat(pieces, at).reshape(layout.shape)


def fetch_all(
    parts: Sequence[Tensor], dim: int, bounds: Sequence[int], lo: Sequence[int], hi: Sequence[int], edge: str,
    order: str, fill: float,
) -> list[Tensor]:  # fmt: skip
    """What ``districompile.fetch`` gives each rank, from what every rank holds."""
    whole = torch.cat(list(parts), dim)
    beyond = torch.full_like(whole.narrow(dim, 0, 1), fill)
    whole = torch.cat([whole, beyond], dim)  # row -1
    out = []
    for rank in range(len(parts)):
        rows = wanted_rows(bounds, lo, hi, edge, order, rank)
        out.append(whole.index_select(dim, torch.tensor([r % whole.shape[dim] for r in rows], device=whole.device)))
    return out


def reduce_all(parts: Sequence[Tensor], op: str) -> list[Tensor]:
    """What ``districompile.reduce`` gives each rank. Contributions are combined in rank order."""
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
    """The outputs of every rank. ``inputs``: placeholders by name; ``weight``: tensors by name; ``watch`` sees every
    node."""
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
    if node.target is ops.fetch.default:
        x, dim, bounds, lo, hi, edge, order, fill, *_ = node.args
        return fetch_all(env[x], dim, bounds, lo, hi, edge, order, fill)  # type: ignore[index, arg-type]
    if node.target is ops.reduce.default:
        return reduce_all(env[node.args[0]], node.args[1])  # type: ignore[index, arg-type]
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
