# SPDX-License-Identifier: Apache-2.0
"""Matrix products: linear, matmul, bmm, baddbmm and einsum, all as one contraction over named dims."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from districompile.ir.layout import Dim, Factor, Layout, Refused
from districompile.sharding.builder import ShardedValue, ShardingBuilder
from districompile.sharding.registry import Sample, rule

aten = torch.ops.aten


@rule(
    aten.linear.default, partially_replicated=True,
    samples=lambda: [
        Sample((torch.randn(2, 9, 6), torch.randn(5, 6), torch.randn(5)), (1, None, None)),
        Sample((torch.randn(2, 9, 4, 6), torch.randn(5, 6)), (1, None)),
        Sample((torch.randn(2, 3, 9), torch.randn(7, 9), torch.randn(7)), (2, None, None)),
        Sample((torch.randn(2, 3, 9), torch.randn(1, 9), torch.randn(1)), (2, None, None)),
    ],
)  # fmt: skip
def linear(
    builder: ShardingBuilder, x: ShardedValue, weight: ShardedValue, bias: ShardedValue | None = None
) -> ShardedValue:
    """Shard a linear: local, unless the rows are the features that it contracts."""
    if weight.is_sharded or (bias is not None and bias.is_sharded):
        raise Refused("the weight is sharded")
    if x.sharded_dim == x.ndim - 1:
        return _mixing(builder, x, weight, bias)
    layout = x.layout.with_dim(x.ndim - 1, Layout.replicated(weight.shape).dims[0])
    return builder.call(aten.linear.default, x, weight, bias, layout=layout)


def _mixing(builder: ShardingBuilder, x: ShardedValue, weight: ShardedValue, bias: ShardedValue | None) -> ShardedValue:
    """Shard a linear that contracts the rows (an MLP over tokens): each rank computes some features from all rows."""
    gathered = builder.gather(x, purpose="attention")
    layout = Layout.replicated(builder.out_shape)
    try:
        bounds = builder.bounds(weight.shape[0])
    except Refused:
        return builder.call(aten.linear.default, gathered, weight, bias, layout=layout)
    factor = (Factor(weight.shape[0], bounds),)
    weight = builder.slice_local(weight, Layout.replicated(weight.shape).with_dim(0, factor))
    bias = None if bias is None else builder.slice_local(bias, Layout((factor,)))
    return builder.call(aten.linear.default, gathered, weight, bias, layout=layout.with_dim(x.ndim - 1, factor))


def _matmul_samples() -> Iterable[Sample]:
    yield Sample((torch.randn(2, 9, 6), torch.randn(2, 6, 9)), (1, 2))  # scores: keys are fetched
    yield Sample((torch.randn(2, 9, 9), torch.randn(2, 9, 6)), (1, 1))
    yield Sample((torch.randn(2, 9, 6), torch.randn(6, 4)), (1, None))
    yield Sample((torch.randn(2, 6, 9), torch.randn(2, 9, 5)), (2, 1))  # contracted over the rows: reduced
    yield Sample((torch.randn(9, 4, 6), torch.randn(9, 6, 4)), (0, 0))
    yield Sample((torch.randn(2, 9, 6), torch.randn(6)), (1, None))
    yield Sample((torch.randn(2, 4, 9), torch.randn(9)), (2, 0))
    yield Sample((torch.randn(2, 3, 9, 6), torch.randn(2, 1, 6, 9)), (2, 3))
    yield Sample((torch.randn(1, 9, 4, 6), torch.randn(5, 1, 6, 3)), (1, None))


@rule(aten.matmul.default, partially_replicated=True, samples=_matmul_samples)
@rule(
    aten.bmm.default, partially_replicated=True,
    samples=lambda: [Sample((torch.randn(2, 9, 6), torch.randn(2, 6, 9)), (1, 2))],
)  # fmt: skip
@rule(
    aten.mm.default,
    partially_replicated=True,
    samples=lambda: [Sample((torch.randn(9, 6), torch.randn(6, 4)), (0, None))],
)
def matmul(builder: ShardingBuilder, a: ShardedValue, b: ShardedValue) -> ShardedValue:
    """Shard ``matmul``, ``bmm`` and ``mm`` as contractions (see :func:`contract`)."""
    batch = max(a.ndim, b.ndim, 2) - 2
    names = "ABCDEFG"[:batch]
    left = "k" if a.ndim == 1 else names[batch - (a.ndim - 2) :] + "xk"
    right = "k" if b.ndim == 1 else names[batch - (b.ndim - 2) :] + "ky"
    out = names + ("x" if a.ndim > 1 else "") + ("y" if b.ndim > 1 else "")
    op = builder.operator
    return contract(builder, [left, right], out, [a, b], lambda vs: builder.emit(op, *vs))


@rule(
    aten.baddbmm.default,
    partially_replicated=True,
    samples=lambda: [
        Sample(
            (torch.randn(2, 9, 9), torch.randn(2, 9, 6), torch.randn(2, 6, 9)), (None, 1, 2), {"beta": 0, "alpha": 0.3}
        ),
        Sample(
            (torch.randn(2, 9, 5), torch.randn(2, 9, 6), torch.randn(2, 6, 5)), (1, 1, None), {"beta": 2, "alpha": 0.3}
        ),
    ],
)
def baddbmm(
    builder: ShardingBuilder, c: ShardedValue, a: ShardedValue, b: ShardedValue, *, beta: Any = 1, alpha: Any = 1
) -> ShardedValue:
    """Shard ``baddbmm``. With ``beta`` 0 the first operand is ignored, as in torch: diffusers passes it unset."""
    if not (a.is_sharded or b.is_sharded):
        raise Refused("the addend alone is sharded")
    product = contract(builder, ["Axk", "Aky"], "Axy", [a, b], lambda vs: builder.emit(aten.bmm.default, *vs))
    node = product.node if alpha == 1 else builder.emit(aten.mul.Tensor, product, alpha)
    if beta:
        axis = product.layout.sharded_axis
        addend = (
            c
            if axis is None or c.shape[axis.dim] == 1
            else builder.redistribute(c, axis.dim, product.layout.dims[axis.dim])
        )
        scaled = addend.node if beta == 1 else builder.emit(aten.mul.Tensor, addend, beta)
        node = builder.emit(aten.add.Tensor, scaled, node)
    return builder.value(node, product.layout)


def _einsum_samples() -> Iterable[Sample]:
    q, k = torch.randn(2, 9, 6), torch.randn(2, 9, 6)
    yield Sample(("bid,bjd->bij", [q, k]), (1, 1))
    yield Sample(("bij,bjd->bid", [torch.randn(2, 9, 9), k]), (1, 1))
    yield Sample(("bnd,bne->bde", [q, k]), (1, 1))
    yield Sample(("b h d i, b h d j -> b h i j", [torch.randn(2, 2, 3, 9), torch.randn(2, 2, 3, 9)]), (3, 3))
    yield Sample(("...id,...jd->...ij", [q, k]), (1, 1))
    yield Sample(("bid,bd->bi", [q, torch.randn(2, 6)]), (1, None))
    yield Sample(("bid,bjd,bj->bi", [q, k, torch.randn(2, 9)]), (1, 1, 1))


@rule(aten.einsum.default, partially_replicated=True, samples=_einsum_samples)
def einsum(builder: ShardingBuilder, equation: str, operands: Sequence[ShardedValue], **kwargs: Any) -> ShardedValue:
    """Shard ``einsum`` (see :func:`contract`). Raise :class:`Refused` for a letter that one operand repeats."""
    terms, out = _expand_ellipsis(equation.replace(" ", ""), [v.ndim for v in operands])
    if any(len(set(t)) != len(t) for t in terms):
        raise Refused("an einsum with a repeated letter in one operand")
    text = ",".join(terms) + "->" + out
    return contract(builder, terms, out, list(operands), lambda vs: builder.emit(aten.einsum.default, text, vs))


def _expand_ellipsis(equation: str, ndims: Sequence[int]) -> tuple[list[str], str]:
    """Return terms and output of an equation, with letters for every ``...``, and with an explicit output."""
    left, arrow, out = equation.partition("->")
    terms = left.split(",")
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    width = max((n - len(t.replace("...", "")) for t, n in zip(terms, ndims, strict=True) if "..." in t), default=0)
    letters = "".join(spare[:width])
    terms = [
        t.replace("...", letters[width - (n - len(t.replace("...", ""))) :]) for t, n in zip(terms, ndims, strict=True)
    ]
    if not arrow:
        joined = "".join(terms)
        out = letters + "".join(sorted(c for c in set(joined) if joined.count(c) == 1 and c not in letters))
    return terms, out.replace("...", letters)


def contract(
    builder: ShardingBuilder, terms: Sequence[str], out: str, operands: Sequence[ShardedValue], local: Any
) -> ShardedValue:
    """Contract operands whose dims are named by letters, as einsum does.

    A sharded letter of the output stays sharded, and operands that are sharded elsewhere are gathered. Where there is
    no such letter, ranks contract their own rows, and the partial results are summed.
    """
    sharded_letters = []
    for term, v in zip(terms, operands, strict=True):
        axis = v.layout.sharded_axis
        if axis is not None:
            sharded_letters.append((term[axis.dim], v.layout.dims[axis.dim]))
    kept = sorted((c for c in sharded_letters if c[0] in out), key=lambda c: out.index(c[0]))
    if len(kept) > 1:
        later = normalised_dims(builder.target)
        kept.sort(key=lambda c: out.index(c[0]) in later)  # scores: rows of queries stay, keys are fetched
    if not kept:
        operands = [builder.drop_replicas(v, any_order=True) for v in operands]
        sharded_letters = [(c, tuple(f.drop_replicas for f in factors)) for c, factors in sharded_letters]
    letter, factors = kept[0] if kept else sharded_letters[0]
    aligned = [_operand(builder, v, t, letter, factors) for t, v in zip(terms, operands, strict=True)]
    node = local(aligned)
    if letter not in out:
        # The partial sums are sent in the operator's result dtype, in which its own accumulation ends, too
        return builder.reduce(node, "sum")
    return builder.value(node, Layout.replicated(builder.out_shape).with_dim(out.index(letter), factors))


def _operand(builder: ShardingBuilder, v: ShardedValue, term: str, letter: str, factors: Dim) -> ShardedValue:
    axis = v.layout.sharded_axis
    if axis is not None and term[axis.dim] != letter:
        v = builder.gather(v, purpose="attention")
    if letter not in term or v.shape[term.index(letter)] == 1:
        return v
    return builder.redistribute(v, term.index(letter), factors, purpose="attention")


def normalised_dims(node: torch.fx.Node | None, limit: int = 8) -> set[int]:
    """Find the dims of a node's result that a later softmax (or a sum of exponentials) normalises.

    In a matrix of scores these are the dims of the keys, however attention is written. The search follows the first
    users through operators that keep or permute dims, up to ``limit`` operators deep.
    """
    found: set[int] = set()
    if node is None:
        return found
    ndim = node.meta["val"].ndim
    paths = [(node, list(range(ndim)))]  # where each original dim is now
    for _ in range(limit):
        following = []
        for at, dims in paths:
            for user in at.users:
                step = _follow(user, at, dims)
                if isinstance(step, int):
                    found.add(dims.index(step))
                elif step is not None:
                    following.append((user, step))
        if found or not following:
            break
        paths = following[:4]
    return found


_SUMS = {"aten::softmax", "aten::_softmax", "aten::amax", "aten::sum", "aten::logsumexp", "aten::max"}


def _follow(user: torch.fx.Node, at: torch.fx.Node, dims: list[int]) -> list[int] | int | None:
    """Return where ``dims`` are in ``user``, or the dim that is normalised, or None where that is unknown."""
    name = user.target._schema.name if isinstance(user.target, torch._ops.OpOverload) else ""
    value, args = user.meta.get("val"), list[Any](user.args)
    if name in _SUMS and len(user.args) > 1:
        which: Any = user.args[1]
        which = which[0] if isinstance(which, list | tuple) and which else which
        return int(which) % len(dims) if isinstance(which, int) and int(which) % len(dims) in dims else None
    if name in ("aten::transpose", "aten::permute"):
        order = list(range(len(dims)))
        if name == "aten::transpose":
            a, b = (int(i) % len(dims) for i in args[1:3])
            order[a], order[b] = order[b], order[a]
        else:
            order = [int(i) % len(dims) for i in args[1]]
        return [order.index(d) for d in dims]
    if isinstance(value, torch.Tensor) and value.shape == at.meta["val"].shape:
        return dims  # pointwise, or an operator that keeps dims in the same way
    return None
