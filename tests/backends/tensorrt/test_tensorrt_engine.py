# SPDX-License-Identifier: Apache-2.0
"""The engine of TensorRT, over a context that computes y = x + w in the memory whose addresses it is given."""

from __future__ import annotations

import ctypes
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from districompile.backends.registry import get_backend
from districompile.backends.tensorrt.engine import RuntimeCache, TensorRTEngine
from districompile.backends.tensorrt.library import Library
from districompile.errors import BackendError, InputError


class FakeContext:
    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}
        self.scratch: tuple[int, int] | None = None
        self.streams: list[int] = []
        self.fails = False

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        self.scratch = (address, size)

    def execute_async_v3(self, stream: int) -> bool:
        assert self.scratch is not None
        self.streams.append(stream)
        x, w, y = ((ctypes.c_float * 4).from_address(self.addresses[n]) for n in ("x", "weight:layer.w", "y"))
        for i in range(4):
            y[i] = x[i] + w[i]
        return not self.fails


class FakeEngine:
    device_memory_size_v2 = 1000
    refittable = False
    num_io_tensors = 3

    def __init__(self) -> None:
        self.context = FakeContext()

    def create_execution_context(self, strategy: Any) -> FakeContext:
        assert strategy == "user"
        return self.context

    def get_tensor_name(self, i: int) -> str:
        return ("x", "weight:layer.w", "y")[i]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (4,)

    def get_tensor_dtype(self, name: str) -> str:
        return "FLOAT"

    def get_tensor_mode(self, name: str) -> str:
        return "out" if name == "y" else "in"


class FakeLog:
    def take(self) -> list[str]:
        return ["the reason"]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> TensorRTEngine:
    names = ("FLOAT", "HALF", "BF16", "INT64", "INT32", "INT8", "UINT8", "BOOL")
    module = types.SimpleNamespace(
        __version__="1.0",
        INetworkDefinition=object(),
        DataType=types.SimpleNamespace(**{n: n for n in names}),
        TensorIOMode=types.SimpleNamespace(OUTPUT="out"),
        ExecutionContextAllocationStrategy=types.SimpleNamespace(USER_MANAGED="user"),
    )
    fake_library = Library("tensorrt", module)  # type: ignore[arg-type]
    fake_library.__dict__["log"] = FakeLog()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: types.SimpleNamespace(cuda_stream=77))
    weights = {"weight:layer.w": torch.tensor([10.0, 20.0, 30.0, 40.0])}
    return TensorRTEngine(fake_library, "x.engine", FakeEngine(), weights, torch.device("cpu"))  # type: ignore[arg-type]


def test_an_engine_reads_and_writes_bound_memory(engine: TensorRTEngine) -> None:
    x, y = torch.arange(4.0), torch.empty(4)
    assert engine.binds_outputs and engine.scratch_bytes == 1024
    scratch = torch.empty(2048, dtype=torch.uint8)
    engine.use_scratch(scratch)
    for _ in range(2):
        engine.bind("x", x)
        engine.bind("y", y)
        engine.enqueue()
        assert engine.output("y") is y
        assert y.tolist() == [10.0, 21.0, 32.0, 43.0]
        engine.release()
        x += 0
    context: Any = engine.context
    assert context.scratch == (scratch.data_ptr(), 2048) and context.streams == [77, 77]
    assert context.addresses["x"] == x.data_ptr() and context.addresses["y"] == y.data_ptr()


def test_an_engine_without_bound_outputs_makes_its_own(engine: TensorRTEngine) -> None:
    found = engine.run({"x": torch.ones(4)}, ("y",))
    assert found["y"].tolist() == [11.0, 21.0, 31.0, 41.0]


def test_an_engine_refuses_what_does_not_fit(engine: TensorRTEngine) -> None:
    with pytest.raises(InputError, match="x was converted as float32"):
        engine.bind("x", torch.ones(5))
    with pytest.raises(InputError, match="no input named 'z'"):
        engine.bind("z", torch.ones(4))
    engine.context.fails = True  # type: ignore[attr-defined]
    engine.bind("x", torch.ones(4))
    with pytest.raises(BackendError, match="tensorrt failed to run x.engine: the reason"):
        engine.enqueue()
    with pytest.raises(BackendError, match="accepts no communicator"):
        engine.use_communicator(1)


def test_the_runtime_cache_survives_and_is_never_needed(tmp_path: Path) -> None:
    class Cache:
        data = b""

        def deserialize(self, data: bytes) -> bool:
            Cache.data = data
            return data == b"good"

        def serialize(self) -> bytes:
            return b"good"

    class Config:
        def create_runtime_cache(self) -> Cache:
            return Cache()

        def set_runtime_cache(self, cache: Cache) -> None:
            self.cache = cache

    cache, config = RuntimeCache(tmp_path / "cache" / "gpu.cache"), Config()
    cache.attach(config)
    assert isinstance(config.cache, Cache)
    cache.save()
    assert (tmp_path / "cache" / "gpu.cache").read_bytes() == b"good"
    again = RuntimeCache(tmp_path / "cache" / "gpu.cache")
    again.attach(Config())
    assert Cache.data == b"good"
    (tmp_path / "file").write_text("")
    unwritable = RuntimeCache(tmp_path / "file" / "gpu.cache")
    unwritable.attach(Config())
    unwritable.save()  # a bundle that cannot be written loses nothing but time
    RuntimeCache(tmp_path / "x").attach(object())  # a flavour without


def test_backends_are_made_with_options() -> None:
    pytest.importorskip("tensorrt_rtx")
    backend = get_backend("tensorrt", flavour="tensorrt_rtx", target="sm89")
    assert backend.describe()["targets"] == ["sm89"]  # type: ignore[attr-defined]
    other = get_backend("tensorrt", flavour="tensorrt_rtx", target="sm120")
    assert backend.version != other.version  # another file
    if not torch.cuda.is_available():
        assert backend.describe()["weights"] == "bound"  # type: ignore[attr-defined]
        with pytest.raises(BackendError, match="needs a GPU to build engines without weights"):
            _ = get_backend("tensorrt", flavour="tensorrt_rtx", target="sm89", weights="refit").options  # type: ignore[attr-defined]
