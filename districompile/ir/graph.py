# SPDX-License-Identifier: Apache-2.0
"""Graph surgery: functions by which a pass reads, inserts, copies and deletes nodes.

A new node must carry fake results (``val`` in the global graph, ``local`` in the SPMD graph) and should carry its
provenance. :func:`insert_before` gives it both in the global graph. In the SPMD graph
:class:`~districompile.sharding.builder.ShardingBuilder` does: ``with builder.before(node): builder.emit(op, ...)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from districompile.ir.layout import PerRank
from districompile.ir.meta import copy_layout, copy_provenance, copy_result, is_carried, recalled_value, set_recalled

T = TypeVar("T")


def of_type(x: Any, kind: type[T]) -> list[T]:
    """Return the leaves of one type in nested lists, tuples and dicts, in order."""
    found: list[T] = []
    waiting = [x]
    while waiting:  # a loop, not a recursion: it runs for every node at each step of a conversion
        v = waiting.pop()
        if isinstance(v, list | tuple):
            waiting += reversed(v)
        elif isinstance(v, dict):
            waiting += reversed(v.values())
        elif isinstance(v, kind):
            found.append(v)
    return found


def per_ranks_of(node: fx.Node) -> list[PerRank[Any]]:
    """Return the arguments of a node that differ by rank."""
    return of_type((node.args, node.kwargs), PerRank)


def replace(x: Any, kind: type[T], f: Callable[[T], Any]) -> Any:
    """Apply ``f`` to the leaves of one type in nested lists, tuples and dicts."""
    if isinstance(x, kind):
        return f(x)
    if isinstance(x, list | tuple):
        return type(x)(replace(v, kind, f) for v in x)
    if isinstance(x, dict):
        return {k: replace(v, kind, f) for k, v in x.items()}
    return x


def source_line(node: fx.Node) -> str:
    """Return the innermost line of the model's own code that made the node: ``file.py:12, in forward``, or ``""``."""
    lines = [
        line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File ")
    ]
    own = [line for line in lines if "/torch/nn/" not in line] or lines
    return own[-1].removeprefix("File ") if own else ""


def described(node: fx.Node) -> str:
    """Return what an error message calls a node: operator, name and source line."""
    where = source_line(node)
    return f"{node.target} ({node.name}{', ' + where if where else ''})"


def insert_before(
    at: fx.Node, op: Any, *args: Any, like: fx.Node | None = None, name: str | None = None, **kwargs: Any
) -> fx.Node:
    """Insert ``op(*args, **kwargs)`` before ``at`` in a global graph, with its fake result.

    The provenance is that of ``like`` (default: ``at``). The graph makes ``name`` unique.
    """
    with at.graph.inserting_before(at):
        node = at.graph.create_node("call_function", op, args, kwargs, name=name)
    copy_provenance(at if like is None else like, node)
    set_fake_result(node)
    return node


def set_fake_result(node: fx.Node) -> None:
    """Compute ``meta["val"]`` of a call from the fake results of its arguments."""
    a, k = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    modes = (fake_mode_of(n) for n in node.all_input_nodes)
    with next(m for m in modes if m is not None), torch.no_grad():
        node.meta["val"] = node.target(*a, **k)  # type: ignore[operator]


def fake_mode_of(node: fx.Node) -> FakeTensorMode | None:
    """Return the fake-tensor mode of a node's result, or None where it is no fake tensor."""
    return getattr(node.meta.get("val"), "fake_mode", None)


def insert_weight(at: fx.Node, weight: str, like: fx.Node, shape: tuple[int, ...], name: str) -> fx.Node:
    """Insert a ``get_attr`` node for a weight before ``at``, with the dtype and the provenance of ``like``."""
    with at.graph.inserting_before(at):
        node = at.graph.create_node("get_attr", weight, name=name)
    copy_provenance(like, node)
    with like.meta["val"].fake_mode:
        node.meta["val"] = like.meta["val"].new_empty(shape)
    return node


def insert_recall(graph: fx.Graph, source: fx.Node, name: str, *, carried: bool = False) -> fx.Node:
    """Insert a placeholder that reads the previous call's value of ``source``, behind the graph's other placeholders.

    With ``carried``, each call leaves the value for the next one. Otherwise only the exact phase leaves it.
    """
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    copy_result(source, node)
    set_recalled(node, source.name, carried=carried)
    return node


def eliminate_dead_code(graph: fx.Graph) -> None:
    """Delete the nodes that nothing reads, except for placeholders, which are part of the interface.

    A value that the next call recalls is read, if that is. All operators count as pure, collectives included.
    """
    nodes = {n.name: n for n in graph.nodes}
    waiting = [n for n in graph.nodes if n.op == "output"]
    live = set(waiting)
    while waiting:
        node = waiting.pop()
        sources = list(node.all_input_nodes)
        left = nodes.get(recalled_value(node) or "") if is_carried(node) else None
        if left is not None:
            sources.append(left)
        waiting += [n for n in sources if n not in live]
        live.update(sources)
    for node in reversed(list(graph.nodes)):
        if node not in live and node.op != "placeholder":
            graph.erase_node(node)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Copy a graph. Nodes keep their names and their order, and have a meta dict of their own."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        env[node] = new.node_copy(node, env.__getitem__)
        assert env[node].name == node.name, node.name
    return new


def replace_node(old: fx.Node, new: fx.Node) -> None:
    """Replace ``old`` by ``new``, which takes its users and its layout, and delete ``old``."""
    copy_layout(old, new)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
