"""What several families of rules share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from districompile.cutter import Cutter, Value
from districompile.ir.layout import Layout

aten = torch.ops.aten


def positive(dim: int, ndim: int) -> int:
    """A dim counted from the front."""
    return dim + ndim if dim < 0 else dim


def spread(x: int | Sequence[int], n: int) -> list[int]:
    """``stride=2`` or ``stride=[2]`` as one number for each of ``n`` spatial dims."""
    if isinstance(x, int):
        return [x] * n
    return list(x) * n if len(x) == 1 else list(x)


def along(cut: Cutter, x: Value, op: Callable[..., Any] | Any, *args: Any, **kwargs: Any) -> Value:
    """``op`` does not mix the cut dim and leaves it in place: compute locally, keep the cut."""
    position = x.layout.cut
    assert position is not None
    layout = Layout.whole(cut.out_shape).with_dim(position.dim, x.layout.dims[position.dim])
    return cut.call(op, x, *args, layout=layout, **kwargs)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that partial results are kept in: half precision is not enough for a sum over the ranks."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def cast(cut: Cutter, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """``node`` in ``dtype``; nothing where it is so already."""
    return node if node.meta["local"][0].dtype == dtype else cut.emit(aten._to_copy.default, node, dtype=dtype)
