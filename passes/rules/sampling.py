# SPDX-License-Identifier: Apache-2.0
"""Sampling at computed positions: warps by a flow field, deformable windows, spatial transformers."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from districompile.ir.layout import Layout, Refused
from districompile.sharding.builder import ShardedValue, ShardingBuilder
from districompile.sharding.registry import Sample, rule

aten = torch.ops.aten


def _grid_samples() -> Iterable[Sample]:
    x, grid = torch.randn(2, 3, 9, 5), torch.rand(2, 8, 4, 2) * 2.4 - 1.2
    for mode, edge, corners in ((0, 0, False), (0, 1, True), (1, 2, False), (2, 0, True)):
        yield Sample((x, grid, mode, edge, corners), (2, 1))
    yield Sample((x, grid, 0, 0, False), (2, None))
    yield Sample((x, grid, 0, 0, False), (None, 2))
    yield Sample((torch.randn(9, 3, 4, 5), torch.rand(9, 8, 4, 2), 0, 0, False), (0, 0))
    yield Sample((torch.randn(2, 3, 4, 9, 5), torch.rand(2, 3, 8, 4, 3), 0, 0, False), (3, 2))


@rule(aten.grid_sampler.default,
      samples=_grid_samples)  # fmt: skip
def grid_sampler(
    builder: ShardingBuilder, x: ShardedValue, grid: ShardedValue, mode: int, edge: int, corners: bool
) -> ShardedValue:
    """Shard sampling by the positions. They may lie anywhere, so each rank gathers all rows of ``x``."""
    op = builder.operator
    shape = builder.out_shape
    if x.sharded_dim == 0 or grid.sharded_dim == 0:
        leader = grid if grid.sharded_dim == 0 else x
        parts = [builder.redistribute(v, 0, leader.layout.dims[0]) for v in (x, grid)]
        return builder.call(
            op, *parts, mode, edge, corners, layout=Layout.replicated(shape).with_dim(0, leader.layout.dims[0])
        )
    x_dim = x.sharded_dim
    gathered = builder.gather(x)
    if not grid.is_sharded and x_dim is not None and x_dim > 1:
        # The positions come from a few numbers (an affine map): each rank takes those of its rows
        try:
            grid = builder.slice_local(grid, Layout.sharded_at(grid.shape, x_dim - 1, builder.bounds(shape[x_dim])))
        except Refused:
            return builder.replicated_value(builder.emit(op, gathered, grid, mode, edge, corners))
    dim = grid.sharded_dim
    if dim is None or dim == grid.ndim - 1:
        raise Refused("channels or coordinates are sharded")
    layout = Layout.replicated(shape).with_dim(dim + 1, grid.layout.dims[dim])
    return builder.call(op, gathered, grid, mode, edge, corners, layout=layout)
