"""Normalisation: statistics over rows are merged over the ranks, everything else is local."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from districompile.cutter import Cutter, Value
from districompile.ir.layout import Factor, Layout, Refused, per_rank
from districompile.ir.ops import ops
from districompile.passes.rules.common import along
from districompile.registry import Sample, rule

aten = torch.ops.aten


def _group_norm_samples() -> Iterable[Sample]:
    w, b = torch.randn(6), torch.randn(6)
    yield Sample((torch.randn(2, 6, 9, 4) * 3 + 5, 3, w, b), (2, None, None))
    yield Sample((torch.randn(2, 6, 9), 2, w, b, 1e-6), (2, None, None))
    yield Sample((torch.randn(1, 6, 2, 9, 4), 3), (3,))
    yield Sample((torch.randn(9, 6, 5), 3, w, b), (0, None, None))


@rule(aten.group_norm.default, kind="statistics", samples=_group_norm_samples)
def group_norm(
    cut: Cutter, x: Value, groups: int, weight: Value | None = None, bias: Value | None = None, eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Value:  # fmt: skip
    """Each rank's (mean, variance) by group, merged over the ranks in float32: the biased variance of the whole
    image."""
    where = x.layout.cut
    if where is None or (weight is not None and weight.is_cut):
        raise Refused("the affine parameters are cut")
    if where.dim == 0:
        return along(cut, x, aten.group_norm.default, groups, weight, bias, eps, cudnn_enabled)
    if where.dim == 1:
        raise Refused("the channels are cut")
    moments = cut.emit(ops.moments.default, x, groups, name=f"{cut.target.name}_moments")  # type: ignore[union-attr]
    stats = merge(cut, x, moments, x.shape[1] // groups)
    node = cut.emit(ops.normalize.default, x, stats, groups, weight, bias, eps, name=cut.target.name)  # type: ignore[union-attr]
    return cut.value(node, x.layout)


def merge(cut: Cutter, x: Value, moments: torch.fx.Node, channels: int) -> torch.fx.Node:
    """Statistics of the whole from each rank's ``moments`` (1, 2, B, G): gathered along their first dim, then
    merged."""
    ranks = cut.ranks
    shape = (ranks, *moments.meta["local"][0].shape[1:])
    stats = cut.value(moments, Layout.whole(shape).with_dim(0, (Factor(ranks, tuple(range(ranks + 1))),)))
    gathered = cut.fetch(stats, [(0, ranks)] * ranks, kind="norm", any_order=True)
    counts = [float(channels * math.prod(x.layout.local_shape(r)[2:])) for r in range(ranks)]
    mine: Any = per_rank([counts[r:] + counts[:r] for r in range(ranks)])  # own first, as gathered
    return cut.emit(ops.merge_moments.default, gathered, mine)


@rule(
    aten.instance_norm.default,
    kind="statistics",
    samples=lambda: [
        Sample(
            (torch.randn(2, 6, 9, 4), torch.randn(6), torch.randn(6), None, None, True, 0.1, 1e-5, False),
            (2, None, None),
        ),
        Sample((torch.randn(2, 6, 9, 4), None, None, None, None, True, 0.1, 1e-5, False), (2,)),
    ],
)
def instance_norm(
    cut: Cutter, x: Value, weight: Value | None, bias: Value | None, mean: Value | None, var: Value | None,
    use_input_stats: bool, momentum: float, eps: float, cudnn: bool,
) -> Value:  # fmt: skip
    if not use_input_stats:
        raise Refused("instance norm over running statistics")
    return group_norm(cut, x, x.shape[1], weight, bias, eps)  # type: ignore[no-any-return]


@rule(
    aten.batch_norm.default, kind="statistics",
    samples=lambda: [
        Sample(
            (torch.randn(2, 6, 9, 4), torch.randn(6), torch.randn(6), torch.randn(6), torch.rand(6) + 0.5, False, 0.1,
             1e-5, False),
            (2, None, None, None, None),
        )
    ],
)  # fmt: skip
def batch_norm(
    cut: Cutter, x: Value, weight: Value | None, bias: Value | None, mean: Value | None, var: Value | None,
    training: bool, momentum: float, eps: float, cudnn: bool,
) -> Value:  # fmt: skip
    if training or x.cut_dim == 1:
        raise Refused("batch norm in training mode, or over cut channels")
    return along(cut, x, aten.batch_norm.default, weight, bias, mean, var, False, momentum, eps, cudnn)


@rule(
    aten.layer_norm.default, aten.rms_norm.default, kind="pass-through", mixed=True,
    samples=lambda: [Sample((torch.randn(2, 9, 6), [6]), (1,))],
)  # fmt: skip
def layer_norm(cut: Cutter, x: Value, shape: Sequence[int], *args: Any) -> Value:
    """Local where the normalised dims are whole."""
    if x.cut_dim is None or x.cut_dim >= x.ndim - len(shape):
        raise Refused("the rows are among the normalised dims")
    return along(cut, x, cut.target.target, list(shape), *args)  # type: ignore[union-attr]
