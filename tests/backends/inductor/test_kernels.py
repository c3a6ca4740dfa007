"""Kernels of our own: what of a graph they take, and on GPUs that they agree with what they stand for."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from districompile.backends.inductor import attention, autotune, convolution, gated, split_linear
from districompile.backends.inductor.backend import InductorBackend
from districompile.backends.inductor.kernels import hopper, launch
from districompile.ir.ops import ops
from districompile.ir.segment import SegmentGraph
from districompile.testing import make_segment
from tests.helpers_segments import error, run_on_gpu

_UNAVAILABLE = launch.unavailable_reason()


def _gated(x: Tensor, w: Tensor, b: Tensor | None = None, *, first: bool = True, approximate: str = "none") -> Tensor:
    product, half = torch.nn.functional.linear(x, w, b), w.shape[0] // 2
    halves = product[..., :half], product[..., half : 2 * half]  # as plans have it
    value, gate = halves if first else halves[::-1]
    return value * torch.nn.functional.gelu(gate, approximate=approximate)


def _gated_segment(dtype: torch.dtype = torch.float16, bias: bool = True, **kwargs: Any) -> SegmentGraph:
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

    def pays(*size: Any) -> int:
        asked.append(size)
        return 160

    monkeypatch.setattr(gated, "best_tile", pays)
    segment = _gated_segment(**kwargs)
    args = [torch.randn(s.shape).to(s.dtype) for _, s in (*segment.inputs, *segment.weights)]
    want = segment.graph(*args)[0]
    gated.fuse_gated_linears(segment.graph.graph)
    segment.graph.recompile()
    segment.graph.graph.lint()
    found = [n for n in segment.graph.graph.nodes if n.target is gated.GATED_LINEAR]
    assert [size[:-1] for size in asked] == ([taken] if taken else []) and len(found) == bool(taken)
    assert error(segment.graph(*args)[0], want) < 2e-3
    if taken:
        assert len([n for n in segment.graph.graph.nodes if n.op == "call_function"]) == 1


def test_a_product_that_is_read_elsewhere_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated, "best_tile", lambda *size: 160)

    def twice(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.nn.functional.linear(x, w)
        return y[..., :32] * torch.nn.functional.gelu(y[..., 32:64]), y

    graph = make_segment(twice, {"x": torch.randn(5, 24).half()}, {"w": torch.randn(64, 24).half()}).graph.graph
    gated.fuse_gated_linears(graph)
    assert not [n for n in graph.nodes if n.target is gated.GATED_LINEAR]


@pytest.mark.parametrize(
    ("keys", "parts"), [(1, (16, 0)), (16, (16, 0)), (77, (64, 16)), (100, (128, 0)), (33, (32, 16))]
)
def test_few_keys_are_held_in_little(keys: int, parts: tuple[int, int]) -> None:
    operators = pytest.importorskip("districompile.backends.inductor.kernels.operators")
    assert operators.parts(keys) == parts and sum(parts) >= keys


def test_nothing_is_timed_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launch.unavailable_reason() == "there is no GPU"
    assert gated.best_tile.__wrapped__(16, 16, 16, False, torch.float16) is None
    assert attention.best_attention.__wrapped__(1, 1, 16, 16, 16, torch.float16, True, True) is None
    size = (1, 64, 9, 9), (64, 64, 3, 3), (1, 1), (1, 1)
    assert convolution.best_convolution.__wrapped__(*size, torch.float16, True, True) is None
    assert split_linear.best_split_config.__wrapped__(16, 16, 16, 16, torch.float16, True) is None


def test_which_machines_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert launch.unavailable_reason() == "they are for Hopper GPUs, and this is an NVIDIA A100"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(hopper, "_no_compiler", lambda: "there is no compiler")
    assert launch.unavailable_reason() is None and hopper.unavailable_reason() == "there is no compiler"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert launch.unavailable_reason() == hopper.unavailable_reason() == "triton is not installed"


@pytest.mark.parametrize(
    ("bias", "users", "keys", "width", "taken"),
    [(False, 1, 9, 16, True), (True, 1, 9, 16, False), (False, 2, 9, 16, False), (False, 1, 129, 16, False),
     (False, 1, 9, 24, False)],
)  # fmt: skip
def test_which_queries_are_made_where_they_are_needed(
    bias: bool, users: int, keys: int, width: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def pays(*size: Any) -> tuple[int, ...]:
        asked.append(size)
        return (128, 64, 4, 4)

    monkeypatch.setattr(attention, "best_projection_config", pays)
    monkeypatch.setattr(attention, "best_attention", lambda *size: None)
    inner = 3 * width

    def attend(x: Tensor, text: Tensor, w: Tensor, b: Tensor | None = None) -> tuple[Tensor, ...]:
        product = torch.nn.functional.linear(x, w, b)
        q, k = (t.reshape(2, -1, 3, width).permute(0, 2, 1, 3) for t in (product, text))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)
        return (y, product)[:users]

    inputs = {"x": torch.randn(2, 5, 40).half(), "text": torch.randn(2, keys, inner).half()}
    weights = {"w": torch.randn(inner, 40).half() / 6, **({"b": torch.randn(inner).half()} if bias else {})}
    segment = make_segment(attend, inputs, weights)
    want = segment.graph(*inputs.values(), *weights.values())[0]
    assert not attention.autotune_attention(segment.graph.graph, (), custom_kernels=True)
    segment.graph.recompile()
    segment.graph.graph.lint()
    found = [n for n in segment.graph.graph.nodes if n.target is attention.PROJECTED_ATTENTION]
    assert len(found) == taken and asked == ([(2, 3, 5, width, keys, 40, torch.float16, None)] if taken else [])
    assert error(segment.graph(*inputs.values(), *weights.values())[0], want) < 2e-3


def test_keys_that_are_the_queries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "best_projection_config", lambda *size: (128, 64, 4, 4))
    monkeypatch.setattr(attention, "best_attention", lambda *size: None)

    def attend(x: Tensor, w: Tensor) -> Tensor:
        q = torch.nn.functional.linear(x, w).reshape(2, 5, 3, 16).permute(0, 2, 1, 3)
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    weights = {"w": torch.randn(48, 40).half()}
    graph = make_segment(attend, {"x": torch.randn(2, 5, 40).half()}, weights).graph.graph
    attention.autotune_attention(graph, (), custom_kernels=True)
    assert not [n for n in graph.nodes if n.target is attention.PROJECTED_ATTENTION]


def test_columns_of_one_product_go_three_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Own keys and values to where others arrive, and what is left of the product is still seen to be gated."""
    monkeypatch.setattr(split_linear, "best_split_config", lambda *size: ())
    monkeypatch.setattr(gated, "best_tile", lambda *size: 160)

    def block(others: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.nn.functional.linear(x, w)
        return y[..., :8] * torch.nn.functional.gelu(y[..., 8:16]), ops.assemble_in_place(
            others, y[..., 16:32], 1, 5, 0, 5
        )

    inputs, weights = {"others": torch.randn(10, 1, 16), "x": torch.randn(1, 5, 24)}, {"w": torch.randn(32, 24)}
    segment = make_segment(block, inputs, weights)
    args = [*inputs.values(), *weights.values()]
    want = segment.graph(*(a.clone() for a in args))
    split_linear.split_linears(segment.graph.graph, custom_kernels=True)
    gated.fuse_gated_linears(segment.graph.graph)
    segment.graph.recompile()
    assert [n.target for n in segment.graph.graph.nodes].count(split_linear.INSERT_LINEAR) == 1
    for a, b in zip(segment.graph(*args), want, strict=True):
        torch.testing.assert_close(a, b)


# The kernels: on a GPU, or, as far as numbers go, in Triton's interpreter, in a process of its own

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DEVICE = "cpu" if _INTERPRETED else "cuda"
_DTYPES = [torch.float16] if _INTERPRETED else [torch.float16, torch.bfloat16]  # NumPy has no bfloat16
_numbers = pytest.mark.skipif(not _INTERPRETED and _UNAVAILABLE is not None, reason=str(_UNAVAILABLE))


@pytest.mark.slow
@pytest.mark.skipif(_INTERPRETED, reason="this is the interpreter")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_numbers_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "agree", __file__]
    ran = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=500
    )
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert " passed" in ran.stdout and "skipped" not in ran.stdout.splitlines()[-1], ran.stdout[-1000:]


