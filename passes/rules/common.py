# SPDX-License-Identifier: Apache-2.0
"""Helpers that several families of rules share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from districompile.ir.layout import Layout
from districompile.sharding.builder import ShardedValue, ShardingBuilder

aten = torch.ops.aten


def positive(dim: int, ndim: int) -> int:
    """Return a dim counted from the front."""
    return dim + ndim if dim < 0 else dim


def per_dim(x: int | Sequence[int], n: int) -> list[int]:
    """Expand ``stride=2`` or ``stride=[2]`` to one number for each of ``n`` spatial dims."""
    if isinstance(x, int):
        return [x] * n
    return list(x) * n if len(x) == 1 else list(x)


def keep_sharding(
    builder: ShardingBuilder, x: ShardedValue, op: Callable[..., Any] | Any, *args: Any, **kwargs: Any
) -> ShardedValue:
    """Compute ``op`` locally and keep the sharding: ``op`` does not mix the sharded dim, and leaves it in place."""
    axis = x.layout.sharded_axis
    assert axis is not None
    layout = Layout.replicated(builder.out_shape).with_dim(axis.dim, x.layout.dims[axis.dim])
    return builder.call(op, x, *args, layout=layout, **kwargs)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of partial results: half precision is not enough for a sum over the ranks."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def cast(builder: ShardingBuilder, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Cast ``node`` to ``dtype``, unless it has that dtype already."""
    return node if node.meta["local"][0].dtype == dtype else builder.emit(aten._to_copy.default, node, dtype=dtype)
