# SPDX-License-Identifier: Apache-2.0
"""Replace a normalisation that is made of a mean and a variance by one group norm or layer norm.

Before:

    %view = aten.view(%sample, [1, 2, 2, 8, 4])
    %mean = aten.mean.dim(%view, [2, 3, 4], True)
    %var = aten.var.dim(%view, [2, 3, 4], True, True)
    %sub = aten.sub(%view, %mean)
    %add = aten.add(%var, 1e-05)
    %rsqrt = aten.rsqrt(%add)
    %mul = aten.mul(%sub, %rsqrt)
    %view_1 = aten.view(%mul, [1, 4, 8, 4])

After:

    %group_norm_default = aten.group_norm(%sample, 2, None, None, ...)
    %mul_tensor = aten.mul(%group_norm_default, ...)

The factor is there because this variance divides by n - 1, and that of a group norm by n.

Some networks write group norms in this way, those of CorrDiff among them. Made of parts, each statistic is a sum over
the ranks that every step waits for, three for each norm. One group norm has one, and displaced steps do not wait for it
(:mod:`~districompile.passes.group_norm_mode`).
"""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from districompile.ir.graph import insert_before
from districompile.ir.unit import CompilationUnit, Stage

aten = torch.ops.aten

_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


@dataclasses.dataclass(frozen=True)
class _Norm:
    """A normalisation of ``x`` over its last dims from ``first`` on; the variance is divided by n - ``correction``."""

    x: fx.Node
    first: int
    eps: float
    correction: float


@dataclasses.dataclass(frozen=True)
class FuseNorms:
    """The pass ``fuse-norms``: it requires fake values on all nodes, and a functional graph.

    A normalisation over all dims but the first is a layer norm. One over the last dims of an image or a volume, whose
    channels may be divided into groups, is a group norm. Others stay: those over channels alone, for which no rank
    waits, and those whose dims say nothing certain.
    """

    name: ClassVar[str] = "fuse-norms"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "global"
    gives: ClassVar[Stage] = "global"

    def run(self, unit: CompilationUnit) -> None:
        for node in list(unit.graph.nodes):
            norm = _match(node)
            if norm is not None:
                _replace(node, norm)
        unit.graph.eliminate_dead_code()


def _match(node: fx.Node) -> _Norm | None:
    """Recognise ``(x - mean) * rsqrt(var + eps)`` or ``(x - mean) / sqrt(var + eps)``, of floating-point numbers."""
    args: Any = node.args
    if node.target == aten.mul.Tensor:
        pairs, power = [(args[0], args[1]), (args[1], args[0])], -0.5
    elif node.target == aten.div.Tensor:
        pairs, power = [(args[0], args[1])], 0.5
    else:
        return None
    for centred, root in pairs:
        inside = _under_root(root, power)
        if inside is not None and _is(centred, aten.sub.Tensor):
            found = _statistics(centred, *inside)
            if found is not None and node.meta["val"].dtype == found.x.meta["val"].dtype:
                return found
    return None


def _is(x: Any, *targets: Any) -> bool:
    """Say whether ``x`` is a call of one of the operators, without keyword arguments such as a dtype."""
    return isinstance(x, fx.Node) and x.target in targets and not x.kwargs


def _under_root(root: Any, power: float) -> tuple[fx.Node, float] | None:
    """Return the variance and what is added to it, of the value that is to the power of ``power``."""
    if _is(root, aten.pow.Tensor_Scalar):
        fits = root.args[1] == power
    elif power < 0 and _is(root, aten.reciprocal.default):
        root = root.args[0]
        fits = _is(root, aten.sqrt.default)
    else:
        fits = _is(root, aten.rsqrt.default if power < 0 else aten.sqrt.default)
    total: Any = root.args[0] if fits else None
    if not _is(total, aten.add.Tensor, aten.add.Scalar):
        return None
    variance, eps = total.args[:2]
    return (variance, float(eps)) if isinstance(variance, fx.Node) and isinstance(eps, int | float) else None


def _statistics(centred: Any, variance: fx.Node, eps: float) -> _Norm | None:
    """Check that a value is centred by the mean of the dims that its variance is of, which are its last ones."""
    x, mean = centred.args[:2]
    if not isinstance(x, fx.Node) or not isinstance(mean, fx.Node) or not isinstance(x.meta.get("val"), Tensor):
        return None
    dims, correction = _variance_of(variance, x, mean, centred)
    if dims is None or _mean_of(mean, x) != dims:
        return None
    value: Tensor = x.meta["val"]
    first = value.ndim - len(dims)
    fits = dims == tuple(range(first, value.ndim)) and value.is_floating_point() and eps >= 0
    return _Norm(x, first, eps, correction) if fits and math.prod(value.shape[first:]) > correction else None


