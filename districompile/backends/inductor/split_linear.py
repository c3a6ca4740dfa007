# SPDX-License-Identifier: Apache-2.0
"""Split a linear layer whose columns go to two places, so that keys and values need no copy.

A rank writes its keys and values between those of other ranks, into a received buffer (decision 28). They are columns
of one matrix product with the queries, and a copy moves them there. Two matrix products, of which the second writes to
the buffer, avoid the copy. With few rows, one product of all columns fills the GPU better. Each size is timed once.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from districompile.backends.inductor.autotune import best_config
from districompile.backends.inductor.cache import remembered
from districompile.backends.inductor.fragment import library_fragment, register_fake
from districompile.backends.inductor.kernels.launch import unavailable_reason
from districompile.ir.ops import ops

_LINEAR = torch.ops.aten.linear.default
_SLICE = torch.ops.aten.slice.Tensor
# Sizes of a block of rows, of columns and of the inner dimension; warps, stages
_CONFIGS = ((128, 128, 64, 8, 4), (128, 64, 64, 4, 4))

_LIB = library_fragment()
_LIB.define("product_into(Tensor(a!) place, Tensor x, Tensor weight) -> ()")
_LIB.define(
    "insert_product(Tensor received, Tensor x, Tensor weight, int dim, int before, int[] sent, int[] rest,"
    " int[] blocks) -> (Tensor, Tensor)"
)


def matmul_into(place: Tensor, x: Tensor, weight: Tensor) -> None:
    """Write ``x @ weight.T`` into ``place``. All are matrices."""
    torch.mm(x, weight.t(), out=place)


def insert_linear(
    received: Tensor, x: Tensor, weight: Tensor, dim: int, before: int, sent: list[int], rest: list[int],
    blocks: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute ``linear(x, weight)`` and split its columns into ``sent`` (start, stop) and ``rest`` (start, stop).

    Returns a copy of ``received`` with the columns ``sent`` inserted, as
    :func:`districompile.ir.ops.assemble_in_place` does, and the columns ``rest``. Runs on any device.
    """
    y = torch.nn.functional.linear(x, weight)
    own = y.narrow(-1, sent[0], sent[1] - sent[0])
    whole = ops.assemble_in_place(received, own, dim, before, 0, own.shape[dim])
    return whole, y.narrow(-1, rest[0], rest[1] - rest[0]).contiguous()


