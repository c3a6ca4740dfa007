# SPDX-License-Identifier: Apache-2.0
"""Rewrite a model so that every float in it is float32."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

FLOAT, FLOAT16 = 1, 10  # onnx.TensorProto.DataType


def widened(model: onnx.ModelProto, folder: Path) -> tuple[onnx.ModelProto, frozenset[str]]:
    """Rewrite a model without subgraphs, whose external data lies in ``folder``, for float32.

    Weights and constants are converted, and stored in the model. Casts to float16 become casts to float32. Return the
    new model, and the names of the inputs and outputs that were float16. ``model`` is left as it is.
    """
    new = type(model)()
    new.CopyFrom(model)
    del new.graph.value_info[:]
    narrow: set[str] = set()
    for value in (*new.graph.input, *new.graph.output):
        if value.type.tensor_type.elem_type == FLOAT16:
            value.type.tensor_type.elem_type = FLOAT
            narrow.add(value.name)
    for tensor in new.graph.initializer:
        _widen(tensor, folder)
    for node in new.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == FLOAT16:
                attribute.i = FLOAT
            elif attribute.HasField("t"):
                _widen(attribute.t, folder)
    return new, frozenset(narrow)


def has_half(model: onnx.ModelProto) -> bool:
    """Return whether a model without subgraphs has a float16 value."""
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    if any(value.type.tensor_type.elem_type == FLOAT16 for value in values):
        return True
    if any(tensor.data_type == FLOAT16 for tensor in graph.initializer):
        return True
    attributes = [(node.op_type, attribute) for node in graph.node for attribute in node.attribute]
    return any(
        (op == "Cast" and a.name == "to" and a.i == FLOAT16) or (a.HasField("t") and a.t.data_type == FLOAT16)
        for op, a in attributes
    )


def _widen(tensor: onnx.TensorProto, folder: Path) -> None:
    from onnx import numpy_helper

    if tensor.data_type != FLOAT16:
        return
    array: Any = numpy_helper.to_array(tensor, base_dir=str(folder))
    tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))
