"""Kernels of our own: what of a graph they take, and on GPUs that they agree with what they stand for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from districompile.backends import attention, inductor_direct
from districompile.backends.base import BuildSegment
from districompile.backends.gpu import gated, launch
from districompile.backends.inductor import InductorBackend
from districompile.ir.ops import ops
from districompile.weights import WeightFile
from tests.helpers_segments import error, make_segment, write_weights

_UNUSABLE = launch.unusable()
_on_gpu = [pytest.mark.gpu, pytest.mark.skipif(_UNUSABLE is not None, reason=str(_UNUSABLE))]


def _gated(x: Tensor, w: Tensor, b: Tensor | None = None, *, first: bool = True, approximate: str = "none") -> Tensor:
    product, half = torch.nn.functional.linear(x, w, b), w.shape[0] // 2
    halves = product[..., :half], product[..., half : 2 * half]  # as plans have it
    value, gate = halves if first else halves[::-1]
    return value * torch.nn.functional.gelu(gate, approximate=approximate)


def _gated_segment(dtype: torch.dtype = torch.float16, bias: bool = True, **kwargs: Any) -> BuildSegment:
    weights = {"w": torch.randn(64, 24).to(dtype), **({"b": torch.randn(64).to(dtype)} if bias else {})}
    return make_segment(lambda *args: _gated(*args, **kwargs), {"x": torch.randn(2, 5, 24).to(dtype)}, weights)


@pytest.mark.parametrize(
    ("kwargs", "taken"),
    [
        ({}, (10, 24, 64, True)),
        ({"bias": False, "dtype": torch.bfloat16}, (10, 24, 64, False)),
        ({"dtype": torch.float32}, None),
        ({"first": False}, None),
        ({"approximate": "tanh"}, None),
    ],
)
def test_which_products_are_gated(kwargs: Any, taken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def pays(*size: Any) -> tuple[int, ...]:
        asked.append(size)
        return (1, 2, 3, 4, 5)

    monkeypatch.setattr(gated, "pays", pays)
    segment = _gated_segment(**kwargs)
    args = [torch.randn(s.shape).to(s.dtype) for _, s in (*segment.inputs, *segment.weights)]
    want = segment.graph(*args)[0]
    gated.use_gated_products(segment.graph.graph)
    segment.graph.recompile()
    segment.graph.graph.lint()
    found = [n for n in segment.graph.graph.nodes if n.target is gated.GATED_PRODUCT]
    assert [size[:-1] for size in asked] == ([taken] if taken else []) and len(found) == bool(taken)
    assert error(segment.graph(*args)[0], want) < 2e-3
    if taken:
        assert len([n for n in segment.graph.graph.nodes if n.op == "call_function"]) == 1


def test_a_product_that_is_read_elsewhere_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated, "pays", lambda *size: (1, 2, 3, 4, 5))

    def twice(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.nn.functional.linear(x, w)
        return y[..., :32] * torch.nn.functional.gelu(y[..., 32:64]), y

    graph = make_segment(twice, {"x": torch.randn(5, 24).half()}, {"w": torch.randn(64, 24).half()}).graph.graph
    gated.use_gated_products(graph)
    assert not [n for n in graph.nodes if n.target is gated.GATED_PRODUCT]


@pytest.mark.parametrize(
    ("keys", "parts"), [(1, (16, 0)), (16, (16, 0)), (77, (64, 16)), (100, (128, 0)), (33, (32, 16))]
)
def test_few_keys_are_held_in_little(keys: int, parts: tuple[int, int]) -> None:
    operators = pytest.importorskip("districompile.backends.gpu.operators")
    assert operators.parts(keys) == parts and sum(parts) >= keys


def test_nothing_is_timed_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launch.unusable() == "there is no GPU"
    assert gated.pays.__wrapped__(16, 16, 16, False, torch.float16) is None
    assert attention.choose.__wrapped__(1, 1, 16, 16, 16, torch.float16, True, True) is None
    assert inductor_direct.split_pays.__wrapped__(16, 16, 16, 16, torch.float16, True) is None


def test_which_machines_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "which an NVIDIA A100 has not" in str(launch.unusable())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert launch.unusable() == "triton is not installed"


# On GPUs


@pytest.mark.parametrize("mark", [pytest.param(0, marks=_on_gpu)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inner", "columns", "bias"), [(512, 1280, 5120, True), (300, 328, 192, False)])
def test_gated_products_agree(dtype: torch.dtype, rows: int, inner: int, columns: int, bias: bool, mark: int) -> None:
    from districompile.backends.gpu import operators

    x, w = (torch.randn(n, inner, device="cuda").to(dtype) for n in (rows, 2 * columns))
    w, b = w / 20, torch.randn(2 * columns, device="cuda").to(dtype) if bias else None
    want = _gated(x.double(), w.double(), None if b is None else b.double())
    for way in gated._WAYS:
        if columns % way[1] == 0:
            got = operators.gated_product(x, w, b, list(way))
            assert error(got.double(), want) <= 2 * torch.finfo(dtype).eps, way


@pytest.mark.parametrize("mark", [pytest.param(0, marks=_on_gpu)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("queries", "keys", "width"),
    [(512, 77, 64), (300, 16, 40), (64, 9, 64), (200, 128, 80), (333, 1000, 64), (100, 1024, 40), (512, 512, 36)],
)
def test_attention_agrees(dtype: torch.dtype, queries: int, keys: int, width: int, mark: int) -> None:
    """Keys and values of one product, of two images."""
    from districompile.backends.gpu import operators

    packed = torch.randn(2, keys, 2 * 5 * width, device="cuda").to(dtype).view(2, keys, 2, 5, width)
    q, k, v = torch.randn(2, queries, 5, width, device="cuda").to(dtype), packed[:, :, 0], packed[:, :, 1]
    want = attention.kernel_attention(q.double(), k.double(), v.double(), 0.2, [])
    for way in (*(attention._FOR_FEW if keys <= 128 else ()), *attention._FOR_MANY):
        got = operators.attention(q, k, v, 0.2, list(way))
        assert got.is_contiguous() and error(got.double(), want) <= 2 * torch.finfo(dtype).eps, way


def _run(backend: InductorBackend, segment: BuildSegment, inputs: Any, weights: Any, folder: Path) -> dict[str, Tensor]:
    opened: WeightFile = write_weights(folder / "weights.safetensors", {n: w.cpu() for n, w in weights.items()})
    path = folder / f"{segment.name}{backend.suffix}"
    backend.build(segment, opened, path)
    outputs = tuple(n for n, _ in segment.outputs)
    engine: Any = backend.load(path, outputs, opened, torch.device("cuda", 0))
    given = {n: x.clone() for n, x in inputs.items()}
    engine.run(given, outputs)  # loads the kernels
    for name, x in {n: x.clone() for n, x in inputs.items()}.items():
        engine.bind(name, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine.enqueue()
    graph.replay()
    torch.cuda.synchronize()
    return {n: engine.output(n).clone() for n in outputs}


@pytest.mark.parametrize("mark", [pytest.param(0, marks=_on_gpu)])
@pytest.mark.parametrize("gate_way", gated._WAYS)
def test_an_engine_has_all_of_them(gate_way: Any, mark: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of a transformer whose keys and values go between those of others, as a segment of it."""
    rows, inner, heads = 256, 256, 4

    def block(others: Tensor, text: Tensor, x: Tensor, w: Tensor, f: Tensor, fb: Tensor) -> tuple[Tensor, Tensor]:
        split = torch.nn.functional.linear(x, w)
        q, own = split[..., :inner], split[..., inner : 3 * inner]
        whole = ops.insert(others, own, 1, rows, 0, rows)
        k, v = whole[..., :inner], whole[..., inner : 2 * inner]

        def by_head(t: Tensor) -> Tensor:
            return t.reshape(1, -1, heads, inner // heads).transpose(1, 2)

        y = torch.nn.functional.scaled_dot_product_attention(by_head(q), by_head(k), by_head(v))
        y = torch.nn.functional.scaled_dot_product_attention(y, by_head(text), by_head(text))
        y = x + y.transpose(1, 2).flatten(2)
        return _gated(torch.nn.functional.layer_norm(y, (inner,)), f, fb), y

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).half()

    inputs = {"others": normal(2 * rows, 1, 2 * inner), "text": normal(1, 77, inner), "x": normal(1, rows, inner)}
    weights = {"w": normal(3 * inner, inner) / 16, "f": normal(4 * inner, inner) / 16, "fb": normal(4 * inner)}
    segment = make_segment(block, inputs, weights)
    cuda = {n: x.cuda() for n, x in inputs.items()}
    want = segment.graph.cuda()(*cuda.values(), *(w.cuda() for w in weights.values()))
    monkeypatch.setattr(gated, "pays", lambda *size: gate_way)
    monkeypatch.setattr(attention, "choose", lambda *size: (64, 0, 4, 1) if size[4] == 77 else (64, 64, 4, 3))
    monkeypatch.setattr(inductor_direct, "split_pays", lambda *size: (128, 128, 64, 8, 4))
    backend = InductorBackend("cuda", attention="torch")
    got = _run(backend, segment, cuda, weights, tmp_path)
    for name, x in zip(got, want, strict=True):
        assert error(got[name], x) < 4e-3, name
    job = backend._package(segment).job.graph
    assert all(word in job for word in ("gated_product", "kernel_attention", "insert_product"))