def insert_linear_in_place(
    received: Tensor, x: Tensor, weight: Tensor, dim: int, before: int, sent: list[int], rest: list[int],
    blocks: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Lower :func:`insert_linear` for Inductor, where ``received`` is an input that nothing else reads.

    With ``blocks``, the custom kernel writes both results; without, there are two matrix products.
    """
    x = x.as_strided(x.shape, x.stride())  # Inductor writes to memory what is read with strides: once for both products
    rows = x.reshape(-1, x.shape[-1])
    if blocks and x.device.type == "cuda":
        from districompile.backends.inductor.kernels import operators

        left = operators.SPLIT_MATMUL(
            received, rows.contiguous(), weight, rest[1], before * (sent[1] - sent[0]), blocks
        )
        return received.movedim(0, dim), left.reshape(*x.shape[:-1], -1)
    place = received.narrow(0, before, rows.shape[0]).view(rows.shape[0], -1)
    ops.product_into(place, rows, weight[sent[0] : sent[1]])
    left = torch.mm(rows, weight[rest[0] : rest[1]].t())
    return received.movedim(0, dim), left.reshape(*x.shape[:-1], -1)


_LIB.impl("product_into", matmul_into, "CompositeExplicitAutograd")
register_fake("product_into", lambda place, x, weight: None, _LIB)
_LIB.impl("insert_product", insert_linear, "CompositeImplicitAutograd")
INSERT_LINEAR = torch.ops.districompile.insert_product.default


def split_linears(graph: fx.Graph, custom_kernels: bool = False) -> None:
    """Replace each linear layer whose columns are assembled in place by one ``insert_linear``, where that is faster.

    The alternatives are two matrix products and, with ``custom_kernels``, a kernel with two results; the baseline is
    one matrix product and a copy.
    """
    insert: Any
    for insert in list(graph.nodes):
        found = _columns(insert) if in_place(insert) else None
        if found is None:
            continue
        linear, sent, rest = found
        x = linear.args[0].meta["val"]
        rows = x.numel() // x.shape[-1]
        columns = linear.args[1].meta["val"].shape[0]
        both_whole = custom_kernels and rest[0] == 0 and (rest[1], sent[1]) == (sent[0], columns)
        blocks = best_split_config(rows, x.shape[-1], sent[1] - sent[0], rest[1] - rest[0], x.dtype, both_whole)
        if blocks is None:
            continue
        received, own, dim, before, _, _ = insert.args
        with graph.inserting_before(linear):
            both = graph.call_function(
                INSERT_LINEAR, (received, *linear.args[:2], dim, before, list(sent), list(rest), list(blocks))
            )
            whole, left = (graph.call_function(operator.getitem, (both, i)) for i in range(2))
        whole.meta = dict(insert.meta)
        left.meta = {"val": linear.meta["val"][..., rest[0] : rest[1]]}
        insert.replace_all_uses_with(whole)
        graph.erase_node(insert)
        graph.erase_node(own)
        for piece in list(linear.users):
            piece.args = (left, piece.args[1], piece.args[2] - rest[0], piece.args[3] - rest[0], *piece.args[4:])
        graph.erase_node(linear)


def _columns(insert: Any) -> tuple[Any, tuple[int, int], tuple[int, int]] | None:
    """Return the linear layer whose columns ``insert`` writes into an input with all rows, those columns, and the
    other columns that are read; None if ``insert`` does anything else."""
    _, own, dim, _, start, stop = insert.args
    if plain_slice(own) is None or len(own.users) != 1:
        return None
    linear = own.args[0]
    if linear.target is not _LINEAR or any(a is not None for a in linear.args[2:]) or linear.kwargs:
        return None
    shape = linear.meta["val"].shape
    if dim != len(shape) - 2 or any(s != 1 for s in shape[:dim]) or (start, stop) != (0, shape[dim]):
        return None
    taken = {user: plain_slice(user) for user in linear.users}
    columns = {user: t[1:] for user, t in taken.items() if t is not None and t[0] == len(shape) - 1}
    if len(columns) != len(taken) or len(columns) < 2:
        return None
    sent = columns.pop(own)
    rest = min(a for a, _ in columns.values()), max(b for _, b in columns.values())
    return (linear, sent, rest) if rest[1] <= sent[0] or rest[0] >= sent[1] else None


def plain_slice(node: fx.Node) -> tuple[int, int, int] | None:
    """Return (dim, start, stop) of a slice with step 1 within its tensor, or None for any other node."""
    args: Any = node.args
    if node.target is not _SLICE or len(args) < 4 or node.kwargs or args[4:] not in ((), (1,)):
        return None
    if not all(isinstance(a, int) and a >= 0 for a in args[1:4]):
        return None
    return args[1:4] if args[3] <= args[0].meta["val"].shape[args[1]] else None


def in_place(insert: fx.Node) -> bool:
    """Say whether an ``assemble_in_place`` may write into its input, because nothing else reads it."""
    args: Any = insert.args
    return insert.target is ops.assemble_in_place.default and args[0].op == "placeholder" and len(args[0].users) == 1


@remembered
def best_split_config(
    rows: int, inner: int, sent: int, rest: int, dtype: torch.dtype, whole: bool = False
) -> tuple[int, ...] | None:
    """Return the fastest computation of split columns on this GPU, or None for one matrix product and a copy.

    () is two matrix products; sizes of blocks are the custom kernel, which needs all columns of the layer (``whole``).
    """
    if not torch.cuda.is_available():
        return None
    x, weight = (torch.randn(n, inner, dtype=dtype, device="cuda") for n in (rows, rest + sent))
    place = torch.empty(rows, sent, dtype=dtype, device="cuda")

    def fused() -> tuple[Tensor, Tensor]:
        y = torch.mm(x, weight.t())
        return y[:, :rest], place.copy_(y[:, rest:])

    def split() -> tuple[Tensor, Tensor]:
        left = torch.mm(x, weight[:rest].t())
        matmul_into(place, x, weight[rest:])
        return left, place

    configs: dict[tuple[int, ...], Any] = {(): split}
    if whole and unavailable_reason() is None and inner % 8 == 0 and dtype.itemsize == 2:
        from districompile.backends.inductor.kernels import operators

        def by_kernel(config: tuple[int, ...]) -> tuple[Tensor, Tensor]:
            return operators.split_matmul(place, x, weight, rest, 0, list(config)), place

        configs |= {w: functools.partial(by_kernel, w) for w in _CONFIGS if sent % w[1] == 0 and rest % w[1] == 0}
    return best_config(
        "a linear layer with two results", fused, configs, reference=lambda: tuple(t.clone() for t in fused()),
        prepare=lambda: place.fill_(math.nan),
    )  # fmt: skip
