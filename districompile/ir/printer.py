# SPDX-License-Identifier: Apache-2.0
"""Print graphs, one line a node: ``%conv = aten.conv2d(%h, @w, @b, [1, 1]) : f32[1, 8, 16|8, 4] @ [1, 8, 24*, 4]``.

``%`` marks values and ``@`` weights. After the colon stands the local type; ``|`` separates values that differ between
ranks. After the ``@`` stands the layout: the global sizes, with a star at the sharded factor. A ``fetch`` names its
arguments: ``fetch(%x, dim=2, want=[-1..9, 7..17], edge=zeros)`` gives rows -1 to 8 to rank 0 and rows 7 to 16 to rank
1. ``# displaced`` marks a collective that uses the previous step's values in the displaced phase.
"""

from __future__ import annotations

import operator
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from districompile.ir.layout import PerRank, per_rank

_SHORT = {
    torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64", torch.int64: "i64",
    torch.int32: "i32", torch.bool: "bool", torch.uint8: "u8",
}  # fmt: skip


def fit_lines(text: str, width: int | None) -> str:
    """Break lines at spaces so that they have at most ``width`` columns, with an indent; None changes nothing.

    A word that is longer than ``width`` keeps its length.
    """
    if width is None:
        return text
    wrapped = (
        textwrap.wrap(line, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False) or [""]
        for line in text.splitlines()
    )
    return "\n".join(part for parts in wrapped for part in parts)


def print_graph(graph: fx.Graph) -> str:
    """Return the graph, one line a node. Weights have no line; they are printed where they are used."""
    return "\n".join(_lines(graph))


def _lines(graph: fx.Graph) -> Iterator[str]:
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        if node.op == "output":
            yield f"return {_arg(node.args[0])}"
            continue
        yield f"%{node.name} = {op_name(node)}{_type(node)}{_layout(node)}{_displaced(node)}"


def op_name(node: fx.Node) -> str:
    """Return the operator with its arguments."""
    if node.op == "placeholder":
        return "input()"
    if node.target is operator.getitem:
        return f"{_arg(node.args[0])}[{node.args[1]}]"
    if node.target is torch.ops.districompile.fetch.default:
        return _fetch(node)
    args = [_arg(a) for a in node.args] + [f"{k}={_arg(v)}" for k, v in node.kwargs.items()]
    return f"{_target(node.target)}({', '.join(args)})"


def _fetch(node: fx.Node) -> str:
    """Return ``dc.fetch`` with its arguments by name, without those that have their usual values."""
    schema = torch.ops.districompile.fetch.default._schema
    named: dict[str, Any] = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
    want = ", ".join(f"{a}..{b}" for a, b in zip(named["lo"], named["hi"], strict=True))
    parts = [_arg(named["x"]), f"dim={named['dim']}", f"want=[{want}]", f"edge={named['edge']}"]
    if named["order"] != "rows":
        parts.append(f"order={named['order']}")
    if named["fill"]:
        parts.append(f"fill={named['fill']}")
    return f"dc.fetch({', '.join(parts)})"


def _displaced(node: fx.Node) -> str:
    # Before lowering only: a lowered graph shows the displaced collectives by its nodes
    chosen = node.meta.get("displaced") and "collective" not in node.meta
    return "  # displaced" if chosen else ""


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
    return f" @ {layout}" if layout is not None and layout.sharded_axis is not None else ""
