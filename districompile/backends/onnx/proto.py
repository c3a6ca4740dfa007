# SPDX-License-Identifier: Apache-2.0
"""Assemble ONNX graphs from templates, with weights that stay in the bundle's weight file."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx

from districompile.bundle.weights import WeightFile
from districompile.errors import BackendError
from districompile.ir.segment import SegmentGraph
from districompile.ir.spec import TensorSpec

if TYPE_CHECKING:
    import onnx

WEIGHT = "weight:"
"""The prefix of the names of a model's inputs that are weights of the bundle."""

OPSET = 20
"""The opset that TensorRT 10's parser and ONNX Runtime both read in full, and the first with a single ``Gelu``."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of node: all that the translation of a node depends on.

    ``arguments`` is JSON text of its arguments, with tensors as ``"%0"``, ``"%1"``, ... ``taken`` are the elements of a
    tuple that are used (None: the node is one tensor).
    """

    op: str
    arguments: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    taken: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Template:
    """A template: ONNX nodes with names of their own.

    In a graph, its names take the place of ``inputs`` and ``outputs``, and other names are made unique. An output may
    also be an input or a constant.
    """

    nodes: tuple[onnx.NodeProto, ...]
    constants: tuple[onnx.TensorProto, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def probe_model(templates: Sequence[tuple[Kind, Template]]) -> onnx.ModelProto:
    """Build a model of templates side by side, each with its own inputs and outputs, as a test of a runtime."""
    composer = Composer()
    inputs: list[tuple[str, TensorSpec]] = []
    outputs: list[tuple[str, TensorSpec]] = []
    results: list[str] = []
    for i, (kind, template) in enumerate(templates):
        own = [(f"x{i}_{k}", spec) for k, spec in enumerate(kind.inputs)]
        results += composer.add(template, [name for name, _ in own])
        inputs += own
        outputs += [(f"y{i}_{k}", spec) for k, spec in enumerate(kind.outputs)]
    graph = fx.GraphModule(torch.nn.Module(), fx.Graph())
    segment = SegmentGraph("probe", graph, tuple(inputs), (), tuple(outputs))
    return composer.model(segment, results, None)


class Composer:
    """A builder of one graph from templates."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._made: set[str] = set()  # names of the outputs of this graph's nodes
        self._prefix = ""

    def reserve(self, names: Iterable[str]) -> None:
        """Exclude ``names``, which come from outside, from the names of nodes and constants."""
        taken = tuple(names)
        while any(n.startswith((f"{self._prefix}n", f"{self._prefix}const_")) for n in taken):
            self._prefix += "_"

    def add(self, template: Template, operands: Sequence[str], label: str = "") -> tuple[str, ...]:
        """Instantiate ``template``, and return the names of its outputs.

        Runtimes name its nodes by ``label`` in their messages.
        """
        names = dict(zip(template.inputs, operands, strict=True))
        for constant in template.constants:
            names[constant.name] = self._constant(constant)
        prefix = f"{self._prefix}n{len(self._nodes)}_"
        for node in template.nodes:
            copy = _renamed(node, names, prefix)
            if label:
                copy.name = f"{label}/{node.op_type}_{len(self._nodes)}"
            self._nodes.append(copy)
            self._made.update(copy.output)
        return tuple(names[o] for o in template.outputs)

    def _constant(self, tensor: onnx.TensorProto) -> str:
        content = type(tensor)()
        content.CopyFrom(tensor)
        content.ClearField("name")
        digest = hashlib.sha256(content.SerializeToString(deterministic=True)).hexdigest()[:16]
        name = content.name = f"{self._prefix}const_{digest}"
        self._constants.setdefault(name, content)
        return name

    def model(self, segment: SegmentGraph, results: Sequence[str], weights: WeightFile | None) -> onnx.ModelProto:
        """Return the complete model. If ``weights`` is None, weights are inputs, after the segment's own."""
        from onnx import checker, helper

        final: dict[str, str] = {}
        for (name, _), result in zip(segment.outputs, results, strict=True):
            if result in self._made and result not in final:
                final[result] = name
            else:  # an input, a weight, a constant, or the same value once more
                label = f"output {name}/Identity_{len(self._nodes)}"
                self._nodes.append(helper.make_node("Identity", [result], [name], name=label))
        for node in self._nodes:
            _rename(node, final)
        used = {name for node in self._nodes for name in reads(node)}
        initializers = [t for name, t in self._constants.items() if name in used]
        given = {name: spec for name, spec in dict(segment.weights).items() if name in used}
        graph = helper.make_graph(
            self._nodes,
            "segment",  # not the segment's name, so that equal segments are equal files
            [_value_info(name, spec) for name, spec in (*segment.inputs, *given.items())],
            [_value_info(name, spec) for name, spec in segment.outputs],
            initializers,
        )
        imports = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=10, producer_name="districompile")
        checker.check_model(model)  # before weights are external: it would look for their file beside the model
        if weights is not None:
            del model.graph.input[len(segment.inputs) :]
            model.graph.initializer.extend(_external(name, spec, weights) for name, spec in given.items())
        return model


