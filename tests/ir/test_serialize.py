from __future__ import annotations

import json
import math
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from districompile.errors import BackendError
from districompile.ir.ops import ops
from districompile.ir.serialize import content_hash, graph_from_json, graph_to_json, needed
from districompile.testing import make_segment


def busy(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y = F.pad(F.conv2d(x, w, padding=1), (1, 1, 1, 1), mode="circular")
    a, b = y.chunk(2, 1)
    c = torch.full((2,), -math.inf) + torch.arange(2, dtype=torch.float32)
    d = ops.assemble(a.movedim(2, 0), b, 2, 1, 0, 0, 2).to(torch.float16).contiguous(memory_format=torch.channels_last)
    return d, torch.cat([a, b], 3).float(), c, ops.moments(x, 2).clamp(min=-1e30)


def text(function: object, *args: Tensor) -> str:
    return graph_to_json(make_segment(function, {f"x{i}": a for i, a in enumerate(args)}).graph)  # type: ignore[arg-type]


ARGS = (torch.randn(1, 4, 3, 3), torch.randn(4, 4, 3, 3))


def test_round_trip() -> None:
    written = text(busy, *ARGS)
    module = graph_from_json(written)
    assert graph_to_json_with_meta(module, *ARGS) == written
    for got, want in zip(module(*ARGS), busy(*ARGS), strict=True):
        assert torch.equal(got, want) and got.dtype == want.dtype


def graph_to_json_with_meta(module: fx.GraphModule, *args: Tensor) -> str:
    assert [n.meta["val"].shape for n in module.graph.nodes if n.op == "placeholder"] == [a.shape for a in args]
    return graph_to_json(module)


def test_readable_form() -> None:
    assert text(lambda x: x * 2.0 + x, torch.zeros(1, 3)) == (
        '{"inputs":[["float32",[1,3]]],"nodes":[["aten.mul.Tensor",["%0",2.0],{}],'
        '["aten.add.Tensor",["%1","%0"],{}]],"outputs":["%2"]}'
    )


def test_equal_graphs_have_equal_text() -> None:
    def renamed(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        x.exp()  # and something that nobody needs
        return busy(x, w)

    other = make_segment(renamed, {"p": ARGS[0], "q": ARGS[1]}).graph
    for i, node in enumerate(other.graph.nodes):
        node._rename(f"n{i}")
    assert graph_to_json(other) == text(busy, *ARGS)
    assert content_hash(graph_to_json(other)) == content_hash(text(busy, *ARGS)) != content_hash("")
    assert len(content_hash("")) == 20


@pytest.mark.parametrize(
    "other", [lambda x: x * 2, lambda x: x * 2.5, lambda x: 2.0 * x + 0, lambda x: (x * 2.0) * 2.0]
)
def test_different_graphs_have_different_text(other: object) -> None:
    assert text(other, torch.zeros(3)) != text(lambda x: x * 2.0, torch.zeros(3))


def test_device_is_chosen_on_reading() -> None:
    written = text(lambda x: x + torch.arange(3), torch.zeros(3))
    assert graph_from_json(written, torch.device("meta"))(torch.zeros(3, device="meta")).__len__() == 1
    assert graph_from_json(written)(torch.zeros(3))[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "op",
    ["aten.from_file.default", "os.system", "builtins.eval", "operator.call", "operator.attrgetter",
     "aten.nope.default",
     "aten.add", "profiler._record_function_enter.default", "aten.add.__init__", "aten.__class__.default", ""],
)  # fmt: skip
def test_operators_that_are_not_allowed(op: str) -> None:
    evil = json.dumps({"inputs": [["float32", [1]]], "nodes": [[op, ["%0"], {}]], "outputs": ["%1"]})
    with pytest.raises(BackendError, match="does not know or does not allow"):
        graph_from_json(evil)


@pytest.mark.parametrize(
    "bad",
    ["", "[]", "{}",
     '{"inputs":[["float99",[1]]],"nodes":[],"outputs":[]}', '{"inputs":[],"nodes":[],"outputs":["%0"]}',
     '{"inputs":[],"nodes":[["aten.add.Tensor",[{"layout":"nn"}],{}]],"outputs":["%0"]}',
     '{"inputs":[],"nodes":[["aten.add.Tensor",[{"what":"nn"}],{}]],"outputs":["%0"]}',
     '{"inputs":[],"nodes":[["aten.add.Tensor"]],"outputs":[]}', '{"inputs":' + "[" * 2000],
)  # fmt: skip
def test_malformed(bad: str) -> None:
    with pytest.raises(BackendError, match="not a graph of this version"):
        graph_from_json(bad)


def test_what_cannot_be_written() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(2)
    y = graph.call_function(print, (x,))
    graph.output((y,))
    with pytest.raises(BackendError, match="print"):
        graph_to_json(fx.GraphModule(torch.nn.Module(), graph))
    module = fx.GraphModule(torch.nn.Module(), graph)
    (x, y, _) = module.graph.nodes
    y.target = operator.getitem
    y.args = (x, object())  # type: ignore[assignment]
    with pytest.raises(BackendError, match=r"getitem.*an argument of type object cannot be stored"):
        graph_to_json(module)
    del x.meta["val"]
    with pytest.raises(BackendError, match=r"x .* is not known to be a tensor"):
        graph_to_json(module)


def test_needed_leaves_out_what_nobody_reads() -> None:
    gm = make_segment(lambda x: (x.exp(), x + 1)[1], {"x": torch.zeros(2)}).graph
    assert [str(n.target) for n in needed(gm.graph)] == ["aten.add.Tensor"]
