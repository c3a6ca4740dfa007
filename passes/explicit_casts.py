# SPDX-License-Identifier: Apache-2.0
"""Insert a cast for every implicit type promotion: engines are strongly typed.

Before:

    %cat = aten.cat([%half, %single], 1)

After:

    %_to_copy_default = aten._to_copy(%half, dtype=f32)
    %cat = aten.cat([%_to_copy_default, %single], 1)
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, fx

from districompile.ir.graph import insert_before, of_type
from districompile.ir.unit import CompilationUnit, Stage
from districompile.sharding.registry import is_pointwise

aten = torch.ops.aten

_COMPARE = {"eq", "ne", "lt", "le", "gt", "ge"}
_KEEP = {"where", "masked_fill", "_to_copy", "bitwise_not", "logical_not", "isnan", "isinf", "copy"}


@dataclasses.dataclass(frozen=True)
class ExplicitCasts:
    """The pass ``explicit-casts``: it requires fake values on all nodes.

    In the graph that it leaves, the operands of pointwise operators, ``cat`` and ``stack`` agree in dtype.
    """

    name: ClassVar[str] = "explicit-casts"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "global"
    gives: ClassVar[Stage] = "global"

    def run(self, unit: CompilationUnit) -> None:
        for node in list(unit.graph.nodes):
            if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
                continue
            name = node.target._schema.name.removeprefix("aten::")
            if name in ("cat", "concat", "stack") or (is_pointwise(node.target) and name not in _KEEP):
                _promote(node, name)
            elif name == "where":
                _promote(node, name, skip=1)
        unit.explicit_casts = True


def _promote(node: fx.Node, name: str, skip: int = 0) -> None:
    operands = [n for n in of_type(node.args[skip:], fx.Node) if isinstance(n.meta.get("val"), Tensor)]
    dtypes = {n.meta["val"].dtype for n in operands}
    if len(dtypes) < 2:
        return
    target = node.meta["val"].dtype
    if name in _COMPARE:
        target = operands[0].meta["val"].dtype
        for n in operands[1:]:
            target = torch.result_type(torch.empty((), dtype=target), torch.empty((), dtype=n.meta["val"].dtype))
    casts: dict[fx.Node, fx.Node] = {}
    for n in operands:
        if n.meta["val"].dtype != target and n not in casts:
            casts[n] = insert_before(node, aten._to_copy.default, n, dtype=target)
    keep = node.args[:skip]
    node.args = (*keep, *fx.map_arg(node.args[skip:], lambda n: casts.get(n, n)))
