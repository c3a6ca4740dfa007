"""Every rewriting for opset 17 against what it replaces, by ONNX Runtime; and what is refused, with its reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper, shape_inference

from districompile.backends.onnx.opset17 import to_opset17

TYPES = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16, np.int64: TensorProto.INT64,
         np.bool_: TensorProto.BOOL}  # fmt: skip
FLOATS = st.sampled_from([np.float32, np.float16])
EXAMPLES = settings(max_examples=12, deadline=None, database=None)
REDUCTIONS = ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
              "ReduceProd", "ReduceSum", "ReduceSumSquare")  # fmt: skip
Feed = dict[str, Any]
N = helper.make_node


def model_of(nodes: list[Any], feed: Feed, outputs: dict[str, Any], constants: Feed | None = None) -> Any:
    """Make a model of opset 20. ``outputs`` maps names to dtypes; their shapes are inferred."""
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(n, TYPES[x.dtype.type], x.shape) for n, x in feed.items()],
        [helper.make_tensor_value_info(n, TYPES[t], None) for n, t in outputs.items()],
        [numpy_helper.from_array(c, n) for n, c in (constants or {}).items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return shape_inference.infer_shapes(model)  # the checker wants the shapes of outputs


def run(model: Any, feed: Feed) -> list[Any]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feed)


def check_same(model: Any, feed: Feed, tolerance: float = 1e-5) -> Any:
    """The rewritten model is valid and computes the same. Return it."""
    before = model.SerializeToString()
    new, reasons = to_opset17(model)
    assert not reasons and model.SerializeToString() == before
    assert [o.version for o in new.opset_import] == [17]
    onnx.checker.check_model(new, full_check=True)
    for got, want in zip(run(new, feed), run(model, feed), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        np.testing.assert_allclose(got.astype("float64"), want.astype("float64"), rtol=tolerance, atol=tolerance)
    used = {name for node in new.graph.node for name in node.input}
    assert all(t.name in used for t in new.graph.initializer)
    return new


def draw(shape: Any, dtype: Any, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@EXAMPLES
@given(
    op=st.sampled_from(REDUCTIONS), dtype=FLOATS, keepdims=st.booleans(), noop=st.booleans(),
    axes=st.sampled_from([None, (), (0,), (-1,), (1, -1), (0, 1, 2), (-2, 0)]),
)  # fmt: skip
def test_axes_of_reductions(op: str, dtype: Any, keepdims: bool, noop: bool, axes: tuple[int, ...] | None) -> None:
    feed = {"x": np.abs(draw((2, 3, 4), dtype)) + dtype(0.5)}
    constants = {} if axes is None else {"axes": np.array(axes, np.int64)}
    node = helper.make_node(op, ["x", *constants], ["y"], keepdims=int(keepdims), noop_with_empty_axes=int(noop))
    model = model_of([node], feed, {"y": dtype}, constants)
    if noop and not axes and op in ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare"):
        assert list(to_opset17(model)[1].values()) == [f"{op} over no axis"]
        return
    new = check_same(model, feed, 1e-5 if dtype == np.float32 else 5e-3)
    assert all(len(n.input) == 1 or n.op_type == "ReduceSum" for n in new.graph.node)


@EXAMPLES
@given(
    rows=st.integers(2, 11), parts=st.integers(1, 4), axis=st.sampled_from([0, 1, -1]), sized=st.booleans(),
    dtype=FLOATS,
)  # fmt: skip
def test_splits_even_and_uneven(rows: int, parts: int, axis: int, sized: bool, dtype: Any) -> None:
    shape = [3, 3]
    shape[axis] = rows
    feed, names = {"x": draw(shape, dtype)}, [f"y{i}" for i in range(parts)]
    chunk = -(-rows // parts)
    sizes = [max(0, min(chunk, rows - i * chunk)) for i in range(parts)]
    if sized:
        sizes = [rows - parts + 1, *([1] * (parts - 1))]
        node = helper.make_node("Split", ["x", "sizes"], names, axis=axis)
    else:
        node = helper.make_node("Split", ["x"], names, axis=axis, num_outputs=parts)
    constants = {"sizes": np.array(sizes, np.int64)} if sized else {}
    model = model_of([node], feed, dict.fromkeys(names, dtype), constants)
    if min(sizes) <= 0:
        assert list(to_opset17(model)[1].values()) == ["Split has an empty part"]
        return
    (made,) = check_same(model, feed).graph.node
    assert len(made.input) == 2 and [a.name for a in made.attribute] == ["axis"]


@EXAMPLES
@given(dtype=FLOATS, approximate=st.sampled_from(["none", "tanh"]), scale=st.sampled_from([0.1, 3.0, 60.0]))
def test_gelu(dtype: Any, approximate: str, scale: float) -> None:
    feed = {"x": (draw((4, 9), np.float32) * scale).astype(dtype)}
    node = helper.make_node("Gelu", ["x"], ["y"], approximate=approximate)
    new = check_same(model_of([node], feed, {"y": dtype}), feed, 2e-6 * scale if dtype == np.float32 else 5e-3)
    assert {n.op_type for n in new.graph.node} <= {"Mul", "Add", "Erf", "Tanh"}
    x = feed["x"].astype("float64")
    if dtype == np.float32 and approximate == "none":  # against the definition, too
        want = x * 0.5 * (1 + np.vectorize(__import__("math").erf)(x / np.sqrt(2)))
        np.testing.assert_allclose(run(new, feed)[0], want, rtol=1e-5, atol=1e-5 * scale)


@EXAMPLES
@given(dtype=FLOATS, shape=st.sampled_from([(2, 3, 5), (1, 2, 4, 6), (2, 2, 2, 3, 2)]), offset=st.sampled_from([0, 30]))
def test_instance_normalization(dtype: Any, shape: tuple[int, ...], offset: float) -> None:
    """Written out; with float32 statistics, large means lose nothing."""
    feed = {
        "x": (draw(shape, np.float32) + offset).astype(dtype),
        "s": draw(shape[1], dtype),
        "b": draw(shape[1], dtype),
    }
    node = helper.make_node("InstanceNormalization", ["x", "s", "b"], ["y"], epsilon=1e-4)
    new = check_same(model_of([node], feed, {"y": dtype}), feed, 2e-4 if dtype == np.float32 else 2e-2)
    assert "InstanceNormalization" not in {n.op_type for n in new.graph.node}


@EXAMPLES
@given(
    mode=st.sampled_from(["constant", "reflect", "edge", "wrap"]), before=st.integers(0, 2), after=st.integers(0, 2),
    axes=st.sampled_from([None, (1,), (-1, 0), (0, 1)]), value=st.sampled_from([None, 1.5]), dtype=FLOATS,
)  # fmt: skip
def test_pads(mode: str, before: int, after: int, axes: Any, value: Any, dtype: Any) -> None:
    feed = {"x": draw((3, 4), dtype)}
    count = 2 if axes is None else len(axes)
    constants: Feed = {"pads": np.array([before] * count + [after] * count, np.int64)}
    if value is not None:
        constants["value"] = np.array(value, dtype)
    if axes is not None:
        constants["axes"] = np.array(axes, np.int64)
    inputs = ["x", "pads", "value" if value is not None else "", "axes" if axes is not None else ""]
    while not inputs[-1]:
        inputs.pop()
    if mode != "constant" and value is not None:
        return
    node = helper.make_node("Pad", inputs, ["y"], mode=mode)
    new = check_same(model_of([node], feed, {"y": dtype}, constants), feed)
    assert all(len(n.input) <= 3 for n in new.graph.node if n.op_type == "Pad")


@pytest.mark.parametrize("limits", [("low", "high"), ("low", ""), ("", "high"), ("", "")])
@pytest.mark.parametrize("dtype", [np.float32, np.int64])
@pytest.mark.parametrize("constant", [True, False])
def test_clips(limits: tuple[str, str], dtype: Any, constant: bool) -> None:
    given_ = {n: np.array(v, dtype) for n, v in (("low", -1), ("high", 1)) if n in limits}
    feed: Feed = {"x": (draw((3, 5), np.float32) * 3).astype(dtype), **({} if constant else given_)}
    node = helper.make_node("Clip", ["x", *limits], ["y"])
    new = check_same(model_of([node], feed, {"y": dtype}, given_ if constant else {}), feed)
    kept = dtype == np.float32 and (constant or not given_)
    assert ({n.op_type for n in new.graph.node} == {"Clip"}) == kept


@pytest.mark.parametrize("exponent", [np.float32(2), np.float32(3), np.int64(2), np.int64(3), np.array([1, 2], "f4")])
def test_powers(exponent: Any) -> None:
    feed = {"x": np.abs(draw((3, 2), np.float32))}
    node = helper.make_node("Pow", ["x", "e"], ["y"])
    check_same(model_of([node], feed, {"y": np.float32}, {"e": np.asarray(exponent)}), feed)


@pytest.mark.parametrize("axes, kind", [(None, "sizes"), ((2, 3), "sizes"), ((-1,), "scales"), (None, "scales")])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_resizes(axes: Any, kind: str, mode: str) -> None:
    feed, chosen = {"x": draw((1, 2, 3, 4), np.float32)}, axes or (0, 1, 2, 3)
    factors = {0: 1, 1: 1, 2: 2, 3: 3, -1: 3}
    values = [factors[a] * (feed["x"].shape[a] if kind == "sizes" else 1) for a in chosen]
    constants = {kind: np.array(values, np.int64 if kind == "sizes" else np.float32)}
    inputs = ["x", "", *(["scales"] if kind == "scales" else ["", "sizes"])]
    attributes = {} if axes is None else {"axes": list(axes)}
    node = helper.make_node("Resize", inputs, ["y"], mode=mode, antialias=0, keep_aspect_ratio_policy="stretch",
                            coordinate_transformation_mode="half_pixel", **attributes)  # fmt: skip
    check_same(model_of([node], feed, {"y": np.float32}, constants), feed)


def test_smaller_rewritings() -> None:
    x, flags = draw((2, 3), np.float32), np.array([True, False, True])
    two = {"a": flags, "b": np.array([True, True, False])}
    check_same(model_of([helper.make_node("Equal", ["a", "b"], ["y"])], two, {"y": np.bool_}), two)
    check_same(model_of([helper.make_node("Mish", ["x"], ["y"])], {"x": x}, {"y": np.float32}), {"x": x})
    image, grid = draw((1, 2, 4, 4), np.float32), np.clip(draw((1, 3, 3, 2), np.float32), -1, 1)
    feed = {"x": image, "g": grid}
    for mode in ("linear", "nearest", "cubic"):
        node = helper.make_node("GridSample", ["x", "g"], ["y"], mode=mode)
        check_same(model_of([node], feed, {"y": np.float32}), feed)
    node = helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[2, 2], dilations=[1, 1])
    check_same(model_of([node], {"x": image}, {"y": np.float32}), {"x": image})


def test_constants_become_initializers() -> None:
    """The parser reads the bits of ``value_int`` as those of a float."""
    x = np.arange(6).reshape(2, 3)
    constants = [N("Constant", [], ["two"], value_int=2), N("Constant", [], ["f"], value_floats=[1.5])]
    nodes = [*constants, N("Mul", ["x", "two"], ["y"]), N("Identity", ["f"], ["z"])]
    new = check_same(model_of(nodes, {"x": x}, {"y": np.int64, "z": np.float32}), {"x": x})
    assert "Constant" not in {n.op_type for n in new.graph.node}
    for shape in ([2, 3], []):
        value = numpy_helper.from_array(np.array([7], np.int64))
        fill = helper.make_node("ConstantOfShape", ["s"], ["v"], value=value)
        nodes = [fill, helper.make_node("Add", ["x", "v"], ["y"])]
        check_same(model_of(nodes, {"x": x}, {"y": np.int64}, {"s": np.array(shape, np.int64)}), {"x": x})


X = draw((4, 4), np.float32)
IMAGE = {"x": draw((1, 1, 4, 4), np.float32)}
REFUSED = [
    ([N("DFT", ["x"], ["y"])], {"x": draw((1, 4, 1), np.float32)}, {}, "DFT is not among the operators"),
    ([N("Identity", ["x"], ["y"])], {"x": np.zeros([1] * 9, "f4")}, {}, "more than 8 dims"),
    ([N("Cast", ["x"], ["y"], to=TensorProto.DOUBLE)], {"x": X}, {}, "double values, which TensorRT 8.6 does not have"),
    ([N("Cast", ["x"], ["y"], to=TensorProto.BFLOAT16)], {"x": X}, {}, "bfloat16 values"),
    ([N("ReduceSum", ["x"], ["y"])], {"x": X.astype(np.int64)}, {}, "no ReduceSum of int64 values"),
    ([N("ReduceMean", ["x", "a"], ["y"])], {"x": X, "a": np.array([0])}, {}, "axes that are computed"),
    ([N("Greater", ["x", "x"], ["y"])], {"x": X > 0}, {}, "no Greater of bool values"),
    ([N("Add", ["x", "c"], ["y"])], {"x": X.astype(np.int64)}, {"c": np.array(2**31)}, "an integer beyond 32 bits"),
    ([N("ScatterND", ["x", "i", "x"], ["y"], reduction="add")], {"x": X}, {"i": np.array([[0], [1], [2], [3]])},
     "no ScatterND that combines values"),
    ([N("Einsum", ["x"], ["y"], equation="ii->i")], {"x": X}, {}, "an ellipsis or a diagonal"),
    ([N("Mod", ["x", "x"], ["y"], fmod=0)], {"x": X}, {}, "no Mod of floats"),
    ([N("TopK", ["x", "k"], ["y", "i"])], {"x": np.zeros((1, 5000), "f4")}, {"k": np.array([4000])}, "more than 3840"),
    ([N("AveragePool", ["x"], ["y"], kernel_shape=[2, 2], dilations=[2, 2])], IMAGE, {}, "with dilations"),
    ([N("MaxPool", ["x"], ["y", "i"], kernel_shape=[2, 2])], IMAGE, {}, "one output of MaxPool"),
    ([N("Resize", ["x", "", "", "s"], ["y"], mode="linear", antialias=1)], IMAGE, {"s": np.array([1, 1, 2, 2])},
     "antialiasing"),
    ([N("Resize", ["x", "", "", "s"], ["y"], coordinate_transformation_mode="half_pixel_symmetric")], IMAGE,
     {"s": np.array([1, 1, 2, 2])}, "coordinates half_pixel_symmetric"),
    ([N("Pad", ["x", "p"], ["y"], mode="wrap")], {"x": X}, {"p": np.array([5, 0, 0, 0])}, "more rows than there are"),
]  # fmt: skip


@pytest.mark.parametrize(
    "nodes, feed, constants, reason", REFUSED, ids=[c[0][0].op_type + str(i) for i, c in enumerate(REFUSED)]
)
def test_what_the_parser_lacks_is_refused(nodes: list[Any], feed: Feed, constants: Feed, reason: str) -> None:
    nodes[0].name = "aten_op_3/Op_7"
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(n, TYPES[x.dtype.type], x.shape) for n, x in feed.items()],
        [onnx.ValueInfoProto(name=n) for n in nodes[-1].output],
        [numpy_helper.from_array(c, n) for n, c in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    _, reasons = to_opset17(model)
    assert list(reasons) == ["aten_op_3/Op_7"] and reason in reasons["aten_op_3/Op_7"]


def test_slices_to_the_end_keep_their_limit() -> None:
    feed = {"x": X}
    constants = {"s": np.array([1]), "e": np.array([2**63 - 1]), "a": np.array([-1])}
    new = check_same(model_of([N("Slice", ["x", "s", "e", "a"], ["y"])], feed, {"y": np.float32}, constants), feed)
    assert max(numpy_helper.to_array(t).max() for t in new.graph.initializer) == 2**63 - 1
