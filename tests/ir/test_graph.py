"""Graph helpers: typed arguments of collectives, new nodes with all that they must carry, copies, dead code."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import fx, nn

import districompile as dc
from districompile.ir.collectives import FetchArgs, ReduceArgs, fetches, is_reduce
from districompile.ir.graph import (
    copy_graph,
    eliminate_dead_code,
    insert_before,
    insert_recall,
    per_ranks_of,
    replace_node,
)
from districompile.ir.layout import Layout
from districompile.ir.meta import (
    PROVENANCE,
    is_carried,
    layout_of,
    local_tensors,
    module_path_of,
    recalled_value,
    set_layout,
    tensor_of,
)
from districompile.ir.unit import CompilationUnit, Options
from districompile.passes import pipelines
from districompile.passes.manager import PassManager
from districompile.sharding.builder import ShardingBuilder

aten = torch.ops.aten


class Net(nn.Module):
    """A convolution fetches, a softmax over the rows reduces."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.conv(sample.relu()).softmax(2)


def unit(stage: str, ranks: int = 3) -> CompilationUnit:
    captured = dc.capture(Net().eval(), (torch.zeros(1, 2, 10, 4),))
    made = CompilationUnit(captured.copy_graph(), "global", captured, Options(ranks), {"sample": 2})
    passes = pipelines.cut(made.options)
    return PassManager().run(made, passes if stage == "spmd" else [p for p in passes if p.gives == "global"])


def test_arguments_of_collectives_have_names() -> None:
    graph = unit("spmd").graph
    (node, *_) = fetches(graph)
    fetch = FetchArgs.of(node)
    assert (fetch.dim, fetch.ranks, fetch.purpose, fetch.module_path) == (2, 3, "conv", "conv")
    assert [b - a for a, b in zip(fetch.lo, fetch.hi, strict=True)] == [
        b - a + 2 for a, b in zip(fetch.bounds, fetch.bounds[1:], strict=False)
    ]
    assert tuple(node.args) == fetch.node_args()
    assert not fetch.gathers_all and FetchArgs.of(fetches(graph)[-1]).gathers_all
    reduce = next(n for n in graph.nodes if is_reduce(n))
    assert ReduceArgs.of(reduce).node_args() == tuple(reduce.args)
    with pytest.raises(dc.ConvertError, match="is no fetch"):
        FetchArgs.of(reduce)
    with pytest.raises(dc.ConvertError, match="is no reduce"):
        ReduceArgs.of(node)


def test_changed_arguments_are_written_back() -> None:
    graph = unit("spmd").graph
    node = fetches(graph)[0]
    node.args = dataclasses.replace(FetchArgs.of(node), purpose="other").node_args()
    assert FetchArgs.of(node).purpose == "other"
    schema = torch.ops.districompile.fetch.default._schema
    assert len(node.args) == len(schema.arguments)


def test_new_node_carries_result_and_provenance() -> None:
    graph = unit("global").graph
    conv = next(n for n in graph.nodes if n.target is aten.conv2d.default)
    new = insert_before(graph.output_node(), aten.mul.Tensor, conv, 2, like=conv, name="doubled")
    assert new.name == "doubled" and tensor_of(new).shape == tensor_of(conv).shape
    assert all(new.meta.get(key) == conv.meta.get(key) for key in PROVENANCE)
    assert module_path_of(new) == "conv"
    with pytest.raises(TypeError, match="has no tensor"):
        tensor_of(graph.output_node())


def test_builder_of_a_pass_gives_every_rank_a_result() -> None:
    made = unit("spmd")
    builder = ShardingBuilder.of(made)
    conv = next(n for n in made.graph.nodes if n.target is aten.conv2d.default)
    user = next(iter(conv.users))
    with builder.before(user):
        new = builder.emit(aten.mul.Tensor, conv, 2)
    assert [t.shape for t in local_tensors(new)] == [t.shape for t in local_tensors(conv)]
    with pytest.raises(RuntimeError, match="no target"):
        _ = ShardingBuilder.of(made).operator


def test_replaced_node_keeps_its_layout() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    a, b = graph.call_function(aten.silu.default, (x,)), graph.call_function(aten.relu.default, (x,))
    graph.output((a,))
    set_layout(a, Layout.replicated((3,)))
    replace_node(a, b)
    assert layout_of(b) == Layout.replicated((3,)) and list(graph.output_node().args[0]) == [b]
    set_layout(b, None)
    assert layout_of(b) is None


def test_copies_keep_names_and_have_meta_of_their_own() -> None:
    made = unit("spmd")
    copy = copy_graph(made.graph)
    assert [n.name for n in copy.nodes] == [n.name for n in made.graph.nodes]
    assert [len(per_ranks_of(n)) for n in copy.nodes] == [len(per_ranks_of(n)) for n in made.graph.nodes]
    fetches(copy)[0].meta["displaced"] = "changed"
    assert fetches(made.graph)[0].meta["displaced"] is True


def test_dead_code_goes_and_inputs_stay() -> None:
    graph = fx.Graph()
    x, _unused = graph.placeholder("x"), graph.placeholder("unused")
    graph.call_function(torch.ops.districompile.reduce.default, (x, "sum", "", "other"))
    graph.output((x,))
    eliminate_dead_code(graph)
    assert [n.name for n in graph.nodes] == ["x", "unused", "output"]


def test_recalled_values_stand_behind_the_inputs() -> None:
    graph = unit("spmd").graph
    conv = next(n for n in graph.nodes if n.target is aten.conv2d.default)
    state = insert_recall(graph, conv, "kept", carried=True)
    assert recalled_value(state) == conv.name and is_carried(state) and recalled_value(conv) is None
    assert local_tensors(state) == local_tensors(conv) and layout_of(state) == layout_of(conv)
    assert next(n for n in reversed(graph.nodes) if n.op == "placeholder") is state
