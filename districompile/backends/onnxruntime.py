# SPDX-License-Identifier: Apache-2.0
"""The ONNX Runtime backend, for the CPU.

Engine files hold no weights. A session maps them from the bundle's weight file, so that sessions and processes share
their pages. A converted weight belongs to one session, however: float16 weights become float32 for lack of float16
kernels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from districompile.backends.base import Backend, Engine, check_input, source_line
from districompile.backends.onnx.export import Translator, kind_of
from districompile.backends.onnx.proto import OPSET, WEIGHT, Kind, Template, element_type, probe_model
from districompile.bundle.weights import WeightFile
from districompile.errors import BackendError
from districompile.ir.segment import SegmentGraph
from districompile.ir.serialize import needed
from districompile.ir.spec import TensorSpec, dtype_name

_INSTALL = 'pip install "districompile[onnxruntime]"'
_DTYPES = {
    "tensor(double)": torch.float64, "tensor(float)": torch.float32, "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16, "tensor(int64)": torch.int64, "tensor(int32)": torch.int32,
    "tensor(int16)": torch.int16, "tensor(int8)": torch.int8, "tensor(uint8)": torch.uint8, "tensor(bool)": torch.bool,
    "tensor(float8e4m3fn)": torch.float8_e4m3fn,
}  # fmt: skip


class OnnxRuntimeEngine(Engine):
    """A session that reads inputs and writes outputs in PyTorch's memory: a bound tensor, else a fresh one."""

    binds_outputs = True

    def __init__(self, session: Any, outputs: tuple[str, ...], weights: WeightFile) -> None:
        self._session = session
        inputs = {i.name: TensorSpec(tuple(i.shape), _DTYPES[i.type]) for i in session.get_inputs()}
        # A file that was made for another backend may take weights as inputs.
        self._weights = {n: weights.tensor(n.removeprefix(WEIGHT)) for n in inputs if n.startswith(WEIGHT)}
        self._inputs = {name: spec for name, spec in inputs.items() if name not in self._weights}
        given = {o.name: TensorSpec(tuple(o.shape), _DTYPES[o.type]) for o in session.get_outputs()}
        self._outputs = {name: given[name] for name in outputs}
        self.input_specs, self.output_specs = self._inputs, self._outputs
        self._bound: dict[str, Tensor] = {}
        self._results: dict[str, Tensor] = {}

    def bind(self, name: str, tensor: Tensor) -> None:
        check_input(name, tensor, self._outputs if name in self._outputs else self._inputs)
        self._bound[name] = tensor

    def enqueue(self) -> None:
        binding = self._session.io_binding()
        inputs = {name: self._bound.pop(name).detach().contiguous() for name in self._inputs}
        results, self._bound = self._bound, {}
        for name, spec in self._outputs.items():
            if name not in results:
                results[name] = torch.empty(spec.shape, dtype=spec.dtype)
        self._results = results
        for name, tensor in (*inputs.items(), *self._weights.items()):
            binding.bind_input(name, "cpu", 0, element_type(tensor.dtype), list(tensor.shape), tensor.data_ptr())
        for name, tensor in self._results.items():
            binding.bind_output(name, "cpu", 0, element_type(tensor.dtype), list(tensor.shape), tensor.data_ptr())
        self._session.run_with_iobinding(binding)

    def output(self, name: str) -> Tensor:
        return self._results[name]

    def release(self) -> None:
        self._results = {}


