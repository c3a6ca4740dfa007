# SPDX-License-Identifier: Apache-2.0
"""The reference backend: it stores a segment's graph as JSON, which PyTorch runs operator by operator."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

from districompile.backends.base import Backend, Engine, check_input, source_line
from districompile.bundle.weights import WeightFile
from districompile.errors import BackendError
from districompile.ir.check_graph import output_specs
from districompile.ir.segment import SegmentGraph
from districompile.ir.serialize import canonical, content_hash, graph_from_json, graph_to_json, needed, op_name, spec_of
from districompile.ir.spec import TensorSpec

_FORMAT = "districompile segment 1"


class EagerEngine(Engine):
    """A graph module with its weights.

    An output that is not bound is fresh memory at each call, or a view of an input where the graph returns one. A bound
    output is copied into its memory.
    """

    binds_outputs = True

    def __init__(
        self, module: fx.GraphModule, inputs: dict[str, TensorSpec], weights: list[Tensor], outputs: tuple[str, ...],
        path: Path | None = None,
    ) -> None:  # fmt: skip
        """Create an engine. A failure of a graph from the file ``path`` is an error of the bundle."""
        self.module = module
        self._path = path
        self._inputs = self.input_specs = inputs
        self._weights = weights
        self._outputs = outputs
        self._bound: dict[str, Tensor] = {}
        self._results: dict[str, Tensor] = {}

    def bind(self, name: str, tensor: Tensor) -> None:
        if name not in self._outputs:  # the file has no sizes of outputs: they are checked against results
            check_input(name, tensor, self._inputs)
        self._bound[name] = tensor

    @torch.no_grad()
    def enqueue(self) -> None:
        # not inference mode, whose tensors the caller's own code could not write in place afterwards
        self._results = {}
        inputs = [self._bound.pop(name) for name in self._inputs]
        self._results = dict(zip(self._outputs, self._compute(inputs), strict=True))
        bound, self._bound = self._bound, {}
        for name, memory in bound.items():
            result = self._results[name]
            check_input(name, memory, {name: TensorSpec(tuple(result.shape), result.dtype)})
            self._results[name] = memory.copy_(result)

    def _compute(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        try:
            results: Sequence[Tensor] = self.module(*inputs, *self._weights)
        except Exception as e:
            if self._path is None:
                raise
            reason = str(e).strip().partition("\n")[0]
            raise BackendError(f"{self._path} cannot be computed: {reason}: convert again") from e
        return results

    def output(self, name: str) -> Tensor:
        return self._results[name]

    def release(self) -> None:
        self._results = {}


class EagerBackend(Backend):
    """A backend that compiles nothing, and runs on any device of PyTorch."""

    name = "eager"
    suffix = ".graph.json"
    version = "1"
    native_code = False
    reads_weights = True

    def unsupported_ops(self, segment: SegmentGraph) -> list[str]:
        reasons: dict[str, str] = {}
        for node in needed(segment.graph.graph):
            try:
                op_name(node.target)
            except BackendError as e:
                reasons.setdefault(str(node.target), f"{node.name}{source_line(node)}: {e}")
        return list(reasons.values())

    def build(self, segment: SegmentGraph, weights: WeightFile, path: Path) -> None:
        data = {
            "format": _FORMAT,
            "inputs": [name for name, _ in segment.inputs],
            "weights": [name for name, _ in segment.weights],
            "outputs": [name for name, _ in segment.outputs],
            "graph": json.loads(graph_to_json(segment.graph)),
        }
        path.write_text(json.dumps(data, separators=(",", ":")))

    def load(self, path: Path, segment: tuple[str, ...], weights: WeightFile, device: torch.device) -> EagerEngine:
        try:
            data = json.loads(path.read_text())
            version = data["format"]
            names = [*data["inputs"], *data["weights"]]
            outputs = tuple(data["outputs"])
            if not all(isinstance(n, str) for n in (*names, *outputs)):
                raise TypeError("a name is no text")
            module = graph_from_json(json.dumps(data["graph"]), device)
            specs = output_specs(module, device)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            raise BackendError(f"{path} is not a segment: {type(e).__name__} {e}") from e
        except BackendError as e:
            raise BackendError(f"{path}: {e}") from e
        if version != _FORMAT:
            raise BackendError(f"{path} is of another version: {version!r}, not {_FORMAT!r}")
        placeholders = [spec_of(n) for n in module.graph.nodes if n.op == "placeholder"]
        fits = outputs == tuple(segment) and len(placeholders) == len(set(names)) == len(names)
        if not fits or len(specs) != len(outputs):
            raise BackendError(f"{path} is another segment: it gives {outputs}, not {tuple(segment)}")
        count = len(data["inputs"])
        for name, spec in zip(names[count:], placeholders[count:], strict=True):
            if weights.spec(name) != spec:
                raise BackendError(f"{path} needs the weight {name!r} as {spec}, not as {weights.spec(name)}")
        inputs = dict(zip(names[:count], placeholders[:count], strict=True))
        engine = EagerEngine(module, inputs, [weights.tensor(n, device) for n in names[count:]], outputs, path)
        engine.output_specs = dict(zip(outputs, specs, strict=True))
        return engine

    def content_name(self, path: Path) -> str:
        """Return the name that :func:`districompile.backends.build.segment_hash` has for the content of ``path``."""
        try:
            data = json.loads(path.read_text())
            names = [data["inputs"], data["weights"], data["outputs"]]
            return content_hash(json.dumps([self.name, self.version, names, canonical(data["graph"]), []]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            raise BackendError(f"{path} is not a segment: {type(e).__name__} {e}") from e
