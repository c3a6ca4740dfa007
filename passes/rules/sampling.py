"""Sampling at computed positions: warps by a flow field, deformable windows, spatial transformers."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from districompile.cutter import Cutter, Value
from districompile.ir.layout import Layout, Refused
from districompile.registry import Sample, rule

aten = torch.ops.aten


def _grid_samples() -> Iterable[Sample]:
    x, grid = torch.randn(2, 3, 9, 5), torch.rand(2, 8, 4, 2) * 2.4 - 1.2
    for mode, edge, corners in ((0, 0, False), (0, 1, True), (1, 2, False), (2, 0, True)):
        yield Sample((x, grid, mode, edge, corners), (2, 1))
    yield Sample((x, grid, 0, 0, False), (2, None))
    yield Sample((x, grid, 0, 0, False), (None, 2))
    yield Sample((torch.randn(9, 3, 4, 5), torch.rand(9, 8, 4, 2), 0, 0, False), (0, 0))
    yield Sample((torch.randn(2, 3, 4, 9, 5), torch.rand(2, 3, 8, 4, 3), 0, 0, False), (3, 2))


@rule(aten.grid_sampler.default, kind="everything",
      samples=_grid_samples)  # fmt: skip
def grid_sampler(cut: Cutter, x: Value, grid: Value, mode: int, edge: int, corners: bool) -> Value:
    """Each rank samples at its own positions, which may be anywhere: it takes all rows."""
    op = cut.operator
    shape = cut.out_shape
    if x.cut_dim == 0 or grid.cut_dim == 0:
        leader = grid if grid.cut_dim == 0 else x
        parts = [cut.align(v, 0, leader.layout.dims[0]) for v in (x, grid)]
        return cut.call(op, *parts, mode, edge, corners, layout=Layout.whole(shape).with_dim(0, leader.layout.dims[0]))
    x_dim = x.cut_dim
    whole = cut.gather(x)
    if not grid.is_cut and x_dim is not None and x_dim > 1:
        # Positions that come from a few numbers (an affine map): each rank takes those of its rows
        try:
            grid = cut.take(grid, Layout.cut_at(grid.shape, x_dim - 1, cut.bounds(shape[x_dim])))
        except Refused:
            return cut.whole_value(cut.emit(op, whole, grid, mode, edge, corners))
    dim = grid.cut_dim
    if dim is None or dim == grid.ndim - 1:
        raise Refused("channels or coordinates are cut")
    layout = Layout.whole(shape).with_dim(dim + 1, grid.layout.dims[dim])
    return cut.call(op, whole, grid, mode, edge, corners, layout=layout)
