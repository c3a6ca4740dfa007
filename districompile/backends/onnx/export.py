# SPDX-License-Identifier: Apache-2.0
"""Translate segments to ONNX files, for ONNX Runtime and for every other reader of ONNX.

``torch.onnx.export`` takes a second for any graph and milliseconds for each node. A UNet for eight ranks has hundreds
of graphs with tens of thousands of nodes, nearly all alike. Therefore *kinds of node* are exported: an operator with
its constant arguments and the shapes and dtypes of its tensors. All kinds that a conversion needs and that have no
translation yet go through one call of the exporter, side by side in one graph. The part of the result for each kind is
kept as a template, and the model of a segment is assembled from its nodes' templates by renaming. For an operator that
cannot be exported, the reason is kept.

Weights never enter an ONNX file. They are initializers whose external data is the bundle's weight file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from districompile.backends.base import source_line
from districompile.backends.onnx.proto import OPSET, Composer, Kind, Template, element_type, probe_model, reads
from districompile.backends.onnx.translations import translate_here
from districompile.bundle.weights import WeightFile
from districompile.errors import BackendError
from districompile.ir.operators import decomposition_of, is_foreign, translation_of
from districompile.ir.segment import SegmentGraph
from districompile.ir.serialize import decode, encode, needed, op_name, op_of, output_nodes, spec_of
from districompile.ir.spec import TensorSpec

if TYPE_CHECKING:
    import onnx

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Translator:
    """A translator of segments. It keeps the translations of kinds of node as long as it lives (one conversion)."""

    def __init__(self) -> None:
        self._templates: dict[Kind, Template | str] = {}
        self.exports = 0  # calls of torch.onnx.export

    @property
    def translated(self) -> int:
        """The number of kinds of node that were translated, successfully or not."""
        return len(self._templates)

    def prepare(self, segments: Iterable[SegmentGraph]) -> None:
        """Translate all kinds that the segments need and that have no translation yet."""
        missing: dict[Kind, None] = {}
        for segment in segments:
            for node in needed(segment.graph.graph):
                kind = kind_of(node)
                if isinstance(kind, Kind) and kind not in self._templates:
                    missing[kind] = None
        exported = []
        for kind in missing:
            template = translate_here(kind)
            if template is None:
                exported.append(kind)
            else:
                self._templates[kind] = template
        if exported:
            self._export(exported)

    def template(self, kind: Kind) -> Template | str:
        """Return the translation of a prepared kind, or why there is none."""
        return self._templates[kind]

    def unsupported_ops(self, segment: SegmentGraph) -> list[str]:
        """Return one reason for each operator that has no translation."""
        self.prepare([segment])
        reasons: dict[str, str] = {}
        for node in needed(segment.graph.graph):
            kind = kind_of(node)
            reason = kind if isinstance(kind, str) else self._templates[kind] if kind else None
            if isinstance(reason, str):
                reasons.setdefault(str(node.target), f"{node.target} ({node.name}{source_line(node)}): {reason}")
        return list(reasons.values())

    def model(self, segment: SegmentGraph, weights: WeightFile | None) -> onnx.ModelProto:
        """Build the ONNX model of a segment.

        Inputs, outputs and weights have the segment's names. Nodes are named after the segment's nodes
        (``conv2d_3/Conv_17``). ``weights`` is the file that holds the weights, which become initializers with external
        data in it. With None they are inputs of the model. Raise :class:`BackendError` with the reasons if an operator
        cannot be translated.
        """
        if reasons := self.unsupported_ops(segment):
            raise BackendError(f"segment {segment.name} cannot be written as ONNX: " + "; ".join(reasons))
        composer = Composer()
        operands = (*segment.inputs, *segment.weights)
        placeholders = [n for n in segment.graph.graph.nodes if n.op == "placeholder"]
        names: dict[fx.Node, str] = {node: name for node, (name, _) in zip(placeholders, operands, strict=True)}
        composer.reserve(name for name, _ in (*operands, *segment.outputs))
        for node in needed(segment.graph.graph):
            kind = kind_of(node)
            if kind is None:  # its name was set with the node whose element it is
                continue
            assert isinstance(kind, Kind)
            template = self._templates[kind]
            assert isinstance(template, Template)
            outputs = composer.add(template, [names[n] for n in node.all_input_nodes], node.name)
            if kind.taken is None:
                names[node] = outputs[0]
            else:
                elements = dict(zip(kind.taken, outputs, strict=True))
                names.update((u, elements[_position(u)]) for u in node.users if u.target is operator.getitem)
        results = [names[n] for n in output_nodes(segment.graph.graph)]
        return composer.model(segment, results, weights)

    def _export(self, kinds: Sequence[Kind]) -> None:
        try:
            self.exports += 1
            for kind, template in zip(kinds, _export_together(kinds), strict=True):
                self._templates[kind] = _mistyped(kind, template) or template
        except Exception as e:  # the exporter raises whatever the operator's translation raised
            if len(kinds) == 1:
                self._templates[kinds[0]] = f"no ONNX translation ({_summary(e)}){_advice(kinds[0])}"
                return
            middle = len(kinds) // 2
            self._export(kinds[:middle])
            self._export(kinds[middle:])


def kind_of(node: fx.Node) -> Kind | str | None:
    """Return a node's kind, None for ``getitem`` (which needs no translation), or why it has no kind."""
    if node.op != "call_function":
        return f"a segment holds operators only, not a {node.op}"
    if node.target is operator.getitem:
        return None
    try:
        names = {n: f"%{i}" for i, n in enumerate(node.all_input_nodes)}
        arguments = [[encode(a, names) for a in node.args], {k: encode(v, names) for k, v in node.kwargs.items()}]
        inputs = tuple(spec_of(n) for n in names)
        text, value = json.dumps(arguments, sort_keys=True), node.meta.get("val")
        if not isinstance(value, list | tuple):
            return Kind(op_name(node.target), text, inputs, (spec_of(node),))
        elements = {_position(u): u for u in node.users if u.target is operator.getitem}
        taken = tuple(sorted(elements))
        return Kind(op_name(node.target), text, inputs, tuple(spec_of(elements[i]) for i in taken), taken)
    except (BackendError, TypeError) as e:
        return str(e)


