"""Passes on the SPMD graph: one chooses what is displaced, one fuses, one changes numbers, one moves collectives."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from districompile.extend import CompilationUnit, Stage, ops

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class ExactAttention:
    """Keep the attention of layers whose module path contains ``layer`` exact; displace all else as before."""

    layer: str = ""

    name: ClassVar[str] = "exact-attention"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "spmd"
    gives: ClassVar[Stage] = "spmd"

    def run(self, unit: CompilationUnit) -> None:
        for node in unit.graph.nodes:
            if node.target is ops.fetch.default:
                *_, module_path, purpose = node.args
                if purpose == "attention" and self.layer in str(module_path):
                    node.meta["displaced"] = False


@dataclasses.dataclass(frozen=True)
class FuseSilu:
    """Replace ``x * sigmoid(x)`` by ``silu(x)``."""

    name: ClassVar[str] = "fuse-silu"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "spmd"
    gives: ClassVar[Stage] = "spmd"

    def run(self, unit: CompilationUnit) -> None:
        for node in list(unit.graph.nodes):
            if node.target is not aten.mul.Tensor:
                continue
            for x, factor in (node.args, node.args[::-1]):
                if getattr(factor, "target", None) is aten.sigmoid.default and factor.args == (x,):
                    with unit.graph.inserting_before(node):
                        fused = unit.graph.call_function(aten.silu.default, (x,))
                    fused.meta.update(node.meta)  # the same value on every rank: results, layout, source line
                    node.replace_all_uses_with(fused)
                    unit.graph.erase_node(node)
                    break
        unit.graph.eliminate_dead_code()


@dataclasses.dataclass(frozen=True)
class ApproximateGelu:
    """Compute ``gelu`` by its approximation with ``tanh``, which changes results beyond rounding."""

    name: ClassVar[str] = "approximate-gelu"
    exact: ClassVar[bool] = False
    needs: ClassVar[Stage] = "spmd"
    gives: ClassVar[Stage] = "spmd"

    def run(self, unit: CompilationUnit) -> None:
        for node in unit.graph.nodes:
            if node.target is aten.gelu.default:
                node.kwargs = {**node.kwargs, "approximate": "tanh"}


@dataclasses.dataclass(frozen=True)
class FetchEarly:
    """Move every ``fetch`` up to where its input is computed, so that the transfer starts as soon as it can."""

    name: ClassVar[str] = "fetch-early"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "spmd"
    gives: ClassVar[Stage] = "spmd"

    def run(self, unit: CompilationUnit) -> None:
        position = {node: i for i, node in enumerate(unit.graph.nodes)}
        inputs = max((i for node, i in position.items() if node.op in ("placeholder", "get_attr")), default=0)
        for node in list(unit.graph.nodes):
            if node.target is ops.fetch.default:
                last = max(node.all_input_nodes, key=position.__getitem__)
                if position[last] > inputs:
                    last.append(node)
