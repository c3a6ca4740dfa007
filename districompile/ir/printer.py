"""Graphs as text, one line a node: ``%conv = aten.conv2d(%h, %w, %b, [1, 1]) : f32[1, 8, 16|8, 4] @ [1, 8, 24*, 4]``.

Behind the colon stands the local type (``|`` parts what differs by rank), behind the ``@`` the layout: the whole sizes,
with the cut factor starred.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from districompile.ir.layout import PerRank, per_rank

_SHORT = {
    torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64", torch.int64: "i64",
    torch.int32: "i32", torch.bool: "bool", torch.uint8: "u8",
}  # fmt: skip


def print_graph(graph: fx.Graph) -> str:
    """The whole graph, one line a node, weights left out of the listing (they show where they are used)."""
    return "\n".join(_lines(graph))


def _lines(graph: fx.Graph) -> Iterator[str]:
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        if node.op == "output":
            yield f"return {_arg(node.args[0])}"
            continue
        yield f"%{node.name} = {op_name(node)}{_type(node)}{_layout(node)}"


def op_name(node: fx.Node) -> str:
    """The operator with its arguments."""
    if node.op == "placeholder":
        return "input()"
    if node.target is operator.getitem:
        return f"{_arg(node.args[0])}[{node.args[1]}]"
    args = [_arg(a) for a in node.args] + [f"{k}={_arg(v)}" for k, v in node.kwargs.items()]
    return f"{_target(node.target)}({', '.join(args)})"


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        namespace = target.namespace if target.namespace != "districompile" else "dc"
        overload = "" if target._overloadname in ("default", "Tensor") else f".{target._overloadname}"
        return f"{namespace}.{target._opname}{overload}"
    return getattr(target, "__name__", str(target))


def _arg(x: Any) -> str:
    if isinstance(x, fx.Node):
        return f"@{x.target}" if x.op == "get_attr" else f"%{x.name}"
    if isinstance(x, list | tuple):
        return "[" + ", ".join(map(_arg, x)) + "]"
    if isinstance(x, PerRank):
        return "|".join(map(_arg, x.values))
    if isinstance(x, torch.dtype):
        return _SHORT.get(x, str(x))
    return repr(x)


def _type(node: fx.Node) -> str:
    local: Any = node.meta.get("local") or (node.meta.get("val"),)
    if not isinstance(local[0], Tensor):
        return ""
    sizes = [_arg(per_rank(int(s) for s in dims)) for dims in zip(*(t.shape for t in local), strict=True)]
    return f" : {_SHORT.get(local[0].dtype, str(local[0].dtype))}[{', '.join(sizes)}]"


def _layout(node: fx.Node) -> str:
    layout = node.meta.get("layout")
    return f" @ {layout}" if layout is not None and layout.cut is not None else ""
