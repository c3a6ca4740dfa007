"""Attention by FlashAttention-3: what is handed to it, and what is said where it is missing. On the CPU its operator is
PyTorch's attention; the last test runs the library, where there is a GPU and it is installed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import districompile as dc
from districompile.backends.eager import EagerBackend
from districompile.backends.inductor import attention, autotune, flash_attention
from districompile.backends.inductor.backend import InductorBackend
from districompile.errors import BackendError
from districompile.testing import make_segment
from tests.helpers_segments import error, run_segment

_REASON = InductorBackend("cpu").build_unavailable_reason()
_FLASH = torch.ops.districompile.flash_attention.default


def _heads(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:-1], 2, -1).transpose(1, 2)


def _attend(x: Tensor, weight: Tensor, **kwargs: Any) -> Tensor:
    q, k, v = torch.nn.functional.linear(x, weight).chunk(3, -1)
    seen = torch.nn.functional.scaled_dot_product_attention(_heads(q), _heads(k), _heads(v), **kwargs)
    return seen.transpose(1, 2).flatten(2) + x


def _graph(dtype: torch.dtype, length: int, width: int, **kwargs: Any) -> fx.Graph:
    inputs = {"x": torch.randn(1, length, 2 * width).to(dtype)}
    weights = {"w": torch.randn(6 * width, 2 * width).to(dtype)}
    return make_segment(lambda x, w: _attend(x, w, **kwargs), inputs, weights).graph.graph


@pytest.mark.parametrize(
    ("dtype", "length", "width", "kwargs", "taken"),
    [
        (torch.float16, 1024, 64, {}, True),
        (torch.bfloat16, 1200, 40, {"scale": 0.3}, True),
        (torch.float16, 1024, 256, {}, True),
        (torch.float32, 1024, 64, {}, False),
        (torch.float16, 7, 64, {}, True),
        (torch.float16, 1024, 264, {}, False),
        (torch.float16, 1024, 36, {}, False),
        (torch.float16, 1024, 64, {"is_causal": True}, False),
        (torch.float16, 1024, 64, {"scale": -0.3}, False),
        (torch.float16, 1024, 64, {"attn_mask": torch.zeros(1, 1024).half()}, False),
    ],
)
def test_what_is_handed_over(dtype: torch.dtype, length: int, width: int, kwargs: Any, taken: bool) -> None:
    graph = _graph(dtype, length, width, **kwargs)
    assert attention.autotune_attention(graph, "flash3", custom_kernels=False) == taken
    calls = [n for n in graph.nodes if n.target is _FLASH]
    assert len(calls) == taken
    if taken:
        scale: Any = calls[0].args[3]
        assert scale == pytest.approx(kwargs.get("scale", 1 / math.sqrt(width)))


@pytest.mark.skipif(_REASON is not None, reason=str(_REASON))
@pytest.mark.slow
def test_an_engine_calls_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention, "select_implementation", lambda asked, kind: asked)
    monkeypatch.setattr(attention, "best_attention", lambda *size: (2,))
    inputs, weights = {"x": torch.randn(1, 1024, 128).half()}, {"w": torch.randn(384, 128).half() / 10}
    segment = make_segment(_attend, inputs, weights)
    got = run_segment(InductorBackend("cpu"), segment, inputs, weights, tmp_path)
    want = run_segment(EagerBackend(), segment, inputs, weights, tmp_path)
    assert max(error(got[n], want[n]) for n in want) < 2e-3
    [engine] = (json.loads(p.read_text()) for p in tmp_path.rglob("*.aoti.json"))
    assert engine["calls"] == ["flash_attn_3"]


def test_the_fastest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's kernels take 1, the library's, and ours, what is said here."""
    graph, takes, asked = _graph(torch.float16, 16, 8), dict[Any, float](), list[Any]()

    def library(q: Tensor, k: Tensor, v: Tensor, scale: float, splits: int) -> Tensor:
        if splits == 3:
            raise RuntimeError("no heads of 8 in this build\nand a stack")
        return flash_attention.sdpa_fallback(q, k, v, scale, splits)

    def replay(call: Any) -> Any:
        return lambda: takes.get(call.args[-1] if call.func is library else 0, 1.0)

    def choose(**given: float) -> Any:
        takes.clear()
        takes.update({int(k[1:]): v for k, v in given.items()})
        with pytest.warns(UserWarning, match=r"for heads of 8 torch.float16 \(3,\) is not used here: no heads of 8"):
            return attention.best_attention.__wrapped__(1, 2, 16, 8, 16, torch.float16, True, False)

    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, dtype, device: draw(*size).to(dtype))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flash_attention, "flash3", library)
    monkeypatch.setattr(autotune, "_replay", replay)
    assert choose(_1=0.8, _2=0.9) == (1,) and choose(_1=0.9, _2=0.8) == (2,)
    assert choose(_1=1.1, _2=1.2) is None and choose(_1=0.99, _2=1.2) is None

    def slower(*size: Any) -> None:
        asked.append(size)

    monkeypatch.setattr(attention, "best_attention", slower)
    assert not attention.autotune_attention(graph, "auto", custom_kernels=True)
    assert asked == [(1, 2, 16, 8, 16, torch.float16, True, True)]


