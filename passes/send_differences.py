# SPDX-License-Identifier: Apache-2.0
"""Send what displaced steps exchange as differences of 8 bits to what was sent before.

Before:

    %conv2d_fetch_halo = dc.exchange(%conv2d_fetch_boundary, [2, 1, 4, 4])
    %conv2d_fetch_rows = dc.assemble(%conv2d_fetch_halo, %silu, 2, 1, 1, 0, 4)

After:

    %conv2d_fetch_boundary_sent_last_step = input()
    %conv2d_fetch_halo_decoded_last_step = input()
    %conv2d_fetch_boundary_difference = dc.encode_difference(%conv2d_fetch_boundary, ...)
    %conv2d_fetch_boundary_sent = dc.add_difference(%conv2d_fetch_boundary_sent_last_step, ...)
    %conv2d_fetch_halo_difference = dc.exchange(%conv2d_fetch_boundary_difference, [2, 17])
    %conv2d_fetch_halo_decoded = dc.add_difference(%conv2d_fetch_halo_decoded_last_step, ...)
    %conv2d_fetch_rows = dc.assemble(%conv2d_fetch_halo_decoded, %silu, 2, 1, 1, 0, 4)

The sender keeps what the receivers have: its own reconstruction, not its value. An error of one step is thus part of
the next difference, and errors do not add up. The exact phase sends values in full, and both sides start from those.
Statistics of norms are few bytes, and are sent as they are. docs/decisions/0050 has the reasons.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import fx

from districompile.ir.graph import eliminate_dead_code, insert_recall
from districompile.ir.meta import collective_of, local_tensors, set_collective, set_displaced, set_recalled
from districompile.ir.ops import ops
from districompile.ir.spec import TensorSpec
from districompile.ir.unit import CompilationUnit, Stage
from districompile.plan.plan import Exchange
from districompile.sharding.builder import ShardingBuilder


@dataclasses.dataclass(frozen=True)
class SendDifferences:
    """The pass ``send-differences``: it changes the lowered graph of the displaced phase.

    ``report.differences`` maps each exchange of differences to that of the exact phase whose rows it sends.
    """

    name: ClassVar[str] = "send-differences"
    exact: ClassVar[bool] = False
    needs: ClassVar[Stage] = "lowered"
    gives: ClassVar[Stage] = "lowered"

    def run(self, unit: CompilationUnit) -> None:
        if unit.phase != "displaced":
            return
        builder = ShardingBuilder.of(unit)
        encoded: dict[fx.Node, fx.Node] = {}
        for node in list(unit.graph.nodes):
            plan = collective_of(node)
            if isinstance(plan, Exchange) and _pays(plan):
                unit.report.differences[_send(builder, node, plan, encoded)] = node.name
        eliminate_dead_code(unit.graph)


def _pays(plan: Exchange) -> bool:
    """Return whether differences of a displaced exchange are fewer bytes, and all ranks have a row to send."""
    floating = plan.specs[0].dtype.is_floating_point and plan.specs[0].dtype.itemsize > 1
    rows = all(0 not in s.shape for s in plan.specs)
    return plan.displaced and plan.purpose != "norm" and plan.dim == 0 and floating and rows


def _send(builder: ShardingBuilder, node: fx.Node, plan: Exchange, encoded: dict[fx.Node, fx.Node]) -> str:
    """Exchange differences in place of ``node``. Return the name of the new exchange."""
    source = node.all_input_nodes[0]
    graph = builder.graph
    if source not in encoded:  # several exchanges may send one value
        reference = insert_recall(graph, source, f"{source.name}_sent_last_step")
        with builder.before(node):
            code = builder.emit(ops.encode_difference.default, source, reference, name=f"{source.name}_difference")
            sent = builder.emit(ops.add_difference.default, reference, code, name=f"{source.name}_sent")
        set_recalled(reference, sent.name, carried=True, initial=source.name)
        encoded[source] = code
    code = encoded[source]
    before = insert_recall(graph, node, f"{node.name}_decoded_last_step")
    bytes_of_row = int(local_tensors(code)[0].shape[1])
    with builder.before(node):
        rows = node.args[1][0]  # type: ignore[index]
        new = builder.emit(ops.exchange.default, code, [rows, bytes_of_row], name=f"{node.name}_difference")
        decoded = builder.emit(ops.add_difference.default, before, new, name=f"{node.name}_decoded")
    set_recalled(before, decoded.name, carried=True, initial=node.name)
    set_displaced(new, True)
    specs, results = (tuple(TensorSpec(tuple(t.shape), torch.uint8) for t in local_tensors(n)) for n in (code, new))
    set_collective(
        new, dataclasses.replace(plan, name=new.name, source=code.name, specs=specs, results=results, fill=0.0)
    )
    node.replace_all_uses_with(decoded)
    return new.name
