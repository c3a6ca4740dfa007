# SPDX-License-Identifier: Apache-2.0
"""Write opset-17 nodes, and check that the ONNX parser of TensorRT 8.6 takes them.

What the parser takes is known from the table of operators and the source of its release 8.6-EA
(github.com/onnx/onnx-tensorrt). :mod:`districompile.backends.onnx.opset17` has the rules that write nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

OPSET = 17
IR_VERSION = 8
FLOAT, FLOAT16, INT64, BOOL = 1, 10, 7, 9  # onnx.TensorProto.DataType
TYPES = {FLOAT: "f", FLOAT16: "h", 6: "i", INT64: "i", BOOL: "b"}
"""The dtypes of values that the parser takes, by letter. ``i``: int32, and int64 narrowed to it."""

SUPPORTED: dict[str, str] = {
    name: dtypes
    for dtypes, names in {
        "fhib": "Cast Concat Expand Flatten Gather GatherElements GatherND Identity Reshape Slice Split Squeeze Tile "
        "Transpose Unsqueeze Where",
        "fhi": "Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod "
        "Mul Neg Pad ScatterElements ScatterND Sign SpaceToDepth Sub Sum TopK",
        "fi": "Range",
        "fh": "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos "
        "Cosh CumSum Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GlobalMaxPool GridSample HardSigmoid HardSwish "
        "IsInf IsNaN LayerNormalization LeakyRelu Log LogSoftmax LpNormalization MatMul MaxPool PRelu Pow Reciprocal "
        "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum "
        "ReduceSumSquare Relu Resize Round Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh "
        "ThresholdedRelu",
        "b": "And Not Or Xor",
    }.items()
    for name in names.split()
}
"""The operators of a rewritten model, with the dtypes of their data."""

_BESIDE = {  # inputs that are no data: shapes, indices, axes, sizes
    "Clip": 1, "CumSum": 1, "Expand": 1, "Gather": 1, "GatherElements": 1, "GatherND": 1, "Pad": 1, "ReduceSum": 1,
    "Reshape": 1, "Resize": 1, "ScatterElements": 1, "ScatterND": 1, "Slice": 1, "Split": 1, "Squeeze": 1, "Tile": 1,
    "TopK": 1, "Unsqueeze": 1,
}  # fmt: skip
_INITIALIZERS = {"Slice": (3, 4), "ReduceSum": (1,), "Squeeze": (1,), "Unsqueeze": (1,), "CumSum": (1,), "Pad": (1,)}
"""Inputs that have to be known when the model is read."""


MAX_DIMS = 8


class Refused(Exception):
    """The reason why a node cannot be rewritten."""


class Rewriter:
    """The nodes of a new model, and the dtypes, shapes and constants of the old one and of what rules add."""

    def __init__(self, model: onnx.ModelProto) -> None:
        from onnx import numpy_helper, shape_inference

        self._model = model
        typed = shape_inference.infer_shapes(model, data_prop=True).graph
        values = [*typed.input, *typed.value_info, *typed.output]
        self.types: dict[str, int] = {v.name: v.type.tensor_type.elem_type for v in values}
        self.shapes: dict[str, list[int]] = {
            v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values
        }
        self.constants: dict[str, Any] = {}
        self.initializers = {t.name: t for t in model.graph.initializer}
        for tensor in model.graph.initializer:
            self.types[tensor.name], self.shapes[tensor.name] = tensor.data_type, list(tensor.dims)
            if not tensor.external_data:
                self.constants[tensor.name] = numpy_helper.to_array(tensor)
        self.nodes: list[onnx.NodeProto] = []
        self.label, self._count = "", 0  # the part of names of nodes that says where they come from

    # What rules write with

    def keep(self, node: onnx.NodeProto, *without: str) -> None:
        """Take a node over, without some of its attributes."""
        copy = type(node)()
        copy.CopyFrom(node)
        del copy.attribute[:]
        copy.attribute.extend(a for a in node.attribute if a.name not in without)
        self.nodes.append(copy)

    def add(self, op: str, inputs: Sequence[str], output: str = "", like: str = "", **attributes: Any) -> str:
        """Add a node and return the name of its output, which has the dtype of ``like`` or of the first input."""
        from onnx import helper

        self._count += 1
        output = output or f"opset17/{self._count}"
        label = f"{self.label}/{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=label, **attributes))
        self.types.setdefault(output, self.types.get(like or inputs[0], 0))
        return output

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """Add an initializer and return its name."""
        from onnx import numpy_helper

        array = np.asarray(value, dtype=dtype)
        name = f"opset17/{array.dtype}/{'x'.join(map(str, array.shape))}/{array.tobytes().hex()}"
        if len(name) > 100:
            self._count += 1
            name = f"opset17/constant_{self._count}"
        if name not in self.initializers:
            tensor = self.initializers[name] = numpy_helper.from_array(array, name)
            self.types[name], self.shapes[name], self.constants[name] = tensor.data_type, list(array.shape), array
        return name

    def scalar(self, value: float, like: str) -> str:
        """Add a number of the dtype of the value ``like``."""
        return self.constant(value, np.float16 if self.types[like] == FLOAT16 else np.float32)

    def known(self, node: onnx.NodeProto, index: int, what: str) -> Any:
        """Return the content of a constant input, or None without that input. Raise :class:`Refused` for another."""
        if len(node.input) <= index or not node.input[index]:
            return None
        if node.input[index] not in self.constants:
            raise Refused(f"{node.op_type} has {what} that are computed, and its parser needs constants")
        return self.constants[node.input[index]]

    def rank(self, name: str) -> int:
        """Return the number of dims of a value."""
        return len(self.shapes[name])

    def check(self, node: onnx.NodeProto) -> None:
        """Raise :class:`Refused` unless the parser reads ``node`` and computes what it means."""
        dtypes = SUPPORTED.get(node.op_type)
        if dtypes is None or node.domain:
            raise Refused(f"{node.op_type} is not among the operators that are written for TensorRT 8.6")
        for i, name in enumerate([*node.input, *node.output]):
            if not name:
                continue
            kind = self.types.get(name, 0)
            letter = TYPES.get(kind)
            if letter is None:
                raise Refused(f"{node.op_type} has {_type_name(kind)} values, which TensorRT 8.6 does not have")
            if len(self.shapes.get(name, ())) > MAX_DIMS:
                raise Refused(
                    f"{node.op_type} has values of more than {MAX_DIMS} dims, which TensorRT 8.6 does not have"
                )
            data = i < min(_BESIDE.get(node.op_type, len(node.input)), len(node.input))
            if data and letter not in dtypes and not (node.op_type == "Where" and i == 0):
                raise Refused(f"TensorRT 8.6 has no {node.op_type} of {_type_name(kind)} values")
            self._check_range(node, i, name)
        for i in _INITIALIZERS.get(node.op_type, ()):
            self.known(node, i, "axes or sizes")

    def _check_range(self, node: onnx.NodeProto, i: int, name: str) -> None:
        """Raise :class:`Refused` for an int64 constant that does not fit into int32, to which it would be clamped."""
        array = self.constants.get(name)
        if array is None or array.dtype != np.int64 or not array.size or i >= len(node.input):
            return
        clamped = node.op_type == "Slice" and i in (1, 2)  # there the largest number means the end
        if not clamped and (array.max() > 2**31 - 1 or array.min() < -(2**31)):
            raise Refused(f"{node.op_type} has an integer beyond 32 bits, which TensorRT 8.6 does not have")

    def result(self) -> onnx.ModelProto:
        """Return the model of the written nodes."""
        from onnx import helper

        used = {name for node in self.nodes for name in node.input}
        model = type(self._model)()
        model.CopyFrom(self._model)
        model.ir_version = IR_VERSION
        del model.opset_import[:]
        model.opset_import.append(helper.make_opsetid("", OPSET))
        del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
        model.graph.node.extend(self.nodes)
        model.graph.initializer.extend(t for name, t in self.initializers.items() if name in used)
        return model


def _type_name(number: int) -> str:
    import onnx

    return str(onnx.TensorProto.DataType.Name(number)).lower() if number else "unknown"
