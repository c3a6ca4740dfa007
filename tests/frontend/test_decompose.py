"""Decomposing kind by kind gives the graph that PyTorch's trace of the whole program gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import districompile as dc
from districompile.frontend import decompose as module_under_test
from districompile.frontend.decompose import decompose, trace_whole
from districompile.ir.graph import source_line
from districompile.ir.interpret import interpret
from tests.small_models import MODELS


class Block(nn.Module):
    """What is decomposed in UNets: changes of shape, dropout, casts, tuples; what is not: linear, norms, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.GroupNorm(2, 8),
            nn.Linear(8, 24),
            nn.Sequential(nn.Linear(8, 8), nn.Dropout()),
        )
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, 8, H, W) and (B,) to (B, 8, H, W)."""
        angles = t[:, None].float() * torch.exp(torch.arange(4, dtype=torch.float32) * -0.5)
        x = x + torch.cat([angles.sin(), angles.cos()], -1).to(x.dtype)[:, :, None, None]
        for _ in range(3):
            q, k, v = self.qkv(self.norm(x).flatten(2).transpose(1, 2)).chunk(3, -1)
            q, k, v = (u.unflatten(-1, (2, 4)).transpose(1, 2) for u in (q, k, v))
            seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], -1, 8)
            x = x + self.conv(self.out(seen).transpose(1, 2).reshape(x.shape).contiguous())
        return torch.hstack([x, x]).narrow(1, 0, 8)


X, T = torch.randn(2, 8, 6, 5), torch.tensor([3, 7])


def export(module: nn.Module, *args: Any, **kwargs: Any) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module.eval(), args, kwargs, strict=False)


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def written(graph: fx.Graph) -> int:
    """What the output is computed by, without names: operators, arguments, shapes, where in the model."""
    known: dict[fx.Node, int] = {}
    for node in graph.nodes:
        arguments = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        tensors = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
        specs = [(tuple(v.shape), v.dtype) for v in tensors]
        name = str(node.target) if node.op != "output" else ""
        known[node] = hash((name, repr(arguments), repr(specs), source_line(node)))
    return known[graph.output_node()]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of operators of each program that PyTorch traces."""
    sizes: list[int] = []

    def trace(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
        sizes.append(sum(isinstance(n.target, torch._ops.OpOverload) for n in program.graph.nodes))
        return trace_whole(program)

    monkeypatch.setattr(module_under_test, "trace_whole", trace)
    return sizes


def test_a_block(traced: list[int]) -> None:
    program = export(Block(), X, T)
    same, graph = decompose(program)
    assert same is program
    assert written(graph) == written(trace_whole(program).graph)
    operators = sum(isinstance(n.target, torch._ops.OpOverload) for n in program.graph.nodes)
    assert len(traced) == 1 and 0 < traced[0] < operators / 2
    assert {n.target for n in graph.nodes} >= {torch.ops.aten.linear.default, torch.ops.aten.view.default}
    assert torch.ops.aten.reshape.default not in {n.target for n in graph.nodes}


@pytest.mark.parametrize("name", ["sdxl", "vae_decoder"])
def test_a_network(name: str) -> None:
    module, kwargs = MODELS[name](1, 8, 8)
    program = export(module, **kwargs)
    assert written(decompose(program)[1]) == written(trace_whole(program).graph)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.dropout(x, training=False),
        lambda x: (x.contiguous(), x.reshape(2, -1), x),
        lambda x: x.unbind(1)[3] + x.tensor_split(3, 2)[2].sum((1, 2), keepdim=True)[:, 0],
        lambda x: F.interpolate(F.pad(x, (1, 1, 2, 0), "reflect"), scale_factor=2.0, mode="bilinear").type_as(x),
        lambda x: torch.addmm(x[0, 0], x[0, 1], x[0, 2, :5, :5].T.contiguous().T),
        lambda x: (x * 2).expand_as(x).to(torch.float64).mean(1).double().broadcast_to(3, 2, 6, 5),
        lambda x: torch.cat([torch.zeros(2, 8, 1, 5), torch.ones_like(x), torch.full((2, 8, 2, 5), 0.5)], 2),
    ],
)  # fmt: skip
def test_functions(function: Callable[[Tensor], Any]) -> None:
    program = export(Function(function), X)
    graph = decompose(program)[1]
    assert written(graph) == written(trace_whole(program).graph)


def test_what_is_written_in_place_is_traced_whole(traced: list[int]) -> None:
    def function(x: Tensor) -> Tensor:
        y = x.clone()
        y[:, :, 1:3] = x[:, :, :2].mul_(2)
        return y.relu_().reshape(2, -1)

    net = Function(lambda x: function(x + 0))
    captured = dc.capture(net, (X,))
    assert len(traced) == 1
    assert not any(n.target._schema.is_mutable for n in captured.graph.nodes if n.op == "call_function")
    inputs = {i.value: X for i in captured.inputs}
    outs = interpret(captured.graph, inputs, lambda name: captured.weights[name][1](), 1)
    assert torch.equal(outs[0][0], net(X))


def test_results_stay_what_they_are() -> None:
    block = Block().eval()
    captured = dc.capture(block, (X, T))
    values = {i.value: v for i, v in zip(captured.inputs, (X, T), strict=True)}
    with torch.no_grad():
        outs = interpret(captured.graph, values, lambda name: captured.weights[name][1](), 1)
        assert torch.equal(outs[0][0], block(X, T))


def test_an_input_may_have_the_name_of_a_builtin() -> None:
    class Net(nn.Module):
        def forward(self, input: Tensor, range: Tensor) -> Tensor:
            return (input + range).reshape(2, -1)

    captured = dc.capture(Net(), (X, X))
    assert [i.path for i in captured.inputs] == ["input", "range"]
    assert [i.value for i in captured.inputs] == [n.name for n in captured.graph.find_nodes(op="placeholder")]
