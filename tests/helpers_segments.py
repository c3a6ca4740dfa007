"""Small segments for backend tests: a function over named tensors becomes what the compiler would hand to a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from districompile.backends.base import Backend, BuildSegment
from districompile.ir.plan import TensorSpec
from districompile.weights import WeightFile


def spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tensor.dtype)


class _Function(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        result = self.function(*args)
        return tuple(result) if isinstance(result, tuple | list) else (result,)


def make_segment(
    function: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    weights: Mapping[str, Tensor] = {},
    name: str = "segment",
) -> BuildSegment:
    """``function(*inputs, *weights)`` -> tensor or tuple of tensors, as a segment with outputs ``y0``, ``y1``, ..."""
    with torch.no_grad():
        program = torch.export.export(_Function(function), (*inputs.values(), *weights.values()), strict=False)
        program = program.run_decompositions({})
    graph = program.graph_module
    returned = next(n for n in reversed(graph.graph.nodes) if n.op == "output").args[0]
    return BuildSegment(
        name,
        graph,
        tuple((n, spec(t)) for n, t in inputs.items()),
        tuple((n, spec(t)) for n, t in weights.items()),
        tuple((f"y{i}", spec(n.meta["val"])) for i, n in enumerate(returned)),
    )


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> WeightFile:
    WeightFile.write(path, [(n, spec(t), partial(tensors.__getitem__, n)) for n, t in tensors.items()])
    return WeightFile.open(path)


def run_segment(
    backend: Backend, segment: BuildSegment, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """Build, load and run once, with weights and engine where a bundle has them."""
    file = folder / "weights.safetensors"
    opened = WeightFile.open(file) if file.exists() else write_weights(file, weights)
    (folder / "engines").mkdir(exist_ok=True)
    path = folder / "engines" / f"{segment.name}{backend.suffix}"
    assert backend.refuses(segment) == []
    backend.build(segment, opened, path)
    outputs = tuple(n for n, _ in segment.outputs)
    return backend.load(path, outputs, opened, torch.device("cpu")).run(inputs, outputs)


def run_on_gpu(
    backend: Backend,
    segment: BuildSegment,
    inputs: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    folder: Path,
    between: Callable[[], object] = lambda: None,
) -> dict[str, Tensor]:
    """The same from a CUDA graph of the engine, as a step has it; ``between`` is called when it is built."""
    opened = write_weights(folder / "weights.safetensors", {n: w.cpu() for n, w in weights.items()})
    path = folder / f"{segment.name}{backend.suffix}"
    backend.build(segment, opened, path)
    between()
    outputs = tuple(n for n, _ in segment.outputs)
    engine: Any = backend.load(path, outputs, opened, torch.device("cuda", 0))
    given = {n: x.clone() for n, x in inputs.items()}
    engine.run(given, outputs)  # loads the kernels
    for name, x in {n: x.clone() for n, x in inputs.items()}.items():
        engine.bind(name, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine.enqueue()
    graph.replay()
    torch.cuda.synchronize()
    return {n: engine.output(n).clone() for n in outputs}


def error(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value."""
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    scale = b.double().abs().max().item() if b.numel() else 0.0
    return (a.double() - b.double()).abs().max().item() / (scale or 1.0) if b.numel() else 0.0
