"""Products written where they are sent from.

Own keys and values go between those of other ranks, into memory that was received (decision 28). They are columns of
one product with the queries, so a copy puts them there. Two products, of which one writes there itself, spare the
copy; where rows are few, one product of all columns fills the GPU better. Both ways are measured, once for each size.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from districompile.backends.gpu.launch import unusable
from districompile.backends.timing import fastest
from districompile.ir.ops import ops

_LINEAR = torch.ops.aten.linear.default
_SLICE = torch.ops.aten.slice.Tensor
# Blocks of rows, columns, and of what is summed over; warps, stages
_WAYS = ((128, 128, 64, 8, 4), (128, 64, 64, 4, 4))

_LIB: Any = torch.library.Library("districompile", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIB.define("product_into(Tensor(a!) place, Tensor x, Tensor weight) -> ()")
_LIB.define(
    "insert_product(Tensor foreign, Tensor x, Tensor weight, int dim, int before, int[] sent, int[] rest,"
    " int[] blocks) -> (Tensor, Tensor)"
)


def product_into(place: Tensor, x: Tensor, weight: Tensor) -> None:
    """``place[...] = x @ weight.T``, without a result of its own. All are matrices."""
    torch.mm(x, weight.t(), out=place)


def insert_product(
    foreign: Tensor, x: Tensor, weight: Tensor, dim: int, before: int, sent: list[int], rest: list[int],
    blocks: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``linear(x, weight)`` by columns: ``sent`` (start, stop) inserted into ``foreign`` as
    :func:`districompile.ir.ops.insert` does, and ``rest``."""
    y = torch.nn.functional.linear(x, weight)
    own = y.narrow(-1, sent[0], sent[1] - sent[0])
    whole = ops.insert(foreign, own, dim, before, 0, own.shape[dim])
    return whole, y.narrow(-1, rest[0], rest[1] - rest[0]).contiguous()


