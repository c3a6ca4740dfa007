# SPDX-License-Identifier: Apache-2.0
"""TensorRT 8.6: everything in which its library differs from the versions from 10.1 on.

- Its ONNX parser reads opset 17 (:mod:`districompile.backends.onnx.opset17`), and takes constants as the weights of
  convolutions. Engines therefore store their weights, and cannot be refitted from ours.
- Networks have no types: the builder may compute in float16 wherever the flag FP16 is set. Values that the model has
  in float32 are pinned to it. A network that cannot be built so is widened to float32.
- There is no int64. Such inputs and outputs are int32 in the engine, and copied by it.
- No tactic of cuBLAS or cuDNN is allowed: the versions that it wants are older than those of PyTorch.
- It runs on GPUs up to Hopper. A builder or a runtime without a GPU ends the process, so that none is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from districompile.backends.onnx.opset17 import to_opset17
from districompile.backends.onnx.widened import widened
from districompile.errors import BackendError

NEWEST_GPU = 90
DTYPES = frozenset({torch.float32, torch.float16, torch.int64, torch.int32, torch.bool})
"""The dtypes of inputs, weights and outputs."""

IMPORT_HINTS = ("libcublas.so.12", "libcublasLt.so.12", "libcudnn.so.8")
IMPORT_HELP = "pip install nvidia-cublas-cu12 'nvidia-cudnn-cu12<9', which TensorRT 8.6 loads and never calls"


Precision = Literal["of the model", "float32"]
"""What an engine computes in: the dtypes of the model, or float32 throughout, with TF32 for products."""


def attempts(cached: bool) -> Iterator[tuple[bool, Precision]]:
    """Yield ways to build an engine: whether the timing cache is used, and what it computes in.

    Each is tried where the one before failed. Seen on H200s, in float16: the library could not read back what it had
    kept for its fused regions ("myelinCache.h deserializeFromBuffer"); and a region had a float32 value in float16
    ("verify_output_type"), which is refused and not computed. In float32 there is nothing to mistake.
    """
    if cached:
        yield True, "of the model"
    yield False, "of the model"
    yield False, "float32"


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


def write_widened(onnx: Path, weights: Path, target: Path) -> frozenset[str]:
    """Write a model widened to float32, with its weights beside it. Return the names of float16 inputs and outputs."""
    import onnx as library

    model, narrow = widened(library.load(str(onnx), load_external_data=False), weights.parent)
    library.save_model(
        model, str(target), save_as_external_data=True, location="weights.bin", size_threshold=1024,
        convert_attribute=False,
    )  # fmt: skip
    return narrow


def create_network(trt: Any, builder: Any) -> Any:
    """Create a network whose tensors have all dims."""
    return builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))


def configure(trt: Any, config: Any, network: Any, narrow: frozenset[str] | None) -> None:
    """Set the precision for a parsed network, and leave out the tactics of other libraries.

    ``narrow`` are the float16 inputs and outputs of a network that was widened to float32, else None.
    """
    ours = (trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS)
    if not config.set_tactic_sources(sum(1 << int(source) for source in ours)):
        raise BackendError("TensorRT 8.6 does not do without the tactics of cuBLAS and cuDNN")
    if narrow is not None:
        config.set_flag(trt.BuilderFlag.TF32)  # as many digits as float16
        for tensor in (*_inputs(network), *_outputs(network)):
            if tensor.name in narrow:
                tensor.dtype = trt.DataType.HALF
        return
    if not _has_half(trt, network):
        return
    config.set_flag(trt.BuilderFlag.FP16)
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    fixed = (trt.LayerType.CONSTANT, trt.LayerType.SHAPE, trt.LayerType.CAST)  # their types are given
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        made = [layer.get_output(k) for k in range(layer.num_outputs)]
        if layer.type in fixed or any(tensor.dtype != trt.DataType.FLOAT for tensor in made):
            continue
        # A fused region may ignore the precision of a reshape, and then fails by itself. It computes nothing anyway
        if layer.type != trt.LayerType.SHUFFLE:
            layer.precision = trt.DataType.FLOAT
        for k in range(layer.num_outputs):
            layer.set_output_type(k, trt.DataType.FLOAT)


def _inputs(network: Any) -> list[Any]:
    return [network.get_input(i) for i in range(network.num_inputs)]


def _outputs(network: Any) -> list[Any]:
    return [network.get_output(i) for i in range(network.num_outputs)]


def _has_half(trt: Any, network: Any) -> bool:
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    made = [layer.get_output(k) for layer in layers for k in range(layer.num_outputs)]
    return any(tensor.dtype == trt.DataType.HALF for tensor in (*_inputs(network), *made))


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
