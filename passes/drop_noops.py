# SPDX-License-Identifier: Apache-2.0
"""Delete operators that compute nothing: assertions, dropout in eval mode, copies, casts to the same dtype.

Before:

    %clone = aten.clone(%sample)
    %silu = aten.silu(%clone)

After:

    %silu = aten.silu(%sample)
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, fx

from districompile.ir.unit import CompilationUnit, Stage

aten = torch.ops.aten

_IDENTITY = {
    aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default,
    aten.dropout.default, aten.feature_dropout.default,
}  # fmt: skip
_CASTS = {aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device}


@dataclasses.dataclass(frozen=True)
class DropNoOps:
    """The pass ``drop-noops``: it requires a functional graph, where a copy is as good as its source.

    It deletes dead code, too.
    """

    name: ClassVar[str] = "drop-noops"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "global"
    gives: ClassVar[Stage] = "global"

    def run(self, unit: CompilationUnit) -> None:
        for node in list(unit.graph.nodes):
            if node.op != "call_function":
                continue
            if "_assert" in str(node.target) or str(node.target).startswith("aten.sym_constrain"):
                unit.graph.erase_node(node)
            elif node.target in _IDENTITY or (node.target in _CASTS and _keeps_dtype(node)):
                node.replace_all_uses_with(node.args[0])
                unit.graph.erase_node(node)
        unit.graph.eliminate_dead_code()


def _keeps_dtype(node: fx.Node) -> bool:
    source, result = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    return isinstance(source, Tensor) and bool(source.dtype == result.dtype)
