"""What is handed to the CUDA driver, as far as it can be looked at without one."""

from __future__ import annotations

import ctypes
import hashlib
import re
from pathlib import Path

import pytest
import torch

from districompile.cuda import exchange as module
from districompile.cuda.driver import DriverError, KernelNode, MemoryOperation, MemsetNode, call, function
from districompile.cuda.exchange import COPIES, SIGNALS, Exchange, kernels
from districompile.cuda.graph_edit import replace_memsets, words_of

HERE = Path(module.__file__).parent


def test_structures_have_the_sizes_of_cuda_h() -> None:
    assert [ctypes.sizeof(s) for s in (MemoryOperation, KernelNode, MemsetNode)] == [48, 72, 40]
    offsets = [getattr(MemoryOperation, f).offset for f in ("operation", "address", "value", "flags", "alias")]
    assert offsets == [0, 8, 16, 24, 32]
    assert [getattr(KernelNode, f).offset for f in ("function", "grid", "block", "shared_bytes", "params")] == [
        0, 8, 20, 32, 40,
    ]  # fmt: skip
    assert [getattr(MemsetNode, f).offset for f in ("target", "pitch", "value", "element_bytes", "width")] == [
        0, 8, 16, 20, 24,
    ]  # fmt: skip


def test_the_kernels_are_compiled_from_their_source() -> None:
    source, compiled = (HERE / name for name in ("exchange.cu", "exchange.ptx"))
    text = compiled.read_text()
    assert hashlib.sha256(source.read_bytes()).hexdigest() in text, "compile exchange.cu again: see its first lines"
    assert f"exchange_param_0[{ctypes.sizeof(Exchange)}]" in text  # the argument that is passed by value
    assert re.findall(r"copies\[(\d+)\]|signals\[(\d+)\]", source.read_text())[:2] == [
        (str(COPIES), ""), ("", str(SIGNALS)),
    ]  # fmt: skip
    assert ".target sm_70" in text and ".version 7.0" in text


@pytest.mark.parametrize(
    "target, value, element, width, height, want",
    [
        (64, 0, 1, 4, 1, (0, 1)),
        (64, 0xAB, 1, 8, 1, (0xABABABAB, 2)),
        (64, 0x1234, 2, 4, 1, (0x12341234, 2)),
        (64, 0xFFFFFFFF, 4, 3, 1, (0xFFFFFFFF, 3)),
        (64, 0, 1, 3, 1, None),  # no whole words
        (65, 0, 1, 4, 1, None),
        (64, 0, 1, 4, 2, None),  # rows with gaps
        (64, 0, 4, 1025, 1, None),  # large
        (64, 0, 4, 0, 1, None),
    ],
)
def test_memsets_that_a_kernel_does(
    target: int, value: int, element: int, width: int, height: int, want: tuple[int, int] | None
) -> None:
    assert words_of(MemsetNode(target, 0, value, element, width, height)) == want


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    function.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(DriverError, match="has no cuInit"):
        call("cuInit", 0)
    assert replace_memsets(0, ctypes.c_void_p()) == 0


def test_kernels_are_given_up_where_the_driver_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> None:
        raise DriverError("cuModuleLoadData failed with CUDA error 222")

    monkeypatch.setattr(module, "Kernels", refuse)
    kernels.cache_clear()
    assert kernels(torch.device("cuda", 0)) is None
    kernels.cache_clear()
