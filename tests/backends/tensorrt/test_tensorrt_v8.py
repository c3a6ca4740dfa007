"""TensorRT 8.6 without its library: the ONNX files that it would get, and what is asked of its interface."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx

import districompile as dc
from districompile.backends.onnxruntime import OnnxRuntimeBackend
from districompile.backends.tensorrt import TensorRTBackend, builder, library, v8
from districompile.backends.tensorrt.builder import BuildOptions, build_engine
from districompile.backends.tensorrt.engine import TensorRTEngine
from districompile.bundle.bundle import Bundle
from districompile.errors import BackendError, EngineWarning, InputError
from districompile.models.sources import DEMO
from districompile.testing import make_segment, write_weights
from tests import helpers_tensorrt as fakes
from tests.small_models import MODELS, first, relative_error

V8 = fakes.V8
PARTS = "districompile.backends.tensorrt.backend"


def write_nothing(lib: Any, onnx: Path, weights: Path, path: Path, *args: Any, **options: Any) -> None:
    """Build an engine without content."""
    path.write_bytes(b"engine")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """TensorRT 8.6 and a Hopper GPU seem to be here. Engines are files without content."""
    found = {"tensorrt": fakes.library_of(V8()), "tensorrt_rtx": "not installed"}
    monkeypatch.setattr(library, "_load", found.__getitem__)
    monkeypatch.setattr(f"{PARTS}.present_gpu", lambda device=None: "sm90")
    monkeypatch.setattr(f"{PARTS}.build_engine", write_nothing)
    yield


def check_files(path: Path) -> int:
    """Every ONNX file of a bundle is valid in opset 17. Return how many there are."""
    files = sorted((path / "engines").glob("*.onnx"))
    for file in files:
        model = onnx.load(file, load_external_data=False)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
        outside = [t for t in model.graph.initializer if t.external_data]
        for tensor in outside:  # as inputs, since the checker would look for their file beside this one
            model.graph.initializer.remove(tensor)
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        onnx.checker.check_model(model, full_check=True)
    return len(files)


def demo() -> tuple[torch.nn.Module, dict[str, Any]]:
    """The demo's UNet, with the integer timestep of a sampler."""
    from diffusers import UNet2DConditionModel

    module = UNet2DConditionModel.from_pretrained(DEMO / "unet").eval()
    generator = torch.Generator().manual_seed(0)
    sample, states = (torch.randn(*shape, generator=generator) for shape in ((1, 4, 16, 16), (1, 7, 128)))
    return module, {"sample": sample, "timestep": torch.tensor(501), "encoder_hidden_states": states}


def converted(name: str, dtype: torch.dtype) -> tuple[dc.Program, dict[str, Any], Tensor]:
    module, kwargs = demo() if name == "demo" else MODELS[name](1, 4 if name == "vae_decoder" else 12, 8)

    def cast(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: cast(v) for k, v in value.items()}
        return value.to(dtype) if value.is_floating_point() and value.ndim else value

    kwargs = {k: cast(v) for k, v in kwargs.items()}
    with torch.no_grad():
        want = first(module.to(dtype)(**kwargs))
    return dc.convert(module, kwargs=kwargs, ranks=2), kwargs, want


