# SPDX-License-Identifier: Apache-2.0
"""Translations by hand: of operators that need no exporter, or whose export would cost memory."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch

from districompile.backends.onnx.proto import Kind, Template
from districompile.backends.onnx.quantised import (
    translate_cast,
    translate_conv,
    translate_int_mm,
    translate_linear,
    translate_move,
    translate_scaled_mm,
)

if TYPE_CHECKING:
    import onnx

_SAME = ("aten.clone.default", "aten.contiguous.default", "aten.alias.default", "aten.detach.default",
         "aten.lift_fresh_copy.default")  # fmt: skip


def translate_here(kind: Kind) -> Template | None:
    """Return the template of a kind that this module translates, or None."""
    if kind.op in _SAME and kind.inputs[0] == kind.outputs[0]:
        return Template((), (), ("x",), ("x",))
    translate = _HERE.get(kind.op)
    return translate(kind) if translate else None


def _linear(kind: Kind) -> Template | None:
    """Translate a linear to ``Gemm`` over flattened tokens, which reads the weight as it lies in the file.

    With the exporter's ``Transpose`` and ``MatMul``, a runtime holds a transposed copy of every linear's weight.
    """
    from onnx import helper

    x, out = kind.inputs[0], kind.outputs[0]
    if json.loads(kind.arguments) not in ([["%0", "%1"], {}], [["%0", "%1", None], {}], [["%0", "%1", "%2"], {}]):
        return None
    if len(kind.inputs[1].shape) != 2 or not x.dtype.is_floating_point or 0 in x.shape:
        return None
    names = ["x", "weight", "bias"][: len(kind.inputs)]
    if len(x.shape) == 2:
        return Template((helper.make_node("Gemm", names, ["y"], transB=1),), (), tuple(names), ("y",))
    rows = _int_constant("rows", [-1, x.shape[-1]])
    shape = _int_constant("shape", list(out.shape))
    nodes = (
        helper.make_node("Reshape", ["x", "rows"], ["x2"]),
        helper.make_node("Gemm", ["x2", *names[1:]], ["y2"], transB=1),
        helper.make_node("Reshape", ["y2", "shape"], ["y"]),
    )
    return Template(nodes, (rows, shape), tuple(names), ("y",))


def _attention(kind: Kind) -> Template | None:
    """Translate attention with an added mask or none.

    The exporter takes four dimensions only, reshapes the keys twice to transpose them, and scales them, too. That is
    more work, and not the pattern that runtimes fuse.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    positional, named = json.loads(kind.arguments)
    given = {**dict(zip(_ATTENTION, positional, strict=False)), **named}
    operands = {f"%{i}": spec for i, spec in enumerate(kind.inputs)}
    q, k, v = (operands[given[name]] for name in _ATTENTION[:3])
    mask = given.get("attn_mask")
    if given.get("dropout_p") or given.get("is_causal") or given.get("enable_gqa") or q.dtype not in _NUMPY:
        return None
    if len(q.shape) < 3 or not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        return None
    if mask is not None and operands[mask].dtype != q.dtype:
        return None
    scale = given.get("scale")
    factor = np.array(q.shape[-1] ** -0.5 if scale is None else scale, dtype=_NUMPY[q.dtype])
    rank = len(q.shape)
    nodes = [
        helper.make_node("Mul", [given["query"], "scale"], ["scaled"]),
        helper.make_node("Transpose", [given["key"]], ["keys"], perm=[*range(rank - 2), rank - 1, rank - 2]),
        helper.make_node("MatMul", ["scaled", "keys"], ["scores"]),
        helper.make_node("Softmax", ["masked" if mask else "scores"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", given["value"]], ["y"]),
    ]
    if mask:
        nodes.insert(3, helper.make_node("Add", ["scores", mask], ["masked"]))
    return Template(tuple(nodes), (numpy_helper.from_array(factor, "scale"),), tuple(operands), ("y",))


_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def _merge_moments(kind: Kind) -> Template | None:
    """Translate a merge of moments. Of unequal counts the composite makes a tensor, which the exporter cannot find."""
    import numpy as np
    from onnx import helper, numpy_helper

    (parts, counts), _ = json.loads(kind.arguments)
    if parts != "%0" or kind.inputs[0].dtype not in _NUMPY:
        return None
    shares = np.array(counts, dtype="float64") / sum(counts)
    weights = shares.reshape(-1, 1, 1, 1).astype(_NUMPY[kind.inputs[0].dtype])
    rest = kind.inputs[0].shape[1] - 2  # the forecasts sent beside them (announce-statistics)
    constants = (
        numpy_helper.from_array(weights, "weights"),
        _int_constant("first", [0]),
        _int_constant("rows", [1, 1, *([rest] if rest else [])]),
        _int_constant("shape", list(kind.outputs[0].shape)),
    )
    nodes = (
        helper.make_node("Split", ["parts", "rows"], ["mean", "var", *(["rest"] if rest else [])], axis=1),
        helper.make_node("Mul", ["mean", "weights"], ["weighted"]),
        helper.make_node("ReduceSum", ["weighted", "first"], ["whole"]),
        helper.make_node("Sub", ["mean", "whole"], ["distance"]),
        helper.make_node("Mul", ["distance", "distance"], ["square"]),
        helper.make_node("Add", ["var", "square"], ["around"]),
        helper.make_node("Mul", ["around", "weights"], ["shares"]),
        helper.make_node("ReduceSum", ["shares", "first"], ["variance"]),
        helper.make_node("Concat", ["whole", "variance"], ["both"], axis=1),
        helper.make_node("Reshape", ["both", "shape"], ["y"]),
    )
    return Template(nodes, constants, ("parts",), ("y",))


_NUMPY = {torch.float32: "float32", torch.float16: "float16", torch.float64: "float64"}
_HERE = {
    "aten.linear.default": _linear,
    "aten.scaled_dot_product_attention.default": _attention,
    "districompile.merge_moments.default": _merge_moments,
    "aten._to_copy.default": translate_cast,
    "aten._int_mm.default": translate_int_mm,
    "aten._scaled_mm.default": translate_scaled_mm,
    "aten.t.default": translate_move,
    "aten.transpose.int": translate_move,
    "aten.permute.default": translate_move,
    "districompile.fp8_linear.default": translate_linear,
    "districompile.fp8_conv.default": translate_conv,
}


def _int_constant(name: str, values: list[int]) -> onnx.TensorProto:
    import onnx
    from onnx import helper

    return helper.make_tensor(name, onnx.TensorProto.INT64, [len(values)], values)
