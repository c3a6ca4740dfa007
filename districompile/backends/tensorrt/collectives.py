# SPDX-License-Identifier: Apache-2.0
"""Insert collectives into a TensorRT network, in place of pairs of an output and an input, and see that they stay.

ONNX has no collectives. The compiler writes the exact phase as one model, in which sent values are outputs and received
values are inputs. Here each pair becomes a collective (``IDistCollectiveLayer``; NCCL at run time), and both disappear
from the interface of the model. :mod:`districompile.plan.experimental.joined` turns transfers of rows into collectives.

Known of TensorRT 11 (github.com/pytorch/TensorRT, issue 4381 and pull request 4388):

- A collective may be fused with the pointwise operators around it, and the build then fails. A conversion of the dtype
  before and after it is a border that nothing is fused across. One to the same dtype is removed.
- A context may refuse a communicator ("not a multi-device engine"). Collectives then do nothing, without an error.

So values of half precision travel as float32, and a built engine is searched for each of its collectives by name. There
is no such conversion of float32 without loss: float32 collectives have no fence.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from districompile.backends.tensorrt.library import Library, format_errors, optional
from districompile.errors import BackendError
from districompile.ir.segment import InnerCollective

if TYPE_CHECKING:
    import tensorrt as types

_OPERATIONS = {"all_gather": "ALL_GATHER", "all_to_all": "ALL_TO_ALL"}
_WAY_OUT = "leave out --collectives inside"


def add_collectives(
    library: Library, network: types.INetworkDefinition, collectives: Sequence[InnerCollective]
) -> None:
    """Connect each output and input of ``network`` by its collective, all in one communicator.

    Raises :class:`BackendError` if the library has no collectives or refuses one.
    """
    trt = library.module
    add = optional(network, "add_dist_collective")
    if add is None:
        raise BackendError(
            f"{library.flavour} {library.version} has no collectives inside an engine (tensorrt has from 10.16 on): "
            + _WAY_OUT
        )
    outputs = {t.name: t for t in (network.get_output(i) for i in range(network.num_outputs))}
    inputs = {t.name: t for t in (network.get_input(i) for i in range(network.num_inputs))}
    received: dict[str, Any] = {}
    for c in collectives:
        given, kind = outputs[c.sent], outputs[c.sent].dtype
        fenced = library.flavour == "tensorrt" and kind in (trt.DataType.HALF, trt.DataType.BF16)
        if fenced:
            given = network.add_cast(given, trt.DataType.FLOAT).get_output(0)
        operation = getattr(trt.CollectiveOperation, _OPERATIONS[c.op])
        layer = add(given, operation, trt.ReduceOperation.NONE, -1, [])
        if layer is None:
            raise BackendError(
                f"{library.flavour} refuses an {c.op} of {c.sent}: {format_errors(library.log.take())}: {_WAY_OUT}"
            )
        layer.num_ranks = c.ranks  # before the output is asked for: its shape depends on it
        layer.name = layer_name(c)
        result = layer.get_output(0)
        received[c.received] = network.add_cast(result, kind).get_output(0) if fenced else result
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        for k in range(layer.num_inputs):
            tensor = layer.get_input(k)
            if tensor is not None and tensor.name in received and tensor.is_network_input:
                layer.set_input(k, received[tensor.name])
    for c in collectives:
        network.unmark_output(outputs[c.sent])
        network.remove_tensor(inputs[c.received])


def layer_name(c: InnerCollective) -> str:
    """Return the name of the layer of a collective: no other name of the engine contains it."""
    return f"{c.op}({c.sent})"


def check_collectives(library: Library, plan: Any, collectives: Sequence[InnerCollective], onnx: str) -> None:
    """Raise :class:`BackendError` unless the built engine ``plan`` has every collective.

    The engine inspector lists the layers of a loaded engine by the names that they were given, also within a fused one
    (it needs detailed profiling verbosity for that). ``tensorrt_rtx`` cannot load an engine without a GPU. Its engine
    files hold the program as text, in which a collective is ``comm_allgather={ name="..."``: what was removed is not
    there (seen with version 1.7.1).
    """
    names = [layer_name(c) for c in collectives]
    if library.ahead_of_time:
        data = bytes(memoryview(plan))
        missing = [name for name in names if f'"{name}"'.encode() not in data]
    else:
        trt = library.module
        engine = cast("types.ICudaEngine | None", trt.Runtime(library.log).deserialize_cuda_engine(plan))
        if engine is None:
            raise BackendError(
                f"{library.flavour} cannot load what it built of {onnx} to see whether its collectives are there: "
                + format_errors(library.log.take())
            )
        text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        missing = [name for name in names if name not in text]
    if missing:
        raise BackendError(
            f"{library.flavour} {library.version} built an engine of {onnx} without {len(missing)} of its {len(names)} "
            f"collectives, or hid them in other layers ({', '.join(missing[:3])}). Its results would be wrong: "
            + _WAY_OUT
        )


def nccl_missing(library: Library) -> str | None:
    """Say why the library would not find NCCL in this process, and what helps; None if it would.

    TensorRT 10.16 opens ``libnccl.so``, a name that PyTorch's packages do not install. TensorRT 11 opens
    ``libnccl.so.2`` first. The folders of ``LD_LIBRARY_PATH`` are those from when the process was started.
    """
    names = ("libnccl.so",) if library.flavour == "tensorrt" and library.numbers[0] == 10 else _NCCL
    for name in names:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return None
    helps = (
        "D=$(mktemp -d) && ln -s \"$(python -c 'import nvidia.nccl as n; print(n.__path__[0])')/lib/libnccl.so.2\" "
        f"$D/{names[0]} && export LD_LIBRARY_PATH=$D:$LD_LIBRARY_PATH"
    )
    return (
        f"{library.flavour} {library.version} opens {names[0]} for its collectives, and it is not on the library path. "
        f"Before the process is started: {helps}"
    )


_NCCL = ("libnccl.so.2", "libnccl.so")
