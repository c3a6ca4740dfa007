# SPDX-License-Identifier: Apache-2.0
"""Builds by TensorRT 8.6 without its library: what is asked of its interface, and what is built of float16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import numpy as np
import onnx

from districompile.backends.tensorrt import v8
from districompile.backends.tensorrt.builder import BuildOptions, build_engine
from districompile.errors import BackendError
from tests import helpers_tensorrt as fakes

V8 = fakes.V8


@pytest.mark.parametrize("half", [False, True])
def test_a_build_sets_what_the_older_interface_needs(half: bool, tmp_path: Path) -> None:
    """Explicit batch, and no tactics of other libraries. Models in float16 get TF32 and never the flag FP16."""
    d = V8.DataType
    x, i = fakes.Tensor("x", d.FLOAT), fakes.Tensor("i", d.INT32)
    trt = V8(fakes.Network([x, i]))
    if half:
        onnx.save_model(half_model(), str(tmp_path / "x.onnx"), save_as_external_data=True,
                        location="weights.safetensors", size_threshold=0)  # fmt: skip
    else:
        for name in ("x.onnx", "weights.safetensors"):
            (tmp_path / name).write_bytes(b"")
    options = BuildOptions(("sm90",), "inside", tmp_path / "timing.cache")
    for _ in range(2):
        build_engine(
            fakes.library_of(trt), tmp_path / "x.onnx", tmp_path / "weights.safetensors", tmp_path / "x.engine", options
        )
    assert (tmp_path / "x.engine").read_bytes() == b"a plan"
    assert trt.network_flags == 1 << V8.NetworkDefinitionCreationFlag.EXPLICIT_BATCH
    assert trt.config.flags == ({"TF32"} if half else set())
    assert trt.config.sources == 0b11000
    # weights of half_model are smaller than what is stored beside a widened model
    assert trt.parsed == (["x.onnx"] if half else ["weights.safetensors", "x.onnx"])
    assert (tmp_path / "timing.cache").read_bytes() == b"++"
    assert x.dtype == (d.HALF if half else d.FLOAT) and i.dtype == d.INT32


def half_model() -> onnx.ModelProto:
    """Return y = float16(float32(x) * w) + w, of float16 x and w."""
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.array([0.5, 2.0, -3.0], np.float16), "w")
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["w"], ["factor"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["wide", "factor"], ["product"]),
        helper.make_node("Cast", ["product"], ["narrow"], to=TensorProto.FLOAT16),
        helper.make_node("Add", ["narrow", "w"], ["y"]),
        helper.make_node("Identity", ["i"], ["j"]),
    ]
    ends = [[helper.make_tensor_value_info(n, kind, [3]) for n, kind in group]
            for group in ([("x", TensorProto.FLOAT16), ("i", TensorProto.INT32)],
                          [("y", TensorProto.FLOAT16), ("j", TensorProto.INT32)])]  # fmt: skip
    graph = helper.make_graph(nodes, "g", *ends, [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_widened_model_computes_in_float32(tmp_path: Path) -> None:
    """Also with a weight in a file of its own. Its results are those of float16, but for rounding."""
    import onnxruntime

    model = half_model()
    onnx.save_model(model, str(tmp_path / "x.onnx"), save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "new").mkdir()
    narrow = v8.write_widened(tmp_path / "x.onnx", tmp_path / "w.bin", tmp_path / "new" / "x.onnx")
    assert narrow == {"x", "y"}
    made = onnx.load(str(tmp_path / "new" / "x.onnx"))
    onnx.checker.check_model(made)
    inferred = onnx.shape_inference.infer_shapes(made, strict_mode=True).graph
    kinds = {v.type.tensor_type.elem_type for v in (*inferred.input, *inferred.value_info, *inferred.output)}
    assert kinds == {onnx.TensorProto.FLOAT, onnx.TensorProto.INT32}
    session = onnxruntime.InferenceSession(str(tmp_path / "new" / "x.onnx"), providers=["CPUExecutionProvider"])
    x, i = np.array([1.0, 70000.0, -0.25], np.float32), np.array([1, 2, 3], np.int32)
    y, j = session.run(None, {"x": x, "i": i})
    assert np.array_equal(y, x * np.float32([0.5, 2.0, -3.0]) + np.float32([0.5, 2.0, -3.0]))
    assert np.array_equal(j, i)


def test_float16_is_found_wherever_it_is(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper

    half, single = np.ones(3, np.float16), np.ones(3, np.float32)

    def has(nodes: list[Any], kind: int = TensorProto.FLOAT, constant: Any = single) -> bool:
        ends = [[helper.make_tensor_value_info(name, kind, [3])] for name in "xy"]
        graph = helper.make_graph(nodes, "g", *ends, [numpy_helper.from_array(constant, "w")])
        onnx.save(helper.make_model(graph), tmp_path / "x.onnx")
        return v8.has_half(tmp_path / "x.onnx")

    plain = [helper.make_node("Mul", ["x", "w"], ["y"])]
    assert not has(plain) and not has([])
    assert has(plain, TensorProto.FLOAT16, half) and has(plain, constant=half)
    assert has([helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT16)])
    assert not has([helper.make_node("Cast", ["x"], ["y"], to=TensorProto.INT32)])
    assert has([helper.make_node("Constant", [], ["y"], value=numpy_helper.from_array(half))])


@pytest.mark.parametrize("failures", [1, 2])
def test_a_build_that_fails_is_tried_without_the_cache(failures: int, tmp_path: Path) -> None:
    trt = V8(fakes.Network([fakes.Tensor("x", V8.DataType.FLOAT)]))
    caches: list[Any] = []

    def build(builder: Any, network: Any, config: Any) -> bytes | None:
        caches.append(config.cache)
        config.cache = None  # of the next configuration, which is the same object
        return None if len(caches) <= failures else b"a plan"

    trt.Builder.build_serialized_network = build  # type: ignore[method-assign]
    (tmp_path / "weights.safetensors").write_bytes(b"")
    (tmp_path / "x.onnx").write_bytes(half_model().SerializeToString())
    options = BuildOptions(("sm90",), "inside", tmp_path / "timing.cache")
    files = tmp_path / "x.onnx", tmp_path / "weights.safetensors", tmp_path / "x.engine"
    if failures == 2:
        with pytest.raises(BackendError, match="tensorrt cannot build x.onnx: the reason"):
            build_engine(fakes.library_of(trt), *files, options)
    else:
        build_engine(fakes.library_of(trt), *files, options)
    assert [cache is not None for cache in caches] == [True, False]
    assert files[2].exists() == (failures == 1) and not (tmp_path / "timing.cache").exists()


def test_timings_of_builds_at_once_are_all_kept(tmp_path: Path) -> None:
    trt = V8(fakes.Network([fakes.Tensor("x", V8.DataType.FLOAT)]))

    def build(builder: Any, network: Any, config: Any) -> bytes:
        (tmp_path / "timing.cache").write_bytes(b"another")  # by another process, meanwhile
        config.cache.known = b"own"
        return b"a plan"

    trt.Builder.build_serialized_network = build  # type: ignore[method-assign]
    for name in ("x.onnx", "weights.safetensors"):
        (tmp_path / name).write_bytes(b"")
    options = BuildOptions(("sm90",), "inside", tmp_path / "timing.cache")
    build_engine(
        fakes.library_of(trt), tmp_path / "x.onnx", tmp_path / "weights.safetensors", tmp_path / "x.engine", options
    )
    assert (tmp_path / "timing.cache").read_bytes() == b"another own+"