def _mean_of(node: Any, x: fx.Node) -> tuple[int, ...] | None:
    """Return the dims of ``x`` whose mean ``node`` is, with the dims kept."""
    if node.target == aten.mean.dim and node.args[0] is x:
        given = _arguments(node)
        return _dims(given["dim"], x) if given["keepdim"] and given["dtype"] is None else None
    return _variance_dims(node.args[0], x)[0] if _part_of_pair(node) == 1 else None


def _variance_of(node: Any, x: fx.Node, mean: fx.Node, centred: fx.Node) -> tuple[tuple[int, ...] | None, float]:
    """Return the dims of ``x`` whose variance ``node`` is, with the dims kept, and the correction of its count."""
    if _part_of_pair(node) == 0:
        return _variance_dims(node.args[0], x)
    if node.target in (aten.var.dim, aten.var.correction):
        return _variance_dims(node, x)
    if node.target == aten.mean.dim:  # of the squares
        squared = node.args[0]
        square = _is(squared, aten.pow.Tensor_Scalar) and squared.args[1] == 2
        product = _is(squared, aten.mul.Tensor) and squared.args[0] is squared.args[1]
        base: Any = squared.args[0] if square or product else None
        if base is centred or (_is(base, aten.sub.Tensor) and base.args == (x, mean)):
            return _mean_of(node, squared), 0
    return None, 0


def _part_of_pair(node: Any) -> int | None:
    """Return which result of ``var_mean`` a node is: 0 the variance, 1 the mean."""
    pair = _is(node, operator.getitem) and node.args[0].target == aten.var_mean.correction
    return int(node.args[1]) if pair else None


def _variance_dims(node: Any, x: fx.Node) -> tuple[tuple[int, ...] | None, float]:
    """Return the dims of a variance of ``x``, and its correction; no dims where they are not kept."""
    given = _arguments(node)
    correction = given.get("correction", float(given.get("unbiased", True)))
    correction = 1.0 if correction is None else correction  # PyTorch's default
    if node.args[0] is not x or not given["keepdim"] or not isinstance(correction, int | float):
        return None, 0
    return _dims(given["dim"], x), float(correction)


def _arguments(node: Any) -> dict[str, Any]:
    """Return the arguments of a call by name, defaults included."""
    schema = node.target._schema.arguments
    given = {a.name: value for a, value in zip(schema, node.args, strict=False)}
    return {**{a.name: a.default_value for a in schema}, **given, **node.kwargs}


def _dims(dims: Any, x: Any) -> tuple[int, ...] | None:
    ndim = x.meta["val"].ndim
    if not isinstance(dims, list | tuple) or not dims or not all(isinstance(d, int) for d in dims):
        return None
    return tuple(sorted(d % ndim for d in dims))


def _replace(node: fx.Node, norm: _Norm) -> None:
    """Insert the norm before ``node``, and let the users of ``node`` read it."""
    shape = list(norm.x.meta["val"].shape)
    count = math.prod(shape[norm.first :])
    grow = count / (count - norm.correction)  # what the variance is over that with n in the denominator
    eps = norm.eps / grow
    source = _before_grouping(norm.x) if norm.first == 2 else None
    if norm.first == 1 and len(shape) > 2:
        new = insert_before(node, aten.layer_norm.default, norm.x, shape[1:], None, None, eps)
    elif source is not None or (norm.first == 2 and len(shape) > 3):
        new = insert_before(node, aten.group_norm.default, source or norm.x, shape[1], None, None, eps)
    else:
        return
    if norm.correction:
        new = insert_before(node, aten.mul.Tensor, new, grow**-0.5)
    if source is not None:
        for user in list(node.users):  # views back to the image
            if user.target in _VIEWS and user.meta["val"].shape == new.meta["val"].shape:
                user.replace_all_uses_with(new)
                node.graph.erase_node(user)
        if node.users:
            new = insert_before(node, aten.reshape.default, new, shape)
    node.replace_all_uses_with(new)


def _before_grouping(x: fx.Node) -> fx.Node | None:
    """Return the image or volume (batch, channels, ...) that ``x`` is a view of, if dim 1 of ``x`` are its groups.

    As many groups as channels are none: a view of (batch, tokens, heads, width) as (batch, tokens, channels) looks like
    one to (batch, groups, rest).
    """
    source: Any = x.args[0] if x.target in _VIEWS else None
    if source is None:
        return None
    shape, before = x.meta["val"].shape, source.meta["val"].shape
    grouped = len(before) > 3 and before[0] == shape[0] and before[1] % shape[1] == 0 and before[1] > shape[1]
    return source if grouped else None