def _position(node: fx.Node) -> int:
    index = node.args[1]
    if not isinstance(index, int) or index < 0:
        raise BackendError(f"{node.name}: getitem takes a plain index from a segment's tuple, not {index}")
    return index


def _export_together(kinds: Sequence[Kind]) -> list[Template]:
    """Translate ``kinds`` by one call of torch's exporter, whose errors of any class are passed on."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    graph = fx.Graph()
    specs: list[TensorSpec] = []
    ends: list[fx.Node] = []
    translations: dict[Callable[..., Any], Callable[..., Any]] = {}
    for kind in kinds:
        values = {}
        for k, spec in enumerate(kind.inputs):
            values[f"%{k}"] = graph.placeholder(f"x{len(specs)}")
            specs.append(spec)
        args, kwargs = json.loads(kind.arguments)
        op = op_of(kind.op)
        if (translation := translation_of(op)) is not None:
            translations[op] = translation
        node = graph.call_function(
            op if translation is not None else decomposition_of(op) or op,
            tuple(decode(a, values) for a in args),
            {k: decode(v, values) for k, v in kwargs.items()},
        )
        ends += [node] if kind.taken is None else [graph.call_function(operator.getitem, (node, i)) for i in kind.taken]
    graph.output(tuple(ends))
    module = fx.GraphModule(torch.nn.Module(), graph)
    with FakeTensorMode(), torch.no_grad():
        example = tuple(torch.empty(spec.shape, dtype=spec.dtype) for spec in specs)
    with _quiet(), torch.no_grad():
        program = torch.export.export(module, example, strict=False)
        onnx_program = torch.onnx.export(
            program, (), dynamo=True, opset_version=OPSET, optimize=True, verify=False, verbose=False,
            custom_translation_table=translations or None,
        )  # fmt: skip
    assert onnx_program is not None
    return _split(onnx_program.model_proto, kinds)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's warnings of missing torchvision operators, shared constants and its own deprecations."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx._internal.exporter._registration", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _mistyped(kind: Kind, template: Template) -> str | None:
    """Return why a template does not fit its kind, or None, according to the type inference of ONNX."""
    from onnx import shape_inference

    # Opset 20 specifies no bfloat16 Conv, but TensorRT has one.
    known = all(spec.dtype != torch.bfloat16 for spec in (*kind.inputs, *kind.outputs))
    try:
        shape_inference.infer_shapes(probe_model([(kind, template)]), check_type=known, strict_mode=True)
    except shape_inference.InferenceError as e:
        return f"its ONNX translation has the wrong type ({_summary(e)})"
    return None


def _split(model: onnx.ModelProto, kinds: Sequence[Kind]) -> list[Template]:
    """Split the exporter's graph into templates: the nodes that each kind's outputs need."""
    if model.functions or any(node.domain for node in model.graph.node):
        raise BackendError("the exporter left functions in the graph")
    producer = {name: (i, node) for i, node in enumerate(model.graph.node) for name in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    inputs = [value.name for value in model.graph.input]
    outputs = [value.name for value in model.graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.output}
    templates = []
    for kind in kinds:
        own_inputs, inputs = inputs[: len(kind.inputs)], inputs[len(kind.inputs) :]
        own_outputs, outputs = outputs[: len(kind.outputs)], outputs[len(kind.outputs) :]
        nodes: dict[int, Any] = {}
        found: dict[str, Any] = {}
        seen = set(own_inputs)
        pending = list(own_outputs)
        while pending:
            name = pending.pop()
            if not name or name in seen:
                continue
            seen.add(name)
            if name in constants:
                found[name] = constants[name]
            elif name in producer:  # else it belongs to a subgraph
                index, node = producer[name]
                nodes[index] = node
                pending += reads(node)
        ordered = [nodes[i] for i in sorted(nodes)]
        if len(ordered) == 1 and ordered[0].op_type == "Identity" and ordered[0].input[0] in own_inputs:
            own_outputs = [ordered.pop().input[0]]
        template = Template(tuple(ordered), tuple(found.values()), tuple(own_inputs), tuple(own_outputs))
        templates.append(_cast_back(template, kind, types))
    return templates


def _cast_back(template: Template, kind: Kind, types: Mapping[str, int]) -> Template:
    """Cast floating-point outputs to the dtypes of ``kind``: the exporter leaves reductions of halves in float32.

    ``types`` has the element type of each output by the exporter's name.
    """
    from onnx import helper

    nodes, outputs = list(template.nodes), []
    for name, spec in zip(template.outputs, kind.outputs, strict=True):
        wanted = element_type(spec.dtype)
        if spec.dtype.is_floating_point and types.get(name, wanted) in {*map(element_type, _FLOATS)} - {wanted}:
            nodes.append(helper.make_node("Cast", [name], [name := f"{name}_as_{wanted}"], to=wanted))
        outputs.append(name)
    return dataclasses.replace(template, nodes=tuple(nodes), outputs=tuple(outputs))


def _advice(kind: Kind) -> str:
    """Return advice for the author of an operator of another package, or ``""`` for any other operator."""
    if not is_foreign(op_of(kind.op)):
        return ""
    return ": register districompile.extend.decomposition or onnx_translation for it, or use the backend eager"


def _summary(e: BaseException) -> str:
    """Return the innermost cause in one line."""
    while e.__cause__ is not None:
        e = e.__cause__
    text = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
    return text if len(text) < 200 else text[:200] + "..."