class OnnxRuntimeBackend(Backend):
    """A backend of ONNX files and ONNX Runtime's CPU kernels. Translations live as long as this object."""

    name = "onnxruntime"
    suffix = ".onnx"
    native_code = False
    calls_operators = False
    version = f"1, opset {OPSET}"

    def __init__(self) -> None:
        self.translator = Translator()
        self._probed: dict[Kind, str | None] = {}

    def unavailable_reason(self) -> str | None:
        missing = [m for m in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(m) is None]
        return f"the onnxruntime backend needs {', '.join(missing)}: {_INSTALL}" if missing else None

    def prepare(self, segments: Sequence[SegmentGraph]) -> None:
        self.translator.prepare(segments)
        self._probe([kind_of(n) for s in segments for n in needed(s.graph.graph)])

    def unsupported_ops(self, segment: SegmentGraph) -> list[str]:
        if reasons := self.translator.unsupported_ops(segment):
            return reasons
        nodes = {node: kind_of(node) for node in needed(segment.graph.graph)}
        self._probe(nodes.values())
        found: dict[str, str] = {}
        for node, kind in nodes.items():
            if isinstance(kind, Kind) and (reason := self._probed[kind]) is not None:
                found.setdefault(f"{node.target} {reason}", f"{node.target} ({node.name}{source_line(node)}): {reason}")
        return list(found.values())

    def build(self, segment: SegmentGraph, weights: WeightFile, path: Path) -> None:
        path.write_bytes(self.translator.model(segment, weights).SerializeToString())

    def load(self, path: Path, segment: tuple[str, ...], weights: WeightFile, device: torch.device) -> Engine:
        if device.type != "cpu":
            raise BackendError(
                f"the onnxruntime backend runs on the CPU, not on {device}: convert with another backend"
            )
        if (reason := self.unavailable_reason()) is not None:
            raise BackendError(reason)
        options = _options()
        # An ONNX file may not refer to its parent's folder: engines/x.onnx cannot name ../weights.safetensors itself.
        folder = str(weights.path.absolute().parent)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        # Repacked weights would be a private copy in each session, for no gain in speed that could be measured.
        options.add_session_config_entry("session.disable_prepacking", "1")
        data = path.read_bytes()
        _check_locations(path, data, weights.path.name)
        session = _session(data, options, f"{path} cannot be loaded by ONNX Runtime")
        names = tuple(o.name for o in session.get_outputs())
        if names != tuple(segment):
            raise BackendError(f"{path} is another segment: it gives {names}, not {tuple(segment)}")
        return OnnxRuntimeEngine(session, names, weights)

    def _probe(self, kinds: Any) -> None:
        """Find out which kinds ONNX Runtime has kernels for: all in one model, or one by one if that fails."""
        pending: list[tuple[Kind, Template]] = []
        for kind in dict.fromkeys(k for k in kinds if isinstance(k, Kind)):
            template = self.translator.template(kind)
            if kind not in self._probed and isinstance(template, Template):
                pending.append((kind, template))
        if pending and _runs(pending) is not None:
            self._probed.update((kind, _runs([(kind, template)])) for kind, template in pending)
        else:
            self._probed.update((kind, None) for kind, _ in pending)


def _options() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Each of a hundred sessions has threads of its own, which must not spin while another session or rank computes.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


def _check_locations(path: Path, data: bytes, weights: str) -> None:
    """Raise :class:`BackendError` for a tensor whose data lies in another file than ``weights``.

    Older versions of ONNX Runtime read whatever file is named.
    """
    import onnx

    try:
        pending: list[Any] = [onnx.ModelProto.FromString(data)]
    except Exception as e:  # protobuf's own class, which has no types
        raise BackendError(f"{path} cannot be loaded by ONNX Runtime: {e}") from e
    while pending:
        message = pending.pop()
        if isinstance(message, onnx.TensorProto):
            named = {e.value for e in message.external_data if e.key == "location"}
            if not named <= {weights}:
                raise BackendError(f"{path} has the data of {message.name} in {min(named - {weights})}, not {weights}")
            continue
        for field, value in message.ListFields():
            if field.message_type is not None:
                pending += value if hasattr(value, "append") or hasattr(value, "add") else [value]


def _session(model: bytes, options: Any, failure: str) -> Any:
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # its exceptions have no common base of their own
        raise BackendError(f"{failure}: {str(e).splitlines()[0]}") from e


def _runs(templates: Sequence[tuple[Kind, Template]]) -> str | None:
    """Return why ONNX Runtime cannot run these templates, or None."""
    import onnxruntime

    options = _options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        _session(probe_model(templates).SerializeToString(), options, "no ONNX Runtime kernel")
    except BackendError as e:
        dtypes = {dtype_name(spec.dtype) for kind, _ in templates for spec in (*kind.inputs, *kind.outputs)}
        unusual = sorted(dtypes & {"bfloat16", "float64", "complex64", "float16"})
        advice = f"; it has few {' or '.join(unusual)} kernels: convert the module as float32" if unusual else ""
        return f"{e}{advice}"
    return None
