"""Matrix products: linear, matmul, bmm, baddbmm and einsum, all as one contraction over named dims."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from districompile.cutter import Cutter, Value
from districompile.ir.layout import Dim, Layout, Refused
from districompile.registry import Sample, rule

aten = torch.ops.aten


@rule(
    aten.linear.default, kind="pass-through",
    samples=lambda: [
        Sample((torch.randn(2, 9, 6), torch.randn(5, 6), torch.randn(5)), (1, None, None)),
        Sample((torch.randn(2, 9, 4, 6), torch.randn(5, 6)), (1, None)),
    ],
)  # fmt: skip
def linear(cut: Cutter, x: Value, weight: Value, bias: Value | None = None) -> Value:
    if weight.is_cut or (bias is not None and bias.is_cut):
        raise Refused("the weight is cut")
    if x.cut_dim == x.ndim - 1:
        raise Refused("the contracted dim is cut")
    layout = x.layout.with_dim(x.ndim - 1, Layout.whole(weight.shape).dims[0])
    return cut.call(aten.linear.default, x, weight, bias, layout=layout)


def _matmul_samples() -> Iterable[Sample]:
    yield Sample((torch.randn(2, 9, 6), torch.randn(2, 6, 9)), (1, 2))  # scores: keys are fetched
    yield Sample((torch.randn(2, 9, 9), torch.randn(2, 9, 6)), (1, 1))
    yield Sample((torch.randn(2, 9, 6), torch.randn(6, 4)), (1, None))
    yield Sample((torch.randn(2, 6, 9), torch.randn(2, 9, 5)), (2, 1))  # contracted over the rows: reduced
    yield Sample((torch.randn(9, 4, 6), torch.randn(9, 6, 4)), (0, 0))


@rule(aten.matmul.default, kind="contraction", samples=_matmul_samples)
@rule(
    aten.bmm.default, kind="contraction",
    samples=lambda: [Sample((torch.randn(2, 9, 6), torch.randn(2, 6, 9)), (1, 2))],
)  # fmt: skip
@rule(aten.mm.default, kind="contraction", samples=lambda: [Sample((torch.randn(9, 6), torch.randn(6, 4)), (0, None))])
def matmul(cut: Cutter, a: Value, b: Value) -> Value:
    if a.ndim < 2 or b.ndim < 2:
        raise Refused("a product with a vector")
    batch = len(cut.out_shape) - 2
    names = "ABCDEFG"[:batch]
    left = names[batch - (a.ndim - 2) :] + "xk"
    right = names[batch - (b.ndim - 2) :] + "ky"
    for value, term in ((a, left), (b, right)):
        for letter, size in zip(term[:-2], value.shape, strict=False):
            if size == 1 and cut.out_shape[names.index(letter)] != 1:
                raise Refused("the batch dims are broadcast")
    op: Any = cut.target.target  # type: ignore[union-attr]
    return contract(cut, [left, right], names + "xy", [a, b], lambda vs: cut.emit(op, *vs))


@rule(
    aten.baddbmm.default,
    kind="contraction",
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


@rule(aten.einsum.default, kind="contraction", samples=_einsum_samples)
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
