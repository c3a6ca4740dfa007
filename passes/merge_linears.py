"""One matrix product for all linears that read the same value: queries, keys and values; the keys and values that all
cross-attentions make of the text; the projections of the time embedding in all residual blocks.

%q = aten.linear(%x, @wq)              %m = aten.linear(%x, @wq+2)
%k = aten.linear(%x, @wk)         ->   %q = aten.slice(%m, 2, 0, 640)
%v = aten.linear(%x, @wv)              %k = aten.slice(%m, 2, 640, 1280)
                                       %v = aten.slice(%m, 2, 1280, 1920)

Small products fill a GPU badly: at 1024 px on two GPUs a query projection of SDXL is 40 tiles for 132 multiprocessors,
all three together are 120. The merged weight is stored in place of its parts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from districompile.ir.plan import TensorSpec
from districompile.unit import Stage, Unit

aten = torch.ops.aten
_TAGS = ("stack_trace", "site", "nn_module_stack")


@dataclasses.dataclass(frozen=True)
class MergeLinears:
    """Requires the whole graph. Gives it with linears of one input merged, where their weights are used nowhere else.

    The results are the same products; a backend may sum them in another order.
    """

    name: ClassVar[str] = "merge-linears"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "whole"
    gives: ClassVar[Stage] = "whole"

    def run(self, unit: Unit) -> None:
        # The capture may serve several conversions: its weights stay as they are
        unit.captured = dataclasses.replace(unit.captured, weights=dict(unit.captured.weights))
        groups: dict[Any, list[fx.Node]] = {}
        for node in unit.graph.nodes:
            if node.target is aten.linear.default and all(_is_own(w) for w in _parameters(node)):
                groups.setdefault((node.args[0], len(_parameters(node))), []).append(node)
        order = {n: i for i, n in enumerate(unit.graph.nodes)}
        for group in groups.values():
            if len(group) > 1:
                _merge(unit, group, order)


def _parameters(linear: fx.Node) -> list[fx.Node]:
    """Weight and, if there is one, bias."""
    return [a for a in linear.args[1:] if isinstance(a, fx.Node)]


def _is_own(weight: fx.Node) -> bool:
    return weight.op == "get_attr" and len(weight.users) == 1


def _merge(unit: Unit, group: Sequence[fx.Node], order: dict[fx.Node, int]) -> None:
    graph, first = unit.graph, group[0]
    x: Any = first.args[0]
    with graph.inserting_before(first):
        columns = zip(*(_parameters(n) for n in group), strict=True)
        parameters = [_joined(unit, parts) for parts in columns]
        merged = graph.call_function(aten.linear.default, (x, *parameters))
    _describe(merged, first, (x, *parameters))
    start, dim = 0, merged.meta["val"].ndim - 1
    for node in group:
        stop = start + node.meta["val"].shape[-1]
        # Where it is first read: what crosses from segment to segment is the merged value, once
        with graph.inserting_before(min(node.users, key=order.__getitem__, default=node)):
            part = graph.call_function(aten.slice.Tensor, (merged, dim, start, stop))
        _describe(part, node, part.args)
        node.replace_all_uses_with(part)
        parts = _parameters(node)
        name = node.name
        graph.erase_node(node)
        part._rename(f"{name}_part")
        for parameter in parts:
            if not parameter.users:
                graph.erase_node(parameter)
        start = stop


def _describe(node: fx.Node, like: fx.Node, args: tuple[Any, ...]) -> None:
    for key in _TAGS:
        if key in like.meta:
            node.meta[key] = like.meta[key]
    values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
    with like.meta["val"].fake_mode:
        node.meta["val"] = node.target(*values)  # type: ignore[operator]


def _joined(unit: Unit, parts: Sequence[fx.Node]) -> fx.Node:
    """A weight that holds ``parts`` one after the other along their first dim."""
    weights = unit.captured.weights
    names = [str(p.target) for p in parts]
    specs = [weights[n][0] for n in names]
    shape = (sum(s.shape[0] for s in specs), *specs[0].shape[1:])
    name = f"{names[0]}+{len(names) - 1}"
    while name in weights:  # another group may begin with a tied weight
        name += "'"
    # For whoever gives the bundle other weights
    unit.report.setdefault("joined", {})[name] = [[n, s.shape[0]] for n, s in zip(names, specs, strict=True)]
    read = functools.partial(_read_joined, [weights[n][1] for n in names])
    weights[name] = TensorSpec(shape, specs[0].dtype), read
    node = unit.graph.create_node("get_attr", name, name=f"{parts[0].name}_merged")
    for key in _TAGS:
        if key in parts[0].meta:
            node.meta[key] = parts[0].meta[key]
    value = parts[0].meta["val"]
    with value.fake_mode:
        node.meta["val"] = value.new_empty(shape)
    return node


def _read_joined(readers: Sequence[Callable[[], Tensor]]) -> Tensor:
    return torch.cat([read() for read in readers])
