# SPDX-License-Identifier: Apache-2.0
"""Rewrite a model for the ONNX parser of TensorRT 8.6, which knows opset 17.

A rewritten model is a plain opset-17 model: the ``onnx`` checker accepts it, and ONNX Runtime computes the same with
it. Operators that the parser lacks, attributes that it ignores, and dtypes that it narrows without a word are reported.
The converter of ``onnx`` goes down for few operators, and knows nothing of a parser's limits.

Normalisation over instances is written out: the parser's own way is a plugin, which calls cuDNN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from districompile.backends.onnx.opset17_writer import BOOL, FLOAT, FLOAT16, SUPPORTED, TYPES, Refused, Rewriter

if TYPE_CHECKING:
    import onnx

_LARGEST_K = 3840  # of TopK, in the layer's documentation


def to_opset17(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Rewrite ``model``, whose shapes are static, for opset 17 and the parser of TensorRT 8.6.

    Return the new model, and the reason for each node that cannot be written for it, by the node's name. The model is
    of use only if there is no reason. ``model`` is left as it is.
    """
    writer = Rewriter(model)
    reasons: dict[str, str] = {}
    for i, node in enumerate(model.graph.node):
        writer.label = node.name.rpartition("/")[0] or f"node{i}"
        start = len(writer.nodes)
        try:
            _RULES.get(node.op_type, Rewriter.keep)(writer, node)
            for made in writer.nodes[start:]:
                writer.check(made)
        except Refused as e:
            reasons.setdefault(node.name or f"{node.op_type}_{i}", str(e))
    return writer.result(), reasons


# Rules, by operator of opset 20. Each writes nodes of opset 17, whose last output is the node's own.


def _reduce(r: Rewriter, node: onnx.NodeProto) -> None:
    """Axes are an attribute up to opset 17, but for ReduceSum; the parser ignores ``noop_with_empty_axes``."""
    found = r.known(node, 1, "axes")
    axes = [int(a) for a in np.ravel(found)] if found is not None else []
    if not axes and _attribute(node, "noop_with_empty_axes", 0):
        if node.op_type in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd"):
            r.add("Identity", node.input[:1], node.output[0])
            return
        raise Refused(f"{node.op_type} over no axis")
    attributes: dict[str, Any] = {"keepdims": _attribute(node, "keepdims", 1)}
    inputs = [node.input[0]]
    if axes and node.op_type == "ReduceSum":
        inputs.append(r.constant(axes))
    elif axes:
        attributes["axes"] = axes
    r.add(node.op_type, inputs, node.output[0], **attributes)


