"""Small segments for tests of backends, made from functions of named tensors as the compiler makes its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from districompile.backends.base import Backend
from districompile.bundle.weights import WeightFile
from districompile.ir.segment import SegmentGraph
from districompile.ir.spec import TensorSpec
from districompile.testing import write_weights


def spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tensor.dtype)


def run_segment(
    backend: Backend, segment: SegmentGraph, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """Build, load and run a segment once, with weights and engine where a bundle has them."""
    file = folder / "weights.safetensors"
    opened = WeightFile.open(file) if file.exists() else write_weights(file, weights)
    (folder / "engines").mkdir(exist_ok=True)
    path = folder / "engines" / f"{segment.name}{backend.suffix}"
    assert backend.unsupported_ops(segment) == []
    backend.build(segment, opened, path)
    outputs = tuple(n for n, _ in segment.outputs)
    return backend.load(path, outputs, opened, torch.device("cpu")).run(inputs, outputs)


def run_on_gpu(
    backend: Backend,
    segment: SegmentGraph,
    inputs: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    folder: Path,
    between: Callable[[], object] = lambda: None,
) -> dict[str, Tensor]:
    """Run a segment from a CUDA graph of its engine, as a step does; ``between`` is called after the build."""
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
    """Return the largest difference over the largest value of ``b``."""
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    scale = b.double().abs().max().item() if b.numel() else 0.0
    return (a.double() - b.double()).abs().max().item() / (scale or 1.0) if b.numel() else 0.0