@_numbers
@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize(
    ("queries", "keys", "width"),
    [(130, 77, 64), (70, 16, 40), (64, 9, 64), (90, 128, 80), (133, 300, 64), (100, 256, 40), (70, 256, 36)],
)
def test_attention_agrees(dtype: torch.dtype, queries: int, keys: int, width: int) -> None:
    """Keys and values of one product, of two images."""
    from districompile.backends.inductor.kernels import operators

    packed = torch.randn(2, keys, 2 * 3 * width, device=_DEVICE).to(dtype).view(2, keys, 2, 3, width)
    q, k, v = torch.randn(2, queries, 3, width, device=_DEVICE).to(dtype), packed[:, :, 0], packed[:, :, 1]
    want = attention.kernel_attention(q.double(), k.double(), v.double(), 0.2, []).to(dtype)
    for way in (*(attention._FOR_FEW if keys <= 128 else ()), *attention._FOR_MANY):
        got = operators.attention(q, k, v, 0.2, list(way))
        assert got.is_contiguous() and error(got, want) <= 2 * torch.finfo(dtype).eps, way


@_numbers
@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize(("queries", "keys", "width"), [(130, 77, 64), (70, 16, 32)])
def test_attention_with_its_product_agrees(dtype: torch.dtype, queries: int, keys: int, width: int) -> None:
    from districompile.backends.inductor.kernels import operators

    k, v = (torch.randn(2, keys, 3, width, device=_DEVICE).to(dtype) for _ in range(2))
    x, w = torch.randn(2, queries, 72, device=_DEVICE).to(dtype), torch.randn(3 * width, 72, device=_DEVICE).to(dtype)
    q = torch.nn.functional.linear(x.double(), w.double()).to(dtype).view(2, queries, 3, width)
    want = attention.kernel_attention(q.double(), k.double(), v.double(), 0.05, []).to(dtype)
    for way in attention._PROJECTED_CONFIGS:
        got = operators.projected_attention(x, w, k, v, 0.05, list(way))
        assert error(got, want) <= 4 * torch.finfo(dtype).eps, way