def _split(r: Rewriter, node: onnx.NodeProto) -> None:
    """``num_outputs`` is of opset 18. The parser would round uneven parts down."""
    axis = _attribute(node, "axis", 0)
    total, count = r.shapes[node.input[0]][axis], len(node.output)
    sizes = r.known(node, 1, "sizes")
    if sizes is None:
        chunk = -(-total // count)
        sizes = [max(0, min(chunk, total - i * chunk)) for i in range(count)]
    if any(n <= 0 for n in sizes):
        raise Refused("Split has an empty part")
    copy = type(node)()
    copy.CopyFrom(node)
    del copy.input[1:], copy.attribute[:]
    copy.input.append(r.constant(sizes))
    copy.attribute.append(_make_attribute("axis", axis))
    r.keep(copy)


def _gelu(r: Rewriter, node: onnx.NodeProto) -> None:
    x = node.input[0]
    if _attribute(node, "approximate", "none") == "tanh":
        cube = r.add("Mul", [r.add("Mul", [x, x]), x])
        inner = r.add("Add", [x, r.add("Mul", [cube, r.scalar(0.044715, x)])])
        bent = r.add("Tanh", [r.add("Mul", [inner, r.scalar(math.sqrt(2 / math.pi), x)])])
    else:
        bent = r.add("Erf", [r.add("Mul", [x, r.scalar(math.sqrt(0.5), x)])])
    half = r.add("Mul", [x, r.scalar(0.5, x)])
    r.add("Mul", [half, r.add("Add", [bent, r.scalar(1.0, x)])], node.output[0])


def _instance_norm(r: Rewriter, node: onnx.NodeProto) -> None:
    """Write it out, with statistics in float32."""
    x, scale, bias = node.input
    rank, kind = r.rank(x), r.types[x]
    axes = list(range(2, rank))
    if not axes:
        raise Refused("InstanceNormalization over no axis")
    wide = x
    if kind == FLOAT16:
        r.types[wide := r.add("Cast", [x], to=FLOAT)] = FLOAT
    distance = r.add("Sub", [wide, r.add("ReduceMean", [wide], axes=axes, keepdims=1)])
    variance = r.add("ReduceMean", [r.add("Mul", [distance, distance])], axes=axes, keepdims=1)
    epsilon = r.scalar(_attribute(node, "epsilon", 1e-5), distance)
    normal = r.add("Div", [distance, r.add("Sqrt", [r.add("Add", [variance, epsilon])])])
    if kind == FLOAT16:
        r.types[normal := r.add("Cast", [normal], to=FLOAT16)] = FLOAT16
    shape = r.constant([-1, *([1] * (rank - 2))])
    scaled = r.add("Mul", [normal, r.add("Reshape", [scale, shape])])
    r.add("Add", [scaled, r.add("Reshape", [bias, shape])], node.output[0])


def _mish(r: Rewriter, node: onnx.NodeProto) -> None:
    x = node.input[0]
    r.add("Mul", [x, r.add("Tanh", [r.add("Softplus", [x])])], node.output[0])


def _pow(r: Rewriter, node: onnx.NodeProto) -> None:
    """The parser takes no integers. Squares are products."""
    x, exponent = node.input
    value = r.constants.get(exponent)
    if value is not None and value.size == 1 and float(value.reshape(())) == 2.0 and value.ndim <= r.rank(x):
        r.add("Mul", [x, x], node.output[0])
        return
    if r.types[exponent] != r.types[x]:
        r.types[exponent := r.add("Cast", [exponent], to=r.types[x])] = r.types[x]
    r.add("Pow", [x, exponent], node.output[0])


def _equal(r: Rewriter, node: onnx.NodeProto) -> None:
    if r.types[node.input[0]] == BOOL:
        r.add("Not", [r.add("Xor", node.input)], node.output[0])
    else:
        r.keep(node)


def _clip(r: Rewriter, node: onnx.NodeProto) -> None:
    """The parser needs constant limits of a float; Max and Min do not."""
    limits = [*node.input[1:], "", ""][:2]
    if r.types[node.input[0]] in (FLOAT, FLOAT16) and all(not n or n in r.constants for n in limits):
        r.keep(node)
        return
    x = node.input[0]
    if limits[0]:
        x = r.add("Max", [x, limits[0]], "" if limits[1] else node.output[0])
    if limits[1]:
        x = r.add("Min", [x, limits[1]], node.output[0])
    if x == node.input[0]:
        r.add("Identity", [x], node.output[0])


def _pad(r: Rewriter, node: onnx.NodeProto) -> None:
    """Axes are of opset 18, and the mode ``wrap`` of 19."""
    mode = _attribute(node, "mode", "constant")
    pads, axes = np.ravel(r.known(node, 1, "sizes")), r.known(node, 3, "axes")
    rank = r.rank(node.input[0])
    if axes is not None:
        given, pads = pads, np.zeros(2 * rank, np.int64)
        for i, axis in enumerate(np.ravel(axes)):
            pads[axis % rank], pads[axis % rank + rank] = given[i], given[i + axes.size]
    if mode == "wrap":
        _wrap(r, node, pads)
        return
    inputs = [node.input[0], r.constant(pads), *([node.input[2]] if len(node.input) > 2 and node.input[2] else [])]
    r.add("Pad", inputs, node.output[0], mode=mode)


def _wrap(r: Rewriter, node: onnx.NodeProto, pads: Any) -> None:
    """Rows of the other end are sliced and concatenated, one dim after the other."""
    x, shape = node.input[0], r.shapes[node.input[0]]
    padded = [d for d in range(len(shape)) if pads[d] or pads[d + len(shape)]]
    for d in padded:
        before, after = int(pads[d]), int(pads[d + len(shape)])
        if not (0 <= before <= shape[d] and 0 <= after <= shape[d]):
            raise Refused("Pad of mode wrap takes more rows than there are")
        parts = [x]
        for start, stop, place in ((shape[d] - before, shape[d], 0), (0, after, len(shape))):
            if stop > start:
                rows = r.add("Slice", [x, r.constant([start]), r.constant([stop]), r.constant([d])])
                parts.insert(place, rows)
        x = r.add("Concat", parts, node.output[0] if d == padded[-1] else "", axis=d)
    if not padded:
        r.add("Identity", [x], node.output[0])


def _resize(r: Rewriter, node: onnx.NodeProto) -> None:
    """Axes, antialiasing and the policy of aspects are of opset 18."""
    coordinates = _attribute(node, "coordinate_transformation_mode", "half_pixel")
    known = ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners")
    if coordinates not in known:
        raise Refused(f"TensorRT 8.6 has no Resize of coordinates {coordinates}")
    if _attribute(node, "antialias", 0):
        raise Refused("TensorRT 8.6 has no Resize with antialiasing")
    if _attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Refused("TensorRT 8.6 has no Resize that keeps the aspect ratio")
    shape, axes = r.shapes[node.input[0]], _attribute(node, "axes", None)
    scales, sizes = r.known(node, 2, "scales"), r.known(node, 3, "sizes")
    if axes is not None:
        if sizes is not None:
            sizes = _spread(np.array(shape), axes, sizes)
        else:
            scales = _spread(np.ones(len(shape), np.float32), axes, scales)
    ends = [r.constant(sizes)] if sizes is not None else []
    inputs = [node.input[0], "", "" if ends else r.constant(scales, np.float32), *ends]
    copy = type(node)()
    copy.CopyFrom(node)
    del copy.input[:]
    copy.input.extend(inputs)
    r.keep(copy, "antialias", "axes", "keep_aspect_ratio_policy")


def _spread(whole: Any, axes: Sequence[int], values: Any) -> Any:
    whole[[a % len(whole) for a in axes]] = values
    return whole


def _grid_sample(r: Rewriter, node: onnx.NodeProto) -> None:
    """Modes have other names from opset 20 on, and volumes are new there."""
    if r.rank(node.input[0]) != 4:
        raise Refused("TensorRT 8.6 has a GridSample of images only")
    mode = _attribute(node, "mode", "linear")
    r.keep(node, "mode")
    name = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    r.nodes[-1].attribute.append(_make_attribute("mode", name))


def _constant_of_shape(r: Rewriter, node: onnx.NodeProto) -> None:
    shape, found = r.known(node, 0, "sizes"), _attribute(node, "value", None)
    value = np.zeros(1, np.float32) if found is None else _array(found)
    filled = value.reshape([1] * max(1, len(shape)))
    if not len(shape):
        r.add("Reshape", [r.constant(filled, value.dtype), r.constant([])], node.output[0])
        return
    r.add("Expand", [r.constant(filled, value.dtype), node.input[0]], node.output[0])


def _constant(r: Rewriter, node: onnx.NodeProto) -> None:
    """An initializer instead: the parser reads ``value_int`` as the bits of a float."""
    from onnx import numpy_helper

    (attribute,) = node.attribute
    kinds = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
    value = _attribute(node, attribute.name, None)
    if attribute.name != "value" and attribute.name not in kinds:
        raise Refused(f"TensorRT 8.6 has no Constant of a {attribute.name}")
    array = _array(value) if attribute.name == "value" else np.asarray(value, dtype=kinds[attribute.name])
    name = node.output[0]
    tensor = r.initializers[name] = numpy_helper.from_array(array, name)
    r.types[name], r.shapes[name], r.constants[name] = tensor.data_type, list(array.shape), array


def _cast(r: Rewriter, node: onnx.NodeProto) -> None:
    r.keep(node, "saturate")


def _pool(r: Rewriter, node: onnx.NodeProto) -> None:
    """Dilations of averages are of opset 19."""
    if any(d != 1 for d in _attribute(node, "dilations", None) or ()):
        raise Refused(f"TensorRT 8.6 has no {node.op_type} with dilations")
    _one_output(r, node, "dilations")


def _one_output(r: Rewriter, node: onnx.NodeProto, *without: str) -> None:
    if any(node.output[1:]):
        raise Refused(f"TensorRT 8.6 gives one output of {node.op_type}")
    r.keep(node, *without)


def _scatter(r: Rewriter, node: onnx.NodeProto) -> None:
    if _attribute(node, "reduction", "none") != "none":
        raise Refused(f"TensorRT 8.6 has no {node.op_type} that combines values")
    r.keep(node, "reduction")


def _top_k(r: Rewriter, node: onnx.NodeProto) -> None:
    k = int(np.ravel(r.known(node, 1, "sizes"))[0])
    if k > _LARGEST_K:
        raise Refused(f"TensorRT 8.6 has no TopK of more than {_LARGEST_K} values")
    if TYPES.get(r.types[node.input[0]]) == "i":
        raise Refused("TensorRT 8.6 rounds the integers of a TopK to float32")
    r.keep(node)


def _einsum(r: Rewriter, node: onnx.NodeProto) -> None:
    terms = str(_attribute(node, "equation", "")).replace(" ", "").replace("->", ",").split(",")
    if any("." in t or len(set(t)) < len(t) for t in terms):
        raise Refused("TensorRT 8.6 has no Einsum with an ellipsis or a diagonal")
    r.keep(node)


def _mod(r: Rewriter, node: onnx.NodeProto) -> None:
    if TYPES.get(r.types[node.input[0]]) != "i" and not _attribute(node, "fmod", 0):
        raise Refused("TensorRT 8.6 has no Mod of floats with the sign of the divisor")
    r.keep(node)


_RULES: Mapping[str, Callable[[Rewriter, onnx.NodeProto], None]] = {
    **dict.fromkeys([n for n in SUPPORTED if n.startswith("Reduce")], _reduce),
    "AveragePool": _pool, "BatchNormalization": _one_output, "Cast": _cast, "Clip": _clip, "Constant": _constant,
    "ConstantOfShape": _constant_of_shape, "Einsum": _einsum, "Equal": _equal, "Gelu": _gelu,
    "GridSample": _grid_sample, "InstanceNormalization": _instance_norm, "LayerNormalization": _one_output,
    "MaxPool": _pool, "Mish": _mish, "Mod": _mod, "Pad": _pad, "Pow": _pow, "Resize": _resize,
    "ScatterElements": _scatter, "ScatterND": _scatter, "Split": _split, "TopK": _top_k,
}  # fmt: skip


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    from onnx import helper

    found = next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
    return found.decode() if isinstance(found, bytes) else found


def _make_attribute(name: str, value: Any) -> Any:
    from onnx import helper

    return helper.make_attribute(name, value)


def _array(tensor: onnx.TensorProto) -> Any:
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor)
