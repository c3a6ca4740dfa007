"""Attention by FlashAttention-3 and -4: what is handed to them, and what is said where they are missing. On the CPU
their operator is PyTorch's attention; the last test runs the libraries, where there is a GPU and they are installed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import types
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
    assert attention.autotune_attention(graph, (4,), custom_kernels=False, forced=True) == ({4} if taken else set())
    calls = [n for n in graph.nodes if n.target is _FLASH]
    assert len(calls) == taken
    if taken:
        scale: Any = calls[0].args[3]
        assert scale == pytest.approx(kwargs.get("scale", 1 / math.sqrt(width))) and calls[0].args[4:] == (4, 1)


@pytest.mark.skipif(_REASON is not None, reason=str(_REASON))
@pytest.mark.slow
def test_an_engine_calls_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "best_attention", lambda *size: (3, 2))
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

    def library(q: Tensor, k: Tensor, v: Tensor, scale: float, version: int, splits: int) -> Tensor:
        if splits == 3:
            raise RuntimeError("no heads of 8 in this build\nand a stack")
        return flash_attention.sdpa_fallback(q, k, v, scale)

    def replay(call: Any) -> Any:
        return lambda: takes.get(10 * call.args[-2] + call.args[-1] if call.func is library else 0, 1.0)

    def choose(**given: float) -> Any:
        takes.clear()
        takes.update({int(k[1:]): v for k, v in given.items()})
        with pytest.warns(UserWarning, match=r"for heads of 8 torch.float16 \(3, 3\) is not used here: no heads of 8"):
            return attention.best_attention.__wrapped__(1, 2, 16, 8, 16, torch.float16, (3, 4), False)

    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, dtype, device: draw(*size).to(dtype))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(flash_attention, "by_library", library)
    monkeypatch.setattr(autotune, "_replay", replay)
    assert choose(_31=0.8, _32=0.9) == (3, 1) and choose(_31=0.9, _32=0.8) == (3, 2)
    assert choose(_31=0.8, _41=0.7) == (4, 1)
    assert choose(_31=1.1, _32=1.2) is None and choose(_31=0.99, _32=1.2) is None

    def slower(*size: Any) -> None:
        asked.append(size)

    monkeypatch.setattr(attention, "best_attention", slower)
    assert not attention.autotune_attention(graph, (3,), custom_kernels=True)
    assert asked == [(1, 2, 16, 8, 16, torch.float16, (3,), True)]


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
    assert not attention.autotune_attention(segment.graph.graph, (), custom_kernels=True)
    segment.graph.recompile()
    [call] = [n for n in segment.graph.graph.nodes if n.target is attention.KERNEL_ATTENTION]
    assert call.args[4] == [64, 0, 4, 1]
    assert error(segment.graph(*inputs.values(), *weights.values())[0], want) < 2e-3


def gpu(monkeypatch: pytest.MonkeyPatch, major: int, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))


def test_chosen_where_it_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    select = flash_attention.select_libraries
    assert select("auto", "cpu") == select("torch", "cpu") == ()
    with pytest.raises(BackendError, match="attention=flash3 needs a GPU: give attention=torch"):
        select("flash3", "cpu")
    with pytest.raises(BackendError, match="attention=fast: give one of auto, torch, flash3, flash4"):
        select("fast", "cpu")  # type: ignore[arg-type]
    installed: set[str] = set()
    monkeypatch.setattr(flash_attention, "_installed", installed.__contains__)
    gpu(monkeypatch, 9, "NVIDIA H100")
    assert select("auto", "cuda") == select("torch", "cuda") == ()
    with pytest.raises(BackendError, match=r"flash_attn_3, which is not installed: .*github.com/Dao-AILab"):
        select("flash3", "cuda")
    with pytest.raises(BackendError, match=r'flash-attn-4, which is not installed: .*pip install "districompile\[att'):
        select("flash4", "cuda")
    installed |= {"flash_attn_3._C", "flash_attn.cute"}
    assert select("auto", "cuda") == (3, 4) and select("flash4", "cuda") == (4,) and select("torch", "cuda") == ()
    assert [flash_attention.LIBRARIES[v].offered_splits() for v in (3, 4)] == [(1, 2, 3), (1,)]
    gpu(monkeypatch, 8, "NVIDIA A100")
    assert select("auto", "cuda") == (4,)
    with pytest.raises(BackendError, match="for Hopper GPUs, and this is an NVIDIA A100"):
        select("flash3", "cuda")
    gpu(monkeypatch, 7, "Tesla V100")
    with pytest.raises(BackendError, match=r"for compute capability 8.0 and above, and this is an Tesla V100"):
        select("flash4", "cuda")
    gpu(monkeypatch, 10, "NVIDIA B200")
    assert flash_attention.LIBRARIES[4].offered_splits() == (1, 2, 3)


def test_a_package_that_cannot_be_found_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not flash_attention._installed("not_a_package.cute") and flash_attention._installed("json.decoder")


def test_missing_where_an_engine_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_attention.load_packages(["flash_attn_3", "flash-attn-4"], torch.device("cpu"))
    for version, package in ((3, "flash_attn_3"), (4, "flash-attn-4")):
        given = dataclasses.replace(flash_attention.LIBRARIES[version], module="not_a_package")
        monkeypatch.setitem(flash_attention.LIBRARIES, version, given)
        with pytest.raises(dc.Error, match=f"FlashAttention-{version}, and {package} cannot be im.*attention=torch"):
            flash_attention.load_packages([package], torch.device("cuda"))
    with pytest.raises(dc.Error, match="calls flash_attn_9, which this version does not know"):
        flash_attention.load_packages(["flash_attn_9"], torch.device("cuda"))


def test_version_4_is_called_as_its_package_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its function gives a pair, of which the second may be None."""
    given: list[Any] = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, num_splits: int) -> Any:
        given.append((softmax_scale, num_splits))
        return flash_attention.sdpa_fallback(q, k, v, softmax_scale), None

    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    made = types.ModuleType("flash_attn.cute")
    made.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn.cute", made)
    q, k, v = (torch.randn(1, 8, 2, 16) for _ in range(3))
    got = flash_attention.by_library(q, k, v, 0.5, 4, 1)
    assert torch.equal(got, flash_attention.sdpa_fallback(q, k, v, 0.5)) and given == [(0.5, 1)]