@_numbers
@pytest.mark.parametrize("dtype", _DTYPES)
def test_products_with_two_results_agree(dtype: torch.dtype) -> None:
    from districompile.backends.inductor.kernels import operators

    rows, split, columns = 70, 256, 768
    x, w = (torch.randn(n, 72, device=_DEVICE).to(dtype) for n in (rows, columns))
    want = (x.double() @ w.double().t()).to(dtype)
    for way in split_linear._CONFIGS:
        place = torch.zeros(3 * rows, columns - split, device=_DEVICE, dtype=dtype)
        first = operators.split_matmul(place, x, w, split, rows * (columns - split), list(way))
        assert error(first, want[:, :split].contiguous()) <= 2 * torch.finfo(dtype).eps, way
        assert error(place[rows : 2 * rows], want[:, split:].contiguous()) <= 2 * torch.finfo(dtype).eps, way
        assert not place[:rows].any() and not place[2 * rows :].any()


_16 = torch.float16
_CHOICES: list[tuple[Any, tuple[Any, ...], int]] = [
    (attention.best_attention, (1, 2, 70, 32, 30, _16, (), True), 2),
    (attention.best_attention, (1, 2, 70, 32, 140, _16, (), True), 2),
    (attention.best_projection_config, (1, 2, 70, 32, 30, 64, _16, None), 2),
    (attention.best_projection_config, (1, 2, 70, 32, 30, 64, _16, (64, 0, 4, 1)), 2),
    (split_linear.best_split_config, (70, 64, 256, 128, _16, True), 3),
]