def _renamed(node: onnx.NodeProto, names: dict[str, str], prefix: str) -> onnx.NodeProto:
    """Copy ``node`` under new names, and add one for each value without. Subgraphs also have the names around them."""
    copy = type(node)()
    copy.CopyFrom(node)
    copy.ClearField("name")
    for i, name in enumerate(copy.input):
        if name:
            copy.input[i] = names[name]
    for i, name in enumerate(copy.output):
        if name:
            copy.output[i] = names.setdefault(name, prefix + name)
    for attribute in copy.attribute:
        if attribute.HasField("g"):
            inner = dict(names)
            for initializer in attribute.g.initializer:
                initializer.name = inner.setdefault(initializer.name, prefix + initializer.name)
            for value in attribute.g.input:
                value.name = inner.setdefault(value.name, prefix + value.name)
            nodes = [_renamed(n, inner, prefix) for n in attribute.g.node]
            del attribute.g.node[:], attribute.g.value_info[:]
            attribute.g.node.extend(nodes)
            for value in attribute.g.output:
                value.name = inner[value.name]
    return copy


def _rename(node: onnx.NodeProto, names: dict[str, str]) -> None:
    for i, name in enumerate(node.input):
        if name in names:
            node.input[i] = names[name]
    for i, name in enumerate(node.output):
        if name in names:
            node.output[i] = names[name]
    for attribute in node.attribute:
        for inner in attribute.g.node:
            _rename(inner, names)


def reads(node: onnx.NodeProto) -> set[str]:
    """Return the names of the values that a node reads, in subgraphs, too."""
    found = set(node.input)
    for attribute in node.attribute:
        for inner in attribute.g.node:
            found |= reads(inner)
        found.update(o.name for o in attribute.g.output)
    return found


def element_type(dtype: torch.dtype) -> int:
    """Return the number of a dtype in ONNX."""
    import onnx_ir

    return int(onnx_ir.DataType[_ELEMENTS[dtype]])


_ELEMENTS = {
    torch.float64: "DOUBLE", torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16",
    torch.int64: "INT64", torch.int32: "INT32", torch.int16: "INT16", torch.int8: "INT8", torch.uint8: "UINT8",
    torch.bool: "BOOL", torch.complex64: "COMPLEX64",
    torch.float8_e4m3fn: "FLOAT8E4M3FN", torch.float8_e5m2: "FLOAT8E5M2",
}  # fmt: skip


def _value_info(name: str, spec: TensorSpec) -> onnx.ValueInfoProto:
    from onnx import helper

    return helper.make_tensor_value_info(name, element_type(spec.dtype), spec.shape)


def _external(name: str, spec: TensorSpec, weights: WeightFile) -> onnx.TensorProto:
    import onnx

    if weights.spec(name) != spec:
        raise BackendError(f"the weight {name!r} is {weights.spec(name)} in {weights.path}, but {spec} was converted")
    offset, length = weights.location(name)
    tensor = onnx.TensorProto(name=name, data_type=element_type(spec.dtype), dims=spec.shape)
    if not length:
        tensor.raw_data = b""
        return tensor
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", weights.path.name), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor
