"""TensorRT without a GPU: which flavour, which targets, what its errors tell; and the API that is used, in both
flavours' bindings."""

from __future__ import annotations

import ast
import ctypes
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from districompile.backends.base import get_backend
from districompile.backends.tensorrt import TensorRTBackend, library
from districompile.backends.tensorrt.engine import RuntimeCache, TensorRTEngine
from districompile.backends.tensorrt.library import OPTIONAL, Library, find_library, parse_targets, told
from districompile.cli import main
from districompile.errors import BackendError, InputError

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "districompile/backends/tensorrt").glob("*.py"))


class _Capabilities:
    __members__ = dict.fromkeys(["NONE", "CURRENT", "SM75", "SM80", "SM89", "SM120"])


def fake(flavour: str, **parts: Any) -> Library:
    module = types.SimpleNamespace(__version__="1.0", INetworkDefinition=object(), **parts)
    return Library(flavour, module)  # type: ignore[arg-type]


RTX = fake("tensorrt_rtx", ComputeCapability=_Capabilities)
DATACENTRE = fake("tensorrt")


def test_targets_ahead_of_time() -> None:
    assert RTX.ahead_of_time == ("sm75", "sm80", "sm89", "sm120")
    assert parse_targets("sm89", RTX, None) == ("sm89",)
    assert parse_targets(" SM80, sm120,sm80", RTX, None) == ("sm80", "sm120")
    assert parse_targets(None, RTX, None) == ("sm80", "sm89", "sm120")  # not Turing
    assert parse_targets(None, RTX, "sm89") == ("sm89",)
    assert parse_targets(None, RTX, "sm90") == ("sm80", "sm89", "sm120")
    assert parse_targets("current", RTX, "sm120") == ("sm120",)
    assert parse_targets(None, DATACENTRE, "sm90") == ("sm90",)
    assert parse_targets("sm90", DATACENTRE, "sm90") == ("sm90",)


@pytest.mark.parametrize(
    "text, flavour, gpu, message",
    [
        ("current", RTX, None, "there is no GPU here: give --target sm75"),
        (
            "current",
            RTX,
            "sm90",
            "does not run on this GPU .sm90.*--backend inductor, or install the package `tensorrt`",
        ),
        (
            "sm90",
            RTX,
            None,
            "cannot build for it .*it builds for sm75, sm80, sm89, sm120 without a GPU.*flavour tensorrt",
        ),
        ("sm100", RTX, "sm89", "the GPU here is sm89"),
        ("ampere", RTX, None, "a target is `current` or a kind of GPU"),
        (",", RTX, None, "--target is empty"),
        (None, DATACENTRE, None, "no GPU here: convert on a machine with the GPU, or install tensorrt_rtx"),
        ("sm120", DATACENTRE, "sm90", "builds for the GPU of this machine.*--tensorrt-flavour tensorrt_rtx"),
    ],
)
def test_targets_that_cannot_be_had(text: str | None, flavour: Library, gpu: str | None, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        parse_targets(text, flavour, gpu)


def test_hopper_is_told_what_to_use_instead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """tensorrt_rtx has no SM90: one line, naming both ways out."""
    monkeypatch.setattr(library, "_load", {"tensorrt": "not installed", "tensorrt_rtx": RTX}.__getitem__)
    monkeypatch.setattr("districompile.backends.tensorrt.backend.present_gpu", lambda device=None: "sm90")
    backend = TensorRTBackend()
    with pytest.raises(BackendError) as failure:
        backend.load(tmp_path / "x.engine", (), None, torch.device("cuda", 0))  # type: ignore[arg-type]
    assert str(failure.value).count("\n") == 0
    for part in ("tensorrt_rtx 1.0 does not run on this GPU (sm90", "--backend inductor", "`tensorrt`"):
        assert part in str(failure.value)
    monkeypatch.setattr("districompile.commands.doctor.present_gpu", lambda: "sm90")
    monkeypatch.setattr("districompile.commands.doctor.installed", lambda: {"tensorrt_rtx": RTX})
    from districompile.commands.doctor import gather

    (line,) = gather()["tensorrt"]
    assert "builds for sm75, sm80, sm89, sm120 without a GPU" in line and "--backend inductor" in line


def test_which_flavour_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_load", {"tensorrt": DATACENTRE, "tensorrt_rtx": RTX}.__getitem__)
    assert find_library(None, None) is RTX  # it alone builds without a GPU
    assert find_library(None, "sm89") is DATACENTRE
    assert find_library(None, "sm90") is DATACENTRE
    assert find_library("tensorrt_rtx", "sm90") is RTX
    monkeypatch.setattr(library, "_load", {"tensorrt": "no libraries", "tensorrt_rtx": RTX}.__getitem__)
    assert find_library(None, "sm89") is RTX
    with pytest.raises(BackendError, match="no libraries"):
        find_library("tensorrt", None)
    with pytest.raises(BackendError, match="no TensorRT flavour 'trt'"):
        find_library("trt", None)


def test_a_package_without_its_libraries_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Type stubs alone make an importable, empty package of that name."""
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.pyi").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    library._load.cache_clear()
    try:
        found = library._load("tensorrt")
        assert isinstance(found, str) and "its libraries are missing" in found
    finally:
        library._load.cache_clear()
        sys.modules.pop("tensorrt", None)


def test_errors_name_the_operator_and_its_line() -> None:
    sources = {"conv2d_3": " at net.py:12"}
    text = told(["In node 4 with name: conv2d_3/Conv_17 and operator: Conv\n (importConv): bad"], sources)
    assert (
        text
        == "In node 4 with name: conv2d_3/Conv_17 and operator: Conv (importConv): bad (operator conv2d_3 at net.py:12)"
    )
    assert told([]) == "it gave no reason"
    assert told(["x" * 1000]).endswith("...")


def test_options_of_tensorrt_go_with_tensorrt(capsys: Any, tmp_path: Path) -> None:
    assert main(["convert", "demo", "--target", "sm89", "--out", str(tmp_path / "b")]) == 2
    assert "--target: only with --backend tensorrt, not with onnxruntime" in capsys.readouterr().err


def test_no_engine_runs_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="runs on an NVIDIA GPU, not on cpu.*verify BUNDLE --backend onnxruntime"):
        TensorRTBackend().load(tmp_path / "x.engine", (), None, torch.device("cpu"))  # type: ignore[arg-type]


# The API

ROOTS = {  # a name in the sources -> the class of what it holds
    "trt": None, "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser",
    "config": "IBuilderConfig", "engine": "ICudaEngine", "context": "IExecutionContext", "runtime": "Runtime",
    "refitter": "Refitter", "layer": "ILayer", "tensor": "ITensor", "error": "ParserError",
}  # fmt: skip
OURS = {("engine", "use_scratch"), ("engine", "capturable"), ("engine", "binds_outputs")}


def used() -> Iterator[tuple[str, str]]:
    """(root, attribute) of everything that is asked of TensorRT's objects, and the members of its enumerations."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            holder = node.value
            if isinstance(holder, ast.Attribute) and holder.attr == "context":
                yield "context", node.attr
            elif isinstance(holder, ast.Name) and holder.id in ROOTS and (holder.id, node.attr) not in OURS:
                if holder.id != "tensor" or path.name == "inside.py":  # elsewhere a tensor is torch's, or a name
                    yield holder.id, node.attr
            elif isinstance(holder, ast.Attribute) and isinstance(holder.value, ast.Name) and holder.value.id == "trt":
                yield f"trt.{holder.attr}", node.attr


def test_the_sources_are_looked_through() -> None:
    found = set(used())
    for pair in (
        ("network", "unmark_output"), ("parser", "parse_from_file"), ("context", "execute_async_v3"),
        ("context", "set_tensor_address"), ("trt", "OnnxParserRefitter"), ("trt.BuilderFlag", "STRIP_PLAN"),
    ):  # fmt: skip
        assert pair in found


def test_every_attribute_exists_in_tensorrt_rtx() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    others = {"parser": ("OnnxParserRefitter",), "layer": ("IDistCollectiveLayer",)}
    for root, name in sorted(set(used())):
        if root.startswith("trt."):
            assert hasattr(getattr(trt, root.removeprefix("trt.")), name), f"{root}.{name}"
        elif root == "trt":
            assert hasattr(trt, name), name
        else:
            classes = [str(ROOTS[root]), *others.get(root, ())]
            assert any(hasattr(getattr(trt, c), name) for c in classes), f"{root}.{name}"


@pytest.mark.parametrize("folder", ["bindings-10", "bindings-11"])
def test_every_attribute_exists_in_tensorrt(folder: str) -> None:
    """Its bindings cannot be imported without its libraries; the names they define are in the file."""
    files = list((ROOT / "build" / folder).rglob("tensorrt.so"))
    if not files:
        pytest.skip(f"build/{folder} is not there: `python tools/check.py types` brings the bindings")
    data = files[0].read_bytes()
    assert b"no_such_attribute\0" not in data
    names = {name for _, name in used()} - set(OPTIONAL) - {"__version__"}
    assert len(names) > 40
    missing = [n for n in sorted(names) if f"{n}\0".encode() not in data]
    assert not missing, missing
    if folder == "bindings-11":
        assert b"add_dist_collective\0" in data and b"set_communicator\0" in data


def test_optional_attributes_are_asked_for_by_name() -> None:
    with pytest.raises(KeyError):
        library.optional(object(), "execute_async_v3")
    direct = {name for root, name in used() if root != "trt"} & set(OPTIONAL)
    assert not direct, f"not every flavour has {direct}"


# The engine, over a context that computes y = x + w in the memory whose addresses it is given


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
    fake_library = fake(
        "tensorrt",
        DataType=types.SimpleNamespace(**{n: n for n in names}),
        TensorIOMode=types.SimpleNamespace(OUTPUT="out"),
        ExecutionContextAllocationStrategy=types.SimpleNamespace(USER_MANAGED="user"),
    )
    fake_library.__dict__["log"] = FakeLog()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: types.SimpleNamespace(cuda_stream=77))
    weights = {"weight:layer.w": torch.tensor([10.0, 20.0, 30.0, 40.0])}
    return TensorRTEngine(fake_library, "x.engine", FakeEngine(), weights, torch.device("cpu"))  # type: ignore[arg-type]


def test_an_engine_reads_and_writes_where_it_is_told(engine: TensorRTEngine) -> None:
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
    with pytest.raises(BackendError, match="takes no communicator"):
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