@pytest.mark.parametrize(
    "name, dtype",
    [
        pytest.param("vae_decoder", torch.float32, marks=pytest.mark.slow),
        ("vae_decoder", torch.float16),
        pytest.param("sd15", torch.float32, marks=pytest.mark.slow),
        pytest.param("sdxl", torch.float32, marks=pytest.mark.slow),
        pytest.param("demo", torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_files_of_a_network(name: str, dtype: torch.dtype, installed: None, tmp_path: Path) -> None:
    """The files that TensorRT 8.6 would read are valid, and ONNX Runtime computes with them what eager does."""
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    program, kwargs, want = converted(name, dtype)
    path = tmp_path / "b"
    program.save(path, backend="tensorrt")
    assert check_files(path) == len(list((path / "engines").glob("*.engine"))) > 0
    described = Bundle.open(path).manifest["engines"]
    assert described == {"flavour": "tensorrt", "version": "8.6.0", "targets": ["sm90"], "weights": "inside"}
    unet = dc.load(path, lockstep=True, device="cpu", backend=OnnxRuntimeBackend())
    with unet.exact():
        assert relative_error(first(unet(**kwargs)), want) <= tolerance
    if "timestep" not in kwargs:
        return
    program.reset()
    program.simulate(**kwargs)
    moved = {**kwargs, "sample": kwargs["sample"] * 1.1, "timestep": kwargs["timestep"] - 1}
    unet.phase = "displaced"
    assert relative_error(first(unet(**moved)), first(program.simulate(phase="displaced", **moved))) <= tolerance


def test_what_cannot_be_built_is_named_before_the_build(installed: None) -> None:
    backend = TensorRTBackend()

    def ids(x: Tensor, i: Tensor) -> Tensor:
        return x.index_add(0, i, x)

    def narrow(x: Tensor) -> Tensor:
        return x.relu()

    (reason,) = backend.unsupported_ops(make_segment(ids, {"x": torch.ones(3, 2), "i": torch.tensor([0, 2, 1])}))
    assert "ScatterElements that combines values" in reason or "ScatterND that combines values" in reason
    assert "aten.index_add.default (index_add at " in reason
    (reason, *_) = backend.unsupported_ops(make_segment(narrow, {"x": torch.ones(3, dtype=torch.bfloat16)}))
    assert reason == "the input x is torch.bfloat16, which TensorRT 8.6 does not have"
    with pytest.raises(BackendError, match="weights=bound: the parser of tensorrt 8.6.0 .*give weights=inside"):
        _ = TensorRTBackend(weights="bound").options
    assert "opset 17" in backend.version and backend.collectives_inside is not None


def test_another_version_is_another_engine(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    old = TensorRTBackend().version
    modern = types.SimpleNamespace(__version__="10.9.0", INetworkDefinition=object)
    monkeypatch.setattr(library, "_load", {"tensorrt": fakes.library_of(modern)}.__getitem__)
    assert "opset 20" in TensorRTBackend(flavour="tensorrt").version != old


@pytest.mark.parametrize(
    "version, usable",
    [("8.4.3", False), ("8.5.0", False), ("8.6.0", True), ("8.6.1.post1", True), ("9.2.0", False), ("10.0.1", False),
     ("10.1.0", True), ("10.16.1.11", True), ("11.4.0", True)],
)  # fmt: skip
def test_versions(version: str, usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(__version__=version, Builder=object)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("importlib.import_module", lambda name: module)
    library._load.cache_clear()
    try:
        found = library._load("tensorrt")
    finally:
        library._load.cache_clear()
    if usable:
        assert isinstance(found, library.Library) and found.is_v8 == version.startswith("8.6")
    else:
        assert found == (
            f"tensorrt {version} is not supported: install version 8.6, or 10.1 or later "
            '(pip install "districompile[tensorrt]")'
        )


def test_missing_libraries_have_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError("libcudnn.so.8: cannot open shared object file: No such file or directory")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("importlib.import_module", fail)
    library._load.cache_clear()
    try:
        found = library._load("tensorrt")
    finally:
        library._load.cache_clear()
    assert isinstance(found, str) and "libcudnn.so.8" in found and "'nvidia-cudnn-cu12<9'" in found


def test_gpus_it_does_not_know() -> None:
    old = fakes.library_of(V8())
    assert old.runs_on("sm90") is None and old.runs_on("sm80") is None
    assert "tensorrt 8.6.0 does not run on this GPU (sm100; it knows none beyond sm90)" in str(old.runs_on("sm100"))


def test_statistics_beyond_float16_are_kept(installed: None, tmp_path: Path) -> None:
    """What is built of a network in float16 has no float16 value, and float16 inputs and outputs."""
    import onnxruntime

    program, *_ = converted("vae_decoder", torch.float16)
    with pytest.warns(EngineWarning, match="TensorRT 8.6 computes models in float16 in float32"):
        program.save(tmp_path / "b", backend=TensorRTBackend())
    weights = Bundle.open(tmp_path / "b").path / "weights.safetensors"
    files = sorted((tmp_path / "b" / "engines").glob("*.onnx"))
    found = 0
    for i, file in enumerate(files):
        if not v8.has_half(file):
            continue
        found += 1
        target = tmp_path / f"{i}" / file.name
        target.parent.mkdir()
        narrow = v8.write_widened(file, weights, target)
        assert narrow and not v8.has_half(target)
        if found == 1:
            onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    assert found > 10


def test_parser_errors_name_the_node(installed: None, tmp_path: Path) -> None:
    def net(x: Tensor) -> Tensor:
        return torch.relu(x)

    segment = make_segment(net, {"x": torch.randn(4)})
    model = TensorRTBackend().model(segment, write_weights(tmp_path / "weights.safetensors", {}))
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    error = types.SimpleNamespace(node=lambda: 0, desc=lambda: "no such thing")
    trt = V8(fakes.Network([]), [error])
    with pytest.raises(BackendError) as failure:
        build_engine(fakes.library_of(trt), tmp_path / "x.onnx", tmp_path / "weights.safetensors",
                     tmp_path / "x.engine", BuildOptions(), sources={"relu": " at net.py:3"})  # fmt: skip
    text = str(failure.value)
    assert "tensorrt cannot read x.onnx: relu/Relu_0: no such thing (Relu) (operator relu at net.py:3)" in text
    assert builder.v8 is v8 and not (tmp_path / "x.engine").exists()


class Context:
    """Computes y = i + 1 in int32, as an engine does whose model has int64."""

    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}
        self.device_memory: int | None = None

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        import ctypes

        x, y = ((ctypes.c_int32 * 3).from_address(self.addresses[n]) for n in ("i", "y"))
        for k in range(3):
            y[k] = x[k] + 1
        return True


class Engine:
    device_memory_size, refittable, num_io_tensors = 500, False, 2

    def __init__(self) -> None:
        self.context = Context()

    def create_execution_context_without_device_memory(self) -> Context:
        return self.context

    def get_tensor_name(self, i: int) -> str:
        return ("i", "y")[i]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (3,)

    def get_tensor_dtype(self, name: str) -> Any:
        return V8.DataType.INT32

    def get_tensor_mode(self, name: str) -> Any:
        return V8.TensorIOMode.OUTPUT if name == "y" else V8.TensorIOMode.INPUT


def test_int64_is_copied_to_what_the_engine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: types.SimpleNamespace(cuda_stream=7))
    fake: Any = Engine()
    engine = TensorRTEngine(fakes.library_of(V8()), "x", fake, {}, torch.device("cpu"), None, {"i", "y"})
    assert {str(s.dtype) for s in (*engine._inputs.values(), *engine._outputs.values())} == {"torch.int64"}
    scratch = torch.empty(engine.scratch_bytes, dtype=torch.uint8)
    assert engine.scratch_bytes == 512
    engine.use_scratch(scratch)
    assert fake.context.device_memory == scratch.data_ptr()
    given, result = torch.tensor([1, -2, 40]), torch.empty(3, dtype=torch.int64)
    for _ in range(2):
        engine.bind("i", given)
        engine.bind("y", result)
        engine.enqueue()
        assert engine.output("y") is result and result.tolist() == [2, -1, 41]
        given += 0
    assert len(set(fake.context.addresses.values()) | {given.data_ptr(), result.data_ptr()}) == 4
    assert engine.run({"i": given}, ("y",))["y"].tolist() == [2, -1, 41]
    with pytest.raises(InputError):
        engine.bind("i", given.int())


def test_integers_that_are_wide_in_the_file(tmp_path: Path) -> None:
    types_ = onnx.TensorProto
    values = {"i": types_.INT64, "x": types_.FLOAT, "k": types_.INT32}
    infos = [onnx.helper.make_tensor_value_info(n, t, [2]) for n, t in values.items()]
    node = onnx.helper.make_node("Identity", ["i"], ["y"])
    graph = onnx.helper.make_graph([node], "g", infos, [onnx.helper.make_tensor_value_info("y", types_.INT64, [2])])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "x.onnx")
    assert v8.wide_integers(tmp_path / "x.onnx") == {"i", "y"}
