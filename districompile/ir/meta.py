# SPDX-License-Identifier: Apache-2.0
"""Typed access to ``fx.Node.meta``, where the compiler keeps its records of a node, by stage.

=============== ========================== ===========================================================================
key             stage                      value
=============== ========================== ===========================================================================
val             global, per-rank graphs    fake tensor of the result (a tuple of them for several results)
local           spmd, lowered              each rank's fake result, one entry a rank
layout          spmd, lowered              :class:`~districompile.ir.layout.Layout` of the result
displaced       spmd, lowered              whether the displaced phase uses the previous step's value (collectives)
in_place        spmd                       whether the result is received around the rank's own rows (fetches)
collective      lowered                    the plan of the transfer (``exchange`` and ``reduce``)
recalls         lowered                    name of the value of the previous call that a placeholder reads
carried         lowered                    whether each call leaves that value anew, not only the exact one
initial         lowered                    name of the value that the exact phase leaves in its place
module_path     all                        path of the module that computes the node, as in ``named_modules()``
stack_trace     all                        Python's stack where the model computes it
nn_module_stack all                        as ``torch.export`` records it
origin          spmd, lowered              name of the node of the global graph that the node was made for
=============== ========================== ===========================================================================
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import fx

from districompile.ir.layout import Layout
from districompile.ir.spec import TensorSpec

PROVENANCE = ("module_path", "stack_trace", "nn_module_stack")
RESULT = ("val", "local", "layout")


class TransferPlan(Protocol):
    """The plan of one collective, with the fields that the graph's checks read."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def displaced(self) -> bool: ...


def tensor_of(node: fx.Node) -> torch.Tensor:
    """Return the fake result of a node of the global graph, which must be one tensor. Raise ``TypeError`` otherwise."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{node.name} has no tensor result")
    return value


def local_results(node: fx.Node) -> tuple[Any, ...]:
    """Return each rank's fake result of a node of the SPMD graph; empty where none is recorded."""
    return node.meta.get("local", ())  # type: ignore[no-any-return]


def local_tensors(node: fx.Node) -> tuple[torch.Tensor, ...]:
    """Return each rank's fake result, which must be tensors. Raise ``TypeError`` otherwise."""
    found = local_results(node)
    if not found or not all(isinstance(t, torch.Tensor) for t in found):
        raise TypeError(f"{node.name} has no tensor on each rank")
    return cast(tuple[torch.Tensor, ...], found)


def local_specs(node: fx.Node) -> tuple[TensorSpec, ...]:
    """Return shape and dtype of each rank's result, which must be tensors. Raise ``TypeError`` otherwise."""
    return tuple(TensorSpec(tuple(int(s) for s in t.shape), t.dtype) for t in local_tensors(node))


def layout_of(node: fx.Node) -> Layout | None:
    """Return the layout of a node's result, or None where it has none."""
    return node.meta.get("layout")


def set_layout(node: fx.Node, layout: Layout | None) -> None:
    """Record the layout of a node's result; None removes it."""
    if layout is None:
        node.meta.pop("layout", None)
    else:
        node.meta["layout"] = layout


def is_displaced(node: fx.Node) -> bool:
    """Return whether a collective uses the previous step's value in the displaced phase."""
    return bool(node.meta.get("displaced"))


def set_displaced(node: fx.Node, displaced: bool) -> None:
    """Choose whether a collective uses the previous step's value in the displaced phase."""
    node.meta["displaced"] = displaced


def copy_displaced(source: fx.Node, target: fx.Node) -> None:
    """Copy whether ``source`` is displaced to ``target``, if that was chosen yet."""
    _copy(source, target, ("displaced",))


def is_in_place(node: fx.Node) -> bool:
    """Return whether a fetch receives its rows around the rank's own."""
    return bool(node.meta.get("in_place"))


def set_in_place(node: fx.Node) -> None:
    """Make a fetch receive its rows around the rank's own."""
    node.meta["in_place"] = True


def collective_of(node: fx.Node) -> TransferPlan | None:
    """Return the transfer plan of an ``exchange`` or ``reduce`` node, or None before lowering."""
    return node.meta.get("collective")


def set_collective(node: fx.Node, plan: TransferPlan) -> None:
    """Record the transfer plan of an ``exchange`` or ``reduce`` node."""
    node.meta["collective"] = plan


def recalled_value(node: fx.Node) -> str | None:
    """Return the name of the value of the previous call that a placeholder reads, or None for any other node."""
    return node.meta.get("recalls")


def is_carried(node: fx.Node) -> bool:
    """Return whether each call leaves the value that the placeholder reads for the next call."""
    return bool(node.meta.get("carried"))


def set_recalled(node: fx.Node, value: str, *, carried: bool = False, initial: str | None = None) -> None:
    """Make a placeholder read ``value`` of the previous call; with ``carried``, each call leaves it for the next.

    ``initial`` is what the exact phase leaves in its place, if that is another value.
    """
    node.meta["recalls"] = value
    if carried:
        node.meta["carried"] = True
    if initial is not None:
        node.meta["initial"] = initial


def module_path_of(node: fx.Node) -> str:
    """Return the path of the module that computes a node, or the node's name where it is unknown."""
    return str(node.meta.get("module_path") or node.name)


def origin_of(node: fx.Node) -> str | None:
    """Return the name of the node of the global graph that a node of the SPMD graph was made for."""
    return node.meta.get("origin")


def set_origin(node: fx.Node, source: fx.Node) -> None:
    """Record the node of the global graph that a node of the SPMD graph was made for."""
    node.meta["origin"] = source.name


def copy_provenance(source: fx.Node, target: fx.Node) -> None:
    """Copy the provenance of a node: module path, stack trace, module stack."""
    _copy(source, target, PROVENANCE)


def copy_result(source: fx.Node, target: fx.Node) -> None:
    """Copy what describes a node's result: fake values and layout, and the module path."""
    _copy(source, target, (*RESULT, "module_path"))


def copy_layout(source: fx.Node, target: fx.Node) -> None:
    """Give ``target`` the layout of ``source``, if that has one."""
    _copy(source, target, ("layout",))


def _copy(source: fx.Node, target: fx.Node, keys: tuple[str, ...]) -> None:
    for key in keys:
        if key in source.meta:
            target.meta[key] = source.meta[key]


def is_view(node: fx.Node) -> bool:
    """Return whether a call reads no values: a view of its input, ``getitem``, or arithmetic of Python numbers."""
    target: Any = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return node.op == "call_function"
    return any(r.alias_info is not None and not r.alias_info.is_write for r in target._schema.returns)


def operator_name(node: fx.Node) -> str:
    """Return the name of what a node calls without its overload, as ``aten::add``."""
    target: Any = node.target
    return str(target._schema.name) if isinstance(target, torch._ops.OpOverload) else str(target)
