# SPDX-License-Identifier: Apache-2.0
"""TensorRT 8.6: everything in which its library differs from the versions from 10.1 on.

- Its ONNX parser reads opset 17 (:mod:`districompile.backends.onnx.opset17`), and takes constants as the weights of
  convolutions. Engines therefore store their weights, and cannot be refitted from ours.
- Networks have no types: where the flag FP16 is set, the builder may compute anything in float16, and fused regions do
  so against the precision that is set for a layer (decision 56). Models with float16 are therefore widened to float32,
  and multiply in TF32.
- There is no int64. Such inputs and outputs are int32 in the engine, and copied by it.
- No tactic of cuBLAS or cuDNN is allowed: the versions that it wants are older than those of PyTorch.
- It runs on GPUs up to Hopper. A builder or a runtime without a GPU ends the process, so that none is made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from districompile.backends.onnx import widened
from districompile.backends.onnx.opset17 import to_opset17
from districompile.errors import BackendError

NEWEST_GPU = 90
DTYPES = frozenset({torch.float32, torch.float16, torch.int64, torch.int32, torch.bool})
"""The dtypes of inputs, weights and outputs."""

IMPORT_HINTS = ("libcublas.so.12", "libcublasLt.so.12", "libcudnn.so.8")
IMPORT_HELP = "pip install nvidia-cublas-cu12 'nvidia-cudnn-cu12<9', which TensorRT 8.6 loads and never calls"


NOTE = (
    "TensorRT 8.6 computes models in float16 in float32, with TF32 for products: it would not keep statistics of norms "
    "in float32. That is slower, and engines store their weights in float32 (docs/tensorrt.md)"
)


def legalised(model: Any) -> Any:
    """Rewrite an ONNX model for the parser. Raises :class:`BackendError` with each node that cannot be."""
    new, reasons = to_opset17(model)
    if reasons:
        listed = "; ".join(f"{node}: {reason}" for node, reason in reasons.items())
        raise BackendError(f"the ONNX file cannot be written for TensorRT 8.6: {listed}")
    return new


def unsupported(model: Any) -> str | None:
    """Return the first reason why the parser does not take an ONNX model, or None."""
    _, reasons = to_opset17(model)
    return next(iter(reasons.values()), None)


def has_half(onnx: Path) -> bool:
    """Return whether an ONNX file has float16 values, and so has to be widened."""
    import onnx as library

    return widened.has_half(library.load(str(onnx), load_external_data=False))


def write_widened(onnx: Path, weights: Path, target: Path) -> frozenset[str]:
    """Write a model widened to float32, with its weights beside it. Return the names of float16 inputs and outputs."""
    import onnx as library

    model, narrow = widened.widened(library.load(str(onnx), load_external_data=False), weights.parent)
    library.save_model(
        model, str(target), save_as_external_data=True, location="weights.bin", size_threshold=1024,
        convert_attribute=False,
    )  # fmt: skip
    return narrow


def create_network(trt: Any, builder: Any) -> Any:
    """Create a network whose tensors have all dims."""
    return builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))


def configure(trt: Any, config: Any, network: Any, narrow: frozenset[str] | None) -> None:
    """Leave out the tactics of other libraries, and set up a network that was widened to float32.

    ``narrow`` are its float16 inputs and outputs, or None for a network that was float32 before.
    """
    ours = (trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS)
    if not config.set_tactic_sources(sum(1 << int(source) for source in ours)):
        raise BackendError("TensorRT 8.6 does not do without the tactics of cuBLAS and cuDNN")
    if narrow is None:
        return
    config.set_flag(trt.BuilderFlag.TF32)  # as many digits as float16
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    for tensor in (*inputs, *(network.get_output(i) for i in range(network.num_outputs))):
        if tensor.name in narrow:
            tensor.dtype = trt.DataType.HALF


def describe_parser_error(error: Any, onnx: Path) -> str:
    """Format an error of the parser, which gives the number of a node and not its name."""
    import onnx as library

    nodes = library.load(str(onnx), load_external_data=False).graph.node
    node = nodes[error.node()] if 0 <= error.node() < len(nodes) else None
    return f"{node.name}: {error.desc()} ({node.op_type})" if node is not None else str(error.desc())


def create_context(engine: Any) -> Any:
    """Create a context without activation memory."""
    return engine.create_execution_context_without_device_memory()


def set_scratch(context: Any, address: int) -> None:
    """Use the memory at ``address`` for activations."""
    context.device_memory = address


def wide_integers(onnx: Path) -> frozenset[str]:
    """Return the inputs and outputs that are int64 in the ONNX file of an engine, and int32 in the engine."""
    import onnx as library

    graph = library.load(str(onnx), load_external_data=False).graph
    ends = (*graph.input, *graph.output)
    return frozenset(v.name for v in ends if v.type.tensor_type.elem_type == library.TensorProto.INT64)
