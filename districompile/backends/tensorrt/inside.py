"""Collectives inside an engine: an ONNX model's cut ends are joined by a layer of TensorRT's.

ONNX has no collective. The compiler writes the exact phase as one model in which what a rank sends is an output and
what it receives an input; here each such pair becomes an all-gather (``IDistCollectiveLayer``, NCCL at run time) and
both vanish from the model's interface. How rows become an all-gather is in :mod:`districompile.ir.inside`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from districompile.backends.tensorrt.library import Library, optional, told
from districompile.errors import BackendError

if TYPE_CHECKING:
    import tensorrt as types


def add_gathers(
    library: Library, network: types.INetworkDefinition, gathers: Sequence[tuple[str, str]], ranks: int
) -> None:
    """Join each (output, input) of ``network`` by an all-gather over ``ranks``, all in one communicator."""
    trt = library.module
    add = optional(network, "add_dist_collective")
    if add is None:
        raise BackendError(
            f"{library.flavour} {library.version} has no collectives inside an engine (tensorrt has from 10.16 on): "
            "leave out --collectives inside"
        )
    outputs = {t.name: t for t in (network.get_output(i) for i in range(network.num_outputs))}
    inputs = {t.name: t for t in (network.get_input(i) for i in range(network.num_inputs))}
    received: dict[str, Any] = {}
    for sent, name in gathers:
        layer = add(outputs[sent], trt.CollectiveOperation.ALL_GATHER, trt.ReduceOperation.NONE, -1, [])
        if layer is None:
            raise BackendError(f"{library.flavour} refuses an all-gather of {sent}: {told(library.log.take())}")
        layer.num_ranks = ranks
        layer.name = f"all_gather {sent}"
        received[name] = layer.get_output(0)
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        for k in range(layer.num_inputs):
            tensor = layer.get_input(k)
            if tensor is not None and tensor.name in received and tensor.is_network_input:
                layer.set_input(k, received[tensor.name])
    for sent, name in gathers:
        network.unmark_output(outputs[sent])
        network.remove_tensor(inputs[name])
