"""Collectives inside engines, over fakes of the library: fences, names, what a build loses, NCCL and communicators."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from districompile.backends.tensorrt import TensorRTBackend, collectives, library
from districompile.backends.tensorrt.builder import BuildOptions, build_engine
from districompile.backends.tensorrt.collectives import add_collectives, check_collectives, layer_name, nccl_missing
from districompile.backends.tensorrt.engine import TensorRTEngine
from districompile.errors import BackendError, LaunchError
from districompile.ir.segment import InnerCollective
from districompile.runtime.experimental import communicator
from tests import helpers_tensorrt as fakes

DTYPES = fakes.members("FLOAT", "HALF", "BF16", "INT64", "INT32", "INT8", "UINT8", "BOOL")
GATHER = InnerCollective("c1.sent", "c1.received", 2)
SWAP = InnerCollective("c11.sent", "c11.received", 2, "all_to_all")


class Node:
    """A layer that notes what is set, and whether its output was asked for too early."""

    def __init__(self, kind: str, source: Any, dtype: Any) -> None:
        self.kind, self.source, self.name = kind, source, kind
        self.num_ranks = 1
        self._dtype = dtype
        self.inputs = [source]
        self.num_inputs = 1

    def get_output(self, i: int) -> Any:
        assert self.kind != "collective" or self.num_ranks > 1, "the shape depends on the number of ranks"
        tensor = fakes.Tensor(f"{self.name}.out", self._dtype)
        tensor.made_by, tensor.is_network_input = self, False  # type: ignore[attr-defined]
        return tensor

    def get_input(self, k: int) -> Any:
        return self.inputs[k]

    def set_input(self, k: int, tensor: Any) -> None:
        self.inputs[k] = tensor


class Network:
    """y = relu(received), with ``sent`` as a further output."""

    def __init__(self, dtype: Any, names: list[InnerCollective]) -> None:
        self.outputs = [fakes.Tensor(c.sent, dtype) for c in names]
        self.inputs = [fakes.Tensor(c.received, dtype) for c in names]
        for tensor in self.inputs:
            tensor.is_network_input = True  # type: ignore[attr-defined]
        self.readers = [Node("relu", tensor, dtype) for tensor in self.inputs]
        self.layers: list[Node] = list(self.readers)
        self.collectives: list[tuple[Any, ...]] = []
        self.accepts = True

    num_outputs = property(lambda self: len(self.outputs))
    num_inputs = property(lambda self: len(self.inputs))
    num_layers = property(lambda self: len(self.layers))

    def get_output(self, i: int) -> Any:
        return self.outputs[i]

    def get_input(self, i: int) -> Any:
        return self.inputs[i]

    def get_layer(self, i: int) -> Node:
        return self.layers[i]

    def add_cast(self, source: Any, dtype: Any) -> Node:
        return Node("cast", source, dtype)

    def add_dist_collective(self, source: Any, operation: Any, reduction: Any, root: int, groups: list[int]) -> Any:
        self.collectives.append((source, operation.name, reduction.name, root, groups))
        return Node("collective", source, source.dtype) if self.accepts else None

    def unmark_output(self, tensor: Any) -> None:
        self.outputs = [t for t in self.outputs if t is not tensor]

    def remove_tensor(self, tensor: Any) -> None:
        self.inputs = [t for t in self.inputs if t is not tensor]


def module(version: str, **parts: Any) -> Any:
    return types.SimpleNamespace(
        __version__=version, DataType=DTYPES, INetworkDefinition=Network,
        CollectiveOperation=fakes.members("ALL_GATHER", "ALL_TO_ALL"), ReduceOperation=fakes.members("NONE"), **parts,
    )  # fmt: skip


@pytest.mark.parametrize("flavour", library.FLAVOURS)
@pytest.mark.parametrize("dtype", [DTYPES.FLOAT, DTYPES.HALF, DTYPES.BF16])
def test_collectives_take_the_place_of_open_ends(flavour: Any, dtype: Any) -> None:
    """Half precision of ``tensorrt`` crosses a fence of real conversions; float32 has none without loss."""
    network: Any = Network(dtype, [GATHER, SWAP])
    add_collectives(fakes.library_of(module("11.2.0"), flavour), network, [GATHER, SWAP])
    assert not network.outputs and not network.inputs
    assert [c[1:] for c in network.collectives] == [("ALL_GATHER", "NONE", -1, []), ("ALL_TO_ALL", "NONE", -1, [])]
    fenced = flavour == "tensorrt" and dtype != DTYPES.FLOAT
    for reader, c, (given, *_) in zip(network.readers, (GATHER, SWAP), network.collectives, strict=True):
        end = reader.inputs[0].made_by
        assert end.kind == ("cast" if fenced else "collective") and reader.inputs[0].dtype == dtype
        collective = end.source.made_by if fenced else end
        assert collective.num_ranks == 2 and collective.name == layer_name(c)
        assert given.dtype == (DTYPES.FLOAT if fenced else dtype)
        assert (given.made_by.source.name if fenced else given.name) == c.sent


def test_a_refused_collective_is_an_error() -> None:
    network: Any = Network(DTYPES.FLOAT, [GATHER])
    network.accepts = False
    with pytest.raises(BackendError, match="tensorrt refuses an all_gather of c1.sent: the reason: leave out"):
        add_collectives(fakes.library_of(module("11.2.0")), network, [GATHER])
    with pytest.raises(BackendError, match="has no collectives inside an engine"):
        add_collectives(fakes.library_of(module("10.9.0")), types.SimpleNamespace(), [GATHER])  # type: ignore[arg-type]


def inspected(text: str | None) -> Any:
    """A library whose engine has layers of these names, or which cannot load what it built."""
    inspector = types.SimpleNamespace(get_engine_information=lambda kind: text)
    engine = None if text is None else types.SimpleNamespace(create_engine_inspector=lambda: inspector)
    runtime = types.SimpleNamespace(deserialize_cuda_engine=lambda plan: engine)
    return module("11.2.0", Runtime=lambda log: runtime, LayerInformationFormat=fakes.members("JSON"))


def test_every_collective_has_to_be_in_the_engine() -> None:
    """Names as the inspector gives them: alone, and within a fused layer."""
    whole = '{"Layers": ["[DIST_COLLECTIVE]-[all_gather(c1.sent)]", {"Name": "{ForeignNode[all_to_all(c11.sent)]}"}]}'
    check_collectives(fakes.library_of(inspected(whole)), b"plan", [GATHER, SWAP], "x.onnx")
    for text in (whole.replace("all_gather(c1.sent)", "kgen"), '{"Layers": ["all_gather(c11.sent)"]}'):
        with pytest.raises(BackendError) as failure:
            check_collectives(fakes.library_of(inspected(text)), b"plan", [GATHER], "x.onnx")
        assert "tensorrt 11.2.0 built an engine of x.onnx without 1 of its 1 collectives" in str(failure.value)
        assert "all_gather(c1.sent)" in str(failure.value) and "leave out --collectives inside" in str(failure.value)
    with pytest.raises(BackendError, match="cannot load what it built of x.onnx.*the reason"):
        check_collectives(fakes.library_of(inspected(None)), b"plan", [GATHER], "x.onnx")


def test_engines_for_other_gpus_are_searched_as_text() -> None:
    capabilities = types.SimpleNamespace(__members__={"SM89": 0})
    rtx = fakes.library_of(module("1.7.1", ComputeCapability=capabilities), "tensorrt_rtx")
    check_collectives(rtx, b'..comm_allgather={ name="all_gather(c1.sent)" ..', [GATHER], "x.onnx")
    for plan in (b'name="all_gather(c1.sent)_output.1"', b"", b'name="all_gather(c11.sent)"'):
        with pytest.raises(BackendError, match="tensorrt_rtx 1.7.1 built an engine of x.onnx without 1 of its 1"):
            check_collectives(rtx, plan, [GATHER], "x.onnx")


def test_the_real_builder_keeps_them_and_a_removed_one_is_found(tmp_path: Path) -> None:
    """An engine of ``tensorrt_rtx`` holds a collective whose result is used, and none whose result is not."""
    trt = pytest.importorskip("tensorrt_rtx")
    rtx = library._load("tensorrt_rtx")
    assert isinstance(rtx, library.Library)
    plans = []
    for used in (True, False):
        builder = trt.Builder(rtx.log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        x = network.add_input("x", trt.DataType.FLOAT, (4,))
        sent = network.add_activation(x, trt.ActivationType.RELU).get_output(0)
        received = network.add_input("c1.received", trt.DataType.FLOAT, (8,))
        reader = network.add_activation(received, trt.ActivationType.RELU).get_output(0)
        sent.name = "c1.sent"
        for tensor in (sent, reader if used else network.add_activation(x, trt.ActivationType.TANH).get_output(0)):
            network.mark_output(tensor)
        add_collectives(rtx, network, [GATHER])
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        plans.append(builder.build_serialized_network(network, config))
    check_collectives(rtx, plans[0], [GATHER], "x.onnx")
    with pytest.raises(BackendError, match="without 1 of its 1 collectives"):
        check_collectives(rtx, plans[1], [GATHER], "x.onnx")


def test_a_build_without_its_collectives_writes_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(DTYPES.FLOAT, [GATHER])
    config = types.SimpleNamespace(clear_flag=lambda flag: None)
    trt = inspected("{}")
    trt.BuilderFlag, trt.PreviewFeature = fakes.members("TF32"), fakes.members("NONE")
    trt.ProfilingVerbosity = fakes.members("LAYER_NAMES_ONLY", "DETAILED")
    trt.NetworkDefinitionCreationFlag = fakes.members("EXPLICIT_BATCH", "STRONGLY_TYPED")
    trt.Builder = lambda log: types.SimpleNamespace(
        create_network=lambda flags: network, create_builder_config=lambda: config,
        build_serialized_network=lambda network, config: b"plan",
    )  # fmt: skip
    trt.OnnxParser = lambda network, log: types.SimpleNamespace(parse_from_file=lambda path: True)
    for name in ("x.onnx", "weights.safetensors"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(BackendError, match="built an engine of x.onnx without 1"):
        build_engine(
            fakes.library_of(trt), tmp_path / "x.onnx", tmp_path / "weights.safetensors", tmp_path / "x.engine",
            BuildOptions(), collectives=[GATHER],
        )  # fmt: skip
    assert not (tmp_path / "x.engine").exists()
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED  # without it, fused layers have no names


def only(*known: str) -> Callable[[str], object]:
    """An opener of libraries that finds those alone."""

    def open_library(name: str) -> object:
        if name not in known:
            raise OSError(f"{name}: cannot open shared object file")
        return object()

    return open_library


@pytest.mark.parametrize(
    "version, found, opened",
    [("10.16.1", "libnccl.so.2", "libnccl.so"), ("11.0.0", "", "libnccl.so.2"), ("10.16.1", "libnccl.so", None),
     ("11.0.0", "libnccl.so.2", None), ("11.0.0", "libnccl.so", None)],
)  # fmt: skip
def test_nccl_is_looked_for_before_the_work(
    version: str, found: str, opened: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives.ctypes, "CDLL", only(found))
    reason = nccl_missing(fakes.library_of(module(version)))
    assert (reason is None) == (opened is None)
    if opened is not None:
        assert f"tensorrt {version} opens {opened} for its collectives" in str(reason)
        assert "ln -s" in str(reason) and f"$D/{opened} && export LD_LIBRARY_PATH" in str(reason)
    monkeypatch.setattr(library, "_load", {"tensorrt": fakes.library_of(module(version))}.__getitem__)
    assert TensorRTBackend(flavour="tensorrt").collectives_inside == reason


@pytest.mark.parametrize(
    "flavour, version, known",
    [("tensorrt", "10.16.1", False), ("tensorrt", "11.0.0", True), ("tensorrt_rtx", "1.7", True)],
)
def test_all_to_all_from_11_on(flavour: Any, version: str, known: bool) -> None:
    assert fakes.library_of(module(version), flavour).has_all_to_all == known
    older = module(version)
    older.CollectiveOperation = fakes.members("ALL_GATHER")
    assert not fakes.library_of(older, flavour).has_all_to_all


def engine_of(version: str, monkeypatch: pytest.MonkeyPatch, **context: Any) -> TensorRTEngine:
    monkeypatch.setattr(collectives.ctypes, "CDLL", only("libnccl.so.2"))
    trt = module(version, ExecutionContextAllocationStrategy=fakes.members("USER_MANAGED"))
    engine: Any = types.SimpleNamespace(
        num_io_tensors=0, device_memory_size_v2=0, create_execution_context=lambda s: types.SimpleNamespace(**context)
    )
    return TensorRTEngine(fakes.library_of(trt), "x.engine", engine, {}, torch.device("cpu"))


def test_a_refused_communicator_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collectives of a context without one do nothing, without an error of their own."""
    given: list[Any] = []
    engine_of("11.2.0", monkeypatch, set_communicator=lambda c: given.append(c) or True).use_communicator(4096)
    assert "ncclComm_t" in repr(given[0])
    with pytest.raises(BackendError, match="tensorrt accepts no communicator for x.engine: the reason"):
        engine_of("11.2.0", monkeypatch, set_communicator=lambda c: False).use_communicator(4096)
    with pytest.raises(BackendError, match="tensorrt 10.16.1 opens libnccl.so for its collectives"):
        engine_of("10.16.1", monkeypatch, set_communicator=lambda c: True).use_communicator(4096)


def test_nccl_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nccl:
        ncclCommInitRank = ncclGetUniqueId = staticmethod(lambda *a: 1)
        ncclGetErrorString = staticmethod(lambda status: b"an error")

        @staticmethod
        def ncclGetVersion(found: Any) -> int:
            found._obj.value = 21805
            return 0

    monkeypatch.setattr(communicator.ctypes, "CDLL", lambda name: Nccl())
    host: Any = types.SimpleNamespace(rank=0, ranks=2)
    with pytest.raises(LaunchError, match="NCCL 2.18.5 is too old for collectives inside engines: install 2.19"):
        communicator.Communicator(host, torch.device("cpu"))