def insert_product_in_place(
    foreign: Tensor, x: Tensor, weight: Tensor, dim: int, before: int, sent: list[int], rest: list[int],
    blocks: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same into an input that nothing else reads: by a kernel with two results, or, without ``blocks``, by two
    products."""
    x = x.as_strided(x.shape, x.stride())  # Inductor writes to memory what is read with strides, once for both
    rows = x.reshape(-1, x.shape[-1])
    if blocks and x.device.type == "cuda":
        from districompile.backends.gpu import operators

        left = operators.PRODUCT_APART(
            foreign, rows.contiguous(), weight, rest[1], before * (sent[1] - sent[0]), blocks
        )
        return foreign.movedim(0, dim), left.reshape(*x.shape[:-1], -1)
    place = foreign.narrow(0, before, rows.shape[0]).view(rows.shape[0], -1)
    ops.product_into(place, rows, weight[sent[0] : sent[1]])
    left = torch.mm(rows, weight[rest[0] : rest[1]].t())
    return foreign.movedim(0, dim), left.reshape(*x.shape[:-1], -1)


_LIB.impl("product_into", product_into, "CompositeExplicitAutograd")
torch.library.register_fake("districompile::product_into", lambda place, x, weight: None, lib=_LIB)
_LIB.impl("insert_product", insert_product, "CompositeImplicitAutograd")
INSERT_PRODUCT = torch.ops.districompile.insert_product.default


def split_products(graph: fx.Graph, kernels: bool = False) -> None:
    """Make one ``insert_product`` of every ``insert`` of columns of a product into an input, where two products, or a
    kernel of our own with two results (if ``kernels``), are faster here than one product and a copy."""
    insert: Any
    for insert in list(graph.nodes):
        found = _columns(insert) if in_place(insert) else None
        if found is None:
            continue
        product, sent, rest = found
        x = product.args[0].meta["val"]
        rows = x.numel() // x.shape[-1]
        columns = product.args[1].meta["val"].shape[0]
        both_whole = kernels and rest[0] == 0 and (rest[1], sent[1]) == (sent[0], columns)
        blocks = split_pays(rows, x.shape[-1], sent[1] - sent[0], rest[1] - rest[0], x.dtype, both_whole)
        if blocks is None:
            continue
        foreign, own, dim, before, _, _ = insert.args
        with graph.inserting_before(product):
            both = graph.call_function(
                INSERT_PRODUCT, (foreign, *product.args[:2], dim, before, list(sent), list(rest), list(blocks))
            )
            whole, left = (graph.call_function(operator.getitem, (both, i)) for i in range(2))
        whole.meta = dict(insert.meta)
        left.meta = {"val": product.meta["val"][..., rest[0] : rest[1]]}
        insert.replace_all_uses_with(whole)
        graph.erase_node(insert)
        graph.erase_node(own)
        for part in list(product.users):
            part.args = (left, part.args[1], part.args[2] - rest[0], part.args[3] - rest[0], *part.args[4:])
        graph.erase_node(product)


def _columns(insert: Any) -> tuple[Any, tuple[int, int], tuple[int, int]] | None:
    """The product of whose columns ``insert`` puts all rows into an input; which columns, and which others are read."""
    _, own, dim, _, start, stop = insert.args
    if plain_slice(own) is None or len(own.users) != 1:
        return None
    product = own.args[0]
    if product.target is not _LINEAR or any(a is not None for a in product.args[2:]) or product.kwargs:
        return None
    shape = product.meta["val"].shape
    if dim != len(shape) - 2 or any(s != 1 for s in shape[:dim]) or (start, stop) != (0, shape[dim]):
        return None
    taken = {user: plain_slice(user) for user in product.users}
    columns = {user: t[1:] for user, t in taken.items() if t is not None and t[0] == len(shape) - 1}
    if len(columns) != len(taken) or len(columns) < 2:
        return None
    sent = columns.pop(own)
    rest = min(a for a, _ in columns.values()), max(b for _, b in columns.values())
    return (product, sent, rest) if rest[1] <= sent[0] or rest[0] >= sent[1] else None


def plain_slice(node: fx.Node) -> tuple[int, int, int] | None:
    """(dim, start, stop) of a node that takes elements in a row, all of them there."""
    args: Any = node.args
    if node.target is not _SLICE or len(args) < 4 or node.kwargs or args[4:] not in ((), (1,)):
        return None
    if not all(isinstance(a, int) and a >= 0 for a in args[1:4]):
        return None
    return args[1:4] if args[3] <= args[0].meta["val"].shape[args[1]] else None


def in_place(insert: fx.Node) -> bool:
    """Whether an ``insert`` may write into what it is given: an input that nothing else reads."""
    args: Any = insert.args
    return insert.target is ops.insert.default and args[0].op == "placeholder" and len(args[0].users) == 1


@functools.cache
def split_pays(
    rows: int, inner: int, sent: int, rest: int, dtype: torch.dtype, whole: bool = False
) -> tuple[int, ...] | None:
    """How columns are written apart fastest, if that is faster than one product and a copy, on this GPU: in blocks of
    our own kernel, which takes a product ``whole``, or () for two products."""
    if not torch.cuda.is_available():
        return None
    x, weight = (torch.randn(n, inner, dtype=dtype, device="cuda") for n in (rows, rest + sent))
    place = torch.empty(rows, sent, dtype=dtype, device="cuda")

    def together() -> tuple[Tensor, Tensor]:
        y = torch.mm(x, weight.t())
        return y[:, :rest], place.copy_(y[:, rest:])

    def apart() -> tuple[Tensor, Tensor]:
        left = torch.mm(x, weight[:rest].t())
        product_into(place, x, weight[rest:])
        return left, place

    ways: dict[tuple[int, ...], Any] = {(): apart}
    if whole and unusable() is None and inner % 8 == 0 and dtype.itemsize == 2:
        from districompile.backends.gpu import operators

        def by_kernel(way: tuple[int, ...]) -> tuple[Tensor, Tensor]:
            return operators.product_apart(place, x, weight, rest, 0, list(way)), place

        ways |= {w: functools.partial(by_kernel, w) for w in _WAYS if sent % w[1] == 0 and rest % w[1] == 0}
    return fastest(
        "a product with two results", together, ways, reference=lambda: tuple(t.clone() for t in together()),
        prepare=lambda: place.fill_(math.nan),
    )  # fmt: skip
