"""Matrix products: linear, matmul, bmm, baddbmm and einsum, all as one contraction over named dims."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from districompile.cutter import Cutter, Value
from districompile.ir.layout import Dim, Factor, Layout, Refused
from districompile.registry import Sample, rule

aten = torch.ops.aten


@rule(
    aten.linear.default, kind="pass-through", mixed=True,
    samples=lambda: [
        Sample((torch.randn(2, 9, 6), torch.randn(5, 6), torch.randn(5)), (1, None, None)),
        Sample((torch.randn(2, 9, 4, 6), torch.randn(5, 6)), (1, None)),
        Sample((torch.randn(2, 3, 9), torch.randn(7, 9), torch.randn(7)), (2, None, None)),
        Sample((torch.randn(2, 3, 9), torch.randn(1, 9), torch.randn(1)), (2, None, None)),
    ],
)  # fmt: skip
def linear(cut: Cutter, x: Value, weight: Value, bias: Value | None = None) -> Value:
    if weight.is_cut or (bias is not None and bias.is_cut):
        raise Refused("the weight is cut")
    if x.cut_dim == x.ndim - 1:
        return _mixing(cut, x, weight, bias)
    layout = x.layout.with_dim(x.ndim - 1, Layout.whole(weight.shape).dims[0])
    return cut.call(aten.linear.default, x, weight, bias, layout=layout)


def _mixing(cut: Cutter, x: Value, weight: Value, bias: Value | None) -> Value:
    """The rows themselves are contracted (an MLP over tokens): each rank computes some of the new features from all
    rows."""
    whole = cut.gather(x, kind="attention")
    layout = Layout.whole(cut.out_shape)
    try:
        bounds = cut.bounds(weight.shape[0])
    except Refused:
        return cut.call(aten.linear.default, whole, weight, bias, layout=layout)
    factor = (Factor(weight.shape[0], bounds),)
    weight = cut.take(weight, Layout.whole(weight.shape).with_dim(0, factor))
    bias = None if bias is None else cut.take(bias, Layout((factor,)))
    return cut.call(aten.linear.default, whole, weight, bias, layout=layout.with_dim(x.ndim - 1, factor))


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


@rule(aten.matmul.default, kind="contraction", mixed=True, samples=_matmul_samples)
@rule(
    aten.bmm.default, kind="contraction", mixed=True,
    samples=lambda: [Sample((torch.randn(2, 9, 6), torch.randn(2, 6, 9)), (1, 2))],
)  # fmt: skip
@rule(
    aten.mm.default,
    kind="contraction",
    mixed=True,
    samples=lambda: [Sample((torch.randn(9, 6), torch.randn(6, 4)), (0, None))],
)
def matmul(cut: Cutter, a: Value, b: Value) -> Value:
    batch = max(a.ndim, b.ndim, 2) - 2
    names = "ABCDEFG"[:batch]
    left = "k" if a.ndim == 1 else names[batch - (a.ndim - 2) :] + "xk"
    right = "k" if b.ndim == 1 else names[batch - (b.ndim - 2) :] + "ky"
    out = names + ("x" if a.ndim > 1 else "") + ("y" if b.ndim > 1 else "")
    op = cut.operator
    return contract(cut, [left, right], out, [a, b], lambda vs: cut.emit(op, *vs))


@rule(
    aten.baddbmm.default,
    kind="contraction",
    mixed=True,
    samples=lambda: [
        Sample(
            (torch.randn(2, 9, 9), torch.randn(2, 9, 6), torch.randn(2, 6, 9)), (None, 1, 2), {"beta": 0, "alpha": 0.3}
        ),
        Sample(
            (torch.randn(2, 9, 5), torch.randn(2, 9, 6), torch.randn(2, 6, 5)), (1, 1, None), {"beta": 2, "alpha": 0.3}
        ),
    ],
)
def baddbmm(cut: Cutter, c: Value, a: Value, b: Value, *, beta: Any = 1, alpha: Any = 1) -> Value:
    """With ``beta`` 0 the first operand is ignored, as torch does (diffusers passes it uninitialised)."""
    if not (a.is_cut or b.is_cut):
        raise Refused("the addend alone is cut")
    product = contract(cut, ["Axk", "Aky"], "Axy", [a, b], lambda vs: cut.emit(aten.bmm.default, *vs))
    node = product.node if alpha == 1 else cut.emit(aten.mul.Tensor, product, alpha)
    if beta:
        where = product.layout.cut
        addend = (
            c if where is None or c.shape[where.dim] == 1 else cut.align(c, where.dim, product.layout.dims[where.dim])
        )
        scaled = addend.node if beta == 1 else cut.emit(aten.mul.Tensor, addend, beta)
        node = cut.emit(aten.add.Tensor, scaled, node)
    return cut.value(node, product.layout)


def _einsum_samples() -> Iterable[Sample]:
    q, k = torch.randn(2, 9, 6), torch.randn(2, 9, 6)
    yield Sample(("bid,bjd->bij", [q, k]), (1, 1))
    yield Sample(("bij,bjd->bid", [torch.randn(2, 9, 9), k]), (1, 1))
    yield Sample(("bnd,bne->bde", [q, k]), (1, 1))
    yield Sample(("b h d i, b h d j -> b h i j", [torch.randn(2, 2, 3, 9), torch.randn(2, 2, 3, 9)]), (3, 3))
    yield Sample(("...id,...jd->...ij", [q, k]), (1, 1))
    yield Sample(("bid,bd->bi", [q, torch.randn(2, 6)]), (1, None))
    yield Sample(("bid,bjd,bj->bi", [q, k, torch.randn(2, 9)]), (1, 1, 1))


@rule(aten.einsum.default, kind="contraction", mixed=True, samples=_einsum_samples)
def einsum(cut: Cutter, equation: str, operands: Sequence[Value], **kwargs: Any) -> Value:
    terms, out = _expand_ellipsis(equation.replace(" ", ""), [v.ndim for v in operands])
    if any(len(set(t)) != len(t) for t in terms):
        raise Refused("an einsum with a repeated letter in one operand")
    text = ",".join(terms) + "->" + out
    return contract(cut, terms, out, list(operands), lambda vs: cut.emit(aten.einsum.default, text, vs))


def _expand_ellipsis(equation: str, ndims: Sequence[int]) -> tuple[list[str], str]:
    """Terms and output with every ``...`` spelled out in letters of its own; an implicit output is made explicit."""
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


def contract(cut: Cutter, terms: Sequence[str], out: str, operands: Sequence[Value], local: Any) -> Value:
    """A contraction. The cut letter that survives to the output stays cut, operands cut elsewhere are fetched whole;
    where none survives, ranks contract their own rows and the partial results are summed."""
    cut_letters = []
    for term, v in zip(terms, operands, strict=True):
        where = v.layout.cut
        if where is not None:
            cut_letters.append((term[where.dim], v.layout.dims[where.dim]))
    kept = sorted((c for c in cut_letters if c[0] in out), key=lambda c: out.index(c[0]))
    if len(kept) > 1:
        later = normalised_dims(cut.target)
        kept.sort(key=lambda c: out.index(c[0]) in later)  # scores: rows of queries stay, keys are fetched
    if not kept:
        operands = [cut.unmixed(v) for v in operands]
        cut_letters = [(c, tuple(f.unmixed for f in factors)) for c, factors in cut_letters]
    letter, factors = kept[0] if kept else cut_letters[0]
    aligned = [_operand(cut, v, t, letter, factors) for t, v in zip(terms, operands, strict=True)]
    node = local(aligned)
    if letter not in out:
        # The partial sums travel in their own dtype, as the operator's own accumulation would end in it
        return cut.reduce(node, "sum")
    return cut.value(node, Layout.whole(cut.out_shape).with_dim(out.index(letter), factors))


def _operand(cut: Cutter, v: Value, term: str, letter: str, factors: Dim) -> Value:
    where = v.layout.cut
    if where is not None and term[where.dim] != letter:
        v = cut.gather(v, kind="attention")
    if letter not in term or v.shape[term.index(letter)] == 1:
        return v
    return cut.align(v, term.index(letter), factors, kind="attention")


def normalised_dims(node: torch.fx.Node | None, limit: int = 8) -> set[int]:
    """The dims of a node's result over which a softmax (or a sum of exponentials) further down goes: those of the keys
    in a matrix of scores, however it is written. Follows the first users through operators that keep or permute
    dims."""
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
    """What becomes of ``dims`` in ``user``: where they are then; the one that is normalised; or None: lost."""
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
        return dims  # pointwise, or as good as
    return None