@pytest.mark.skipif(not _INTERPRETED, reason="run in the interpreter, by the first of these tests")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("choose", "size", "ways"), _CHOICES)
def test_what_is_compared_when_choosing_agrees(
    choose: Any, size: tuple[Any, ...], ways: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU and without a clock: a way that fails, or computes something else, would be a warning."""
    for name in ("randn", "empty"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *s, dtype, device, make=make: make(*s).to(dtype))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module in (attention, split_linear):
        monkeypatch.setattr(module, "unavailable_reason", lambda: None)
    monkeypatch.setattr(autotune, "_replay", lambda call: lambda: 1.0)
    with autotune.recorded_timings() as times:
        assert choose.__wrapped__(*size) is None
    assert len(times) == 1 + ways


@pytest.mark.skipif(not _INTERPRETED, reason="run in the interpreter, by the first of these tests")
def test_a_result_that_is_not_written_agrees_with_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from districompile.backends.inductor.kernels import operators

    for name in ("randn", "empty"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *s, dtype, device, make=make: make(*s).to(dtype))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(split_linear, "unavailable_reason", lambda: None)
    monkeypatch.setattr(autotune, "_replay", lambda call: lambda: 1.0)
    monkeypatch.setattr(operators, "split_matmul", lambda place, x, w, split, *rest: (x @ w.t())[:, :split])
    with pytest.warns(UserWarning, match="a linear layer with two results .* its result is wrong"):
        split_linear.best_split_config.__wrapped__(70, 64, 256, 128, _16, True)


@pytest.mark.gpu
@pytest.mark.skipif(_UNAVAILABLE is not None, reason=str(_UNAVAILABLE))
def test_an_engine_has_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of a transformer whose keys and values go between those of others, as a segment of it."""
    rows, inner, heads = 256, 320, 5

    def block(
        others: Tensor, text: Tensor, x: Tensor, w: Tensor, wq: Tensor, f: Tensor, fb: Tensor
    ) -> tuple[Tensor, Tensor]:
        split = torch.nn.functional.linear(x, w)
        q, own = split[..., :inner], split[..., inner : 3 * inner]
        whole = ops.assemble_in_place(others, own, 1, rows, 0, rows)
        k, v = whole[..., :inner], whole[..., inner : 2 * inner]

        def by_head(t: Tensor) -> Tensor:
            return t.reshape(1, -1, heads, inner // heads).transpose(1, 2)

        y = torch.nn.functional.scaled_dot_product_attention(by_head(q), by_head(k), by_head(v))
        y = torch.nn.functional.scaled_dot_product_attention(y, by_head(text), by_head(text))
        q = by_head(torch.nn.functional.linear(torch.nn.functional.layer_norm(x, (inner,)), wq))
        y = y + torch.nn.functional.scaled_dot_product_attention(q, by_head(text), by_head(text))
        y = x + y.transpose(1, 2).flatten(2)
        return _gated(torch.nn.functional.layer_norm(y, (inner,)), f, fb), y

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).half()

    inputs = {"others": normal(2 * rows, 1, 2 * inner), "text": normal(1, 77, inner), "x": normal(1, rows, inner)}
    weights = {
        "w": normal(3 * inner, inner) / 16,
        "wq": normal(inner, inner) / 16,
        "f": normal(4 * inner, inner) / 16,
        "fb": normal(4 * inner),
    }
    segment = make_segment(block, inputs, weights)
    cuda = {n: x.cuda() for n, x in inputs.items()}
    want = segment.graph.cuda()(*cuda.values(), *(w.cuda() for w in weights.values()))
    monkeypatch.setattr(gated, "best_tile", lambda *size: 160)
    monkeypatch.setattr(attention, "best_attention", lambda *size: (64, 0, 4, 1) if size[4] == 77 else (64, 64, 4, 3))
    monkeypatch.setattr(attention, "best_projection_config", lambda *size: (128, 64, 4, 4))
    monkeypatch.setattr(split_linear, "best_split_config", lambda *size: (128, 64, 64, 4, 4))
    backend = InductorBackend("cuda")
    got = run_on_gpu(backend, segment, cuda, weights, tmp_path)
    for name, x in zip(got, want, strict=True):
        assert error(got[name], x) < 4e-3, name
    job = backend._package(segment).job.graph
    assert all(word in job for word in ("gated_product", "kernel_attention", "product_attention", "insert_product"))
