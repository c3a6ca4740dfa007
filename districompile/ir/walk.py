"""Walking through the arguments of nodes, which nest lists, tuples and dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import fx

from districompile.ir.layout import PerRank

T = TypeVar("T")


def of_type(x: Any, kind: type[T]) -> list[T]:
    """The leaves of ``x`` that are of one type: nodes, values, ..."""
    found: list[T] = []
    waiting = [x]
    while waiting:  # a loop: this is asked of every node at each step of a conversion
        v = waiting.pop()
        if isinstance(v, list | tuple):
            waiting += reversed(v)
        elif isinstance(v, dict):
            waiting += reversed(v.values())
        elif isinstance(v, kind):
            found.append(v)
    return found


def per_ranks_of(node: fx.Node) -> list[PerRank[Any]]:
    """The arguments of a node that differ by rank."""
    return of_type((node.args, node.kwargs), PerRank)


def replace(x: Any, kind: type[T], f: Callable[[T], Any]) -> Any:
    """``x`` with ``f`` applied to its leaves of one type."""
    if isinstance(x, kind):
        return f(x)
    if isinstance(x, list | tuple):
        return type(x)(replace(v, kind, f) for v in x)
    if isinstance(x, dict):
        return {k: replace(v, kind, f) for k, v in x.items()}
    return x


def source_line(node: fx.Node) -> str:
    """The innermost line of the model's own code that made the node: ``file.py:12, in forward``; empty if unknown."""
    lines = [
        line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File ")
    ]
    own = [line for line in lines if "/torch/nn/" not in line] or lines
    return own[-1].removeprefix("File ") if own else ""