def test_what_computes_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(100, 8)
    ways: Any = {"wrong": lambda: (x, 1.1 * x), "no number": lambda: (x, x / 0 * 0), "right": lambda: (x, x * 1.001),
                 "a row": lambda: (x, x * (torch.arange(100) != 99)[:, None])}  # fmt: skip
    seconds = {"a row": 0.1, "wrong": 0.1, "no number": 0.2, "right": 0.5}
    names = {call: name for name, call in ways.items()}
    monkeypatch.setattr(autotune, "_replay", lambda call: lambda: seconds.get(names.get(call, ""), 1.0))
    with pytest.warns(UserWarning, match="another way wrong is not used here: its result is wrong"):
        assert autotune.best_config("another way", lambda: (x, x), ways) == "right"
    with pytest.warns(UserWarning, match="another way right is not used"):
        assert autotune.best_config("another way", lambda: (x, x), ways, reference=lambda: (-x, x)) is None


def test_ours_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "best_attention", lambda *size: (64, 0, 4, 1))
    inputs, weights = {"x": torch.randn(1, 16, 16).half()}, {"w": torch.randn(48, 16).half()}
    segment = make_segment(_attend, inputs, weights)
    want = segment.graph(*inputs.values(), *weights.values())[0]
    assert not attention.autotune_attention(segment.graph.graph, "torch", custom_kernels=True)
    segment.graph.recompile()
    [call] = [n for n in segment.graph.graph.nodes if n.target is attention.KERNEL_ATTENTION]
    assert call.args[4] == [64, 0, 4, 1]
    assert error(segment.graph(*inputs.values(), *weights.values())[0], want) < 2e-3


def test_chosen_where_it_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        flash_attention.select_implementation("auto", "cpu")
        == flash_attention.select_implementation("torch", "cpu")
        == "torch"
    )
    with pytest.raises(BackendError, match="attention=flash3 needs a GPU: give attention=torch"):
        flash_attention.select_implementation("flash3", "cpu")
    with pytest.raises(BackendError, match="attention=fast: give one of auto, torch, flash3"):
        flash_attention.select_implementation("fast", "cpu")  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert flash_attention.select_implementation("auto", "cuda") == "torch"
    with pytest.raises(BackendError, match="for Hopper GPUs, and this is an NVIDIA A100"):
        flash_attention.select_implementation("flash3", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(flash_attention, "PACKAGE", "not_a_package")
    assert flash_attention.select_implementation("auto", "cuda") == "torch"
    with pytest.raises(BackendError, match="not_a_package, which is not installed"):
        flash_attention.select_implementation("flash3", "cuda")
    monkeypatch.setattr(flash_attention, "PACKAGE", "json")
    assert flash_attention.select_implementation("auto", "cuda") == "auto"


def test_missing_where_an_engine_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_attention.load(torch.device("cpu"))
    monkeypatch.setattr(flash_attention, "PACKAGE", "not_a_package")
    with pytest.raises(dc.Error, match="not_a_package cannot be imported.*attention=torch"):
        flash_attention.load(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(
    flash_attention.unavailable_reason("cuda") is not None, reason=str(flash_attention.unavailable_reason("cuda"))
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("start", "splits"), [(0, 1), (0, 2), (3, 1)])
def test_the_library_agrees(dtype: torch.dtype, start: int, splits: int) -> None:
    """Keys and values of one product, as engines hand them over; those that are not at 16 bytes are copied."""
    packed = torch.randn(2, 1500, 2 * 5 * 64 + start, device="cuda").to(dtype)[..., start:].view(2, 1500, 2, 5, 64)
    q, k, v = torch.randn(2, 700, 5, 64, device="cuda").to(dtype), packed[:, :, 0], packed[:, :, 1]
    _FLASH(q, k, v, 0.2, splits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = _FLASH(q, k, v, 0.2, splits)
    graph.replay()
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.2).transpose(1, 2)
    assert got.is_contiguous() and error(got.double(), want) <= 2 * torch.finfo(dtype).eps
