"""A backend: it stores a segment's graph as JSON and interprets it, freeing each value after its last use."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, fx

from districompile.extend import (
    Backend,
    BackendError,
    Engine,
    SegmentGraph,
    TensorSpec,
    WeightFile,
    check_input,
    graph_from_json,
    graph_to_json,
    needed_nodes,
    op_name,
    source_line,
)


class InterpreterEngine(Engine):
    """A graph, its weights and what was bound."""

    def __init__(self, graph: fx.GraphModule, inputs: dict[str, TensorSpec], weights: list[Tensor], outputs: list[str]):
        self._interpreter = fx.Interpreter(graph, garbage_collect_values=True)
        self._weights = weights
        self._outputs = outputs
        self._bound: dict[str, Tensor] = {}
        self._results: dict[str, Tensor] = {}
        self.input_specs = inputs

    def bind(self, name: str, tensor: Tensor) -> None:
        check_input(name, tensor, self.input_specs)
        self._bound[name] = tensor

    @torch.no_grad()
    def enqueue(self) -> None:
        inputs = [self._bound.pop(name) for name in self.input_specs]
        self._results = dict(zip(self._outputs, self._interpreter.run(*inputs, *self._weights), strict=True))

    def output(self, name: str) -> Tensor:
        return self._results[name]

    def release(self) -> None:
        self._results = {}


class InterpreterBackend(Backend):
    """Interpret segments with torch.fx, on any device. Loading runs no code of the bundle."""

    name = "interpreter"
    suffix = ".interpreter.json"
    version = "1"
    native_code = False

    def unsupported_ops(self, segment: SegmentGraph) -> list[str]:
        reasons = {}
        for node in needed_nodes(segment.graph.graph):
            try:
                op_name(node.target)
            except BackendError as e:
                reasons[str(node.target)] = f"{node.name}{source_line(node)}: {e}"
        return list(reasons.values())

    def build(self, segment: SegmentGraph, weights: WeightFile, path: Path) -> None:
        names = [[name for name, _ in group] for group in (segment.inputs, segment.weights, segment.outputs)]
        path.write_text(json.dumps([*names, graph_to_json(segment.graph)]))

    def load(self, path: Path, segment: tuple[str, ...], weights: WeightFile, device: torch.device) -> Engine:
        try:
            inputs, weight_names, outputs, text = json.loads(path.read_text())
            graph = graph_from_json(text, device)
        except (OSError, ValueError, TypeError) as e:
            raise BackendError(f"{path} is not a segment: {e}") from e
        if tuple(outputs) != tuple(segment):
            raise BackendError(f"{path} is another segment: it gives {outputs}, not {segment}")
        given = [n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder"]
        specs = {n: TensorSpec(tuple(v.shape), v.dtype) for n, v in zip(inputs, given, strict=False)}
        return InterpreterEngine(graph, specs, [weights.tensor(n, device) for n in weight_names], outputs)