def test_version_4_keeps_its_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads variables of the environment as it is imported. What the user has set stays, and nothing is left."""
    switch, folder = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
    text = f"import os\nread = os.environ.get({switch!r}), os.environ.get({folder!r})\n"

    def read(name: str) -> object:
        (tmp_path / f"{name}.py").write_text(text)
        given = dataclasses.replace(flash_attention.LIBRARIES[4], module=name)
        monkeypatch.setitem(flash_attention.LIBRARIES, 4, given)
        before = dict(os.environ)
        flash_attention.load(4, torch.device("cuda"))
        assert dict(os.environ) == before
        return sys.modules[name].read

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(switch, raising=False)
    monkeypatch.delenv(folder, raising=False)
    kept = tmp_path / "cache" / "districompile" / "flash-attention-4"
    assert read("kept_kernels_1") == ("1", str(kept)) and kept.is_dir()
    monkeypatch.setenv(folder, "elsewhere")
    assert read("kept_kernels_2") == ("1", "elsewhere")
    monkeypatch.setenv(switch, "0")
    assert read("kept_kernels_3") == ("0", "elsewhere")
    monkeypatch.delenv(switch)
    monkeypatch.delenv(folder)
    kept.chmod(0o777)  # others may put code there
    assert read("kept_kernels_4") == (None, None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("start", "splits"), [(0, 1), (0, 2), (3, 1)])
@pytest.mark.parametrize("version", flash_attention.LIBRARIES)
def test_the_library_agrees(dtype: torch.dtype, start: int, version: int, splits: int) -> None:
    """Keys and values of one product, as engines hand them over; those that are not at 16 bytes are copied."""
    reason = flash_attention.unavailable_reason(version, "cuda")
    if reason is not None or splits not in flash_attention.LIBRARIES[version].offered_splits():
        pytest.skip(reason or f"no {splits} parts on this GPU")
    packed = torch.randn(2, 1500, 2 * 5 * 64 + start, device="cuda").to(dtype)[..., start:].view(2, 1500, 2, 5, 64)
    q, k, v = torch.randn(2, 700, 5, 64, device="cuda").to(dtype), packed[:, :, 0], packed[:, :, 1]
    _FLASH(q, k, v, 0.2, version, splits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = _FLASH(q, k, v, 0.2, version, splits)
    graph.replay()
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.2).transpose(1, 2)
    assert got.is_contiguous() and error(got.double(), want) <= 2 * torch.finfo(dtype).eps
