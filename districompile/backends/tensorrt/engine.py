# SPDX-License-Identifier: Apache-2.0
"""Load an engine file and run it: weights, context, addresses, stream.

Activations are not copied. The engine reads and writes them in the memory of the runtime: each ``enqueue`` sets all
addresses, which costs nothing when a captured step is replayed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import os
import weakref
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from districompile.backends.base import Engine, check_input
from districompile.backends.onnx.proto import WEIGHT
from districompile.backends.tensorrt import v8
from districompile.backends.tensorrt.builder import beside_weights
from districompile.backends.tensorrt.collectives import nccl_missing
from districompile.backends.tensorrt.library import Library, dtype_table, format_errors, optional
from districompile.bundle.weights import WeightFile
from districompile.errors import BackendError
from districompile.ir.spec import TensorSpec

if TYPE_CHECKING:
    import tensorrt as types


class TensorRTEngine(Engine):
    """A deserialised engine with one context. ``weights`` stay bound, and are shared with other engines.

    ``wide`` are inputs and outputs that are int64 for the runtime and int32 in the engine, which copies them.
    """

    binds_outputs = True

    def __init__(
        self,
        library: Library,
        name: str,
        engine: types.ICudaEngine,
        weights: Mapping[str, Tensor],
        device: torch.device,
        cache: RuntimeCache | None = None,
        wide: Collection[str] = (),
    ) -> None:
        trt = library.module
        self._library, self._name, self._engine, self._device = library, name, engine, device
        dtypes = dtype_table(trt)
        self._inputs: dict[str, TensorSpec] = {}
        self._outputs: dict[str, TensorSpec] = {}
        self._weights = dict(weights)
        self._narrow: dict[str, Tensor] = {}
        context = _context(library, engine, cache)
        if context is None:
            raise BackendError(
                f"{library.flavour} cannot make a context for {name}: {format_errors(library.log.take())}"
            )
        self.context: types.IExecutionContext = context
        for i in range(engine.num_io_tensors):
            tensor = engine.get_tensor_name(i)
            shape = engine.get_tensor_shape(tensor)
            sizes = tuple(int(shape[k]) for k in range(len(shape)))
            spec = TensorSpec(sizes, dtypes[engine.get_tensor_dtype(tensor)])
            if tensor in wide:
                self._narrow[tensor] = torch.empty(sizes, dtype=spec.dtype, device=device)
                spec = TensorSpec(sizes, torch.int64)
            if engine.get_tensor_mode(tensor) == trt.TensorIOMode.OUTPUT:
                self._outputs[tensor] = spec
            elif tensor.startswith(WEIGHT):
                self._set_address(tensor, self._weights[tensor], spec)
            else:
                self._inputs[tensor] = spec
        self.input_specs, self.output_specs = self._inputs, self._outputs
        size = cast(Any, engine).device_memory_size if library.is_v8 else engine.device_memory_size_v2
        self.scratch_bytes = -(-int(size) // 256) * 256
        self._scratch: Tensor | None = None
        self._bound: dict[str, Tensor] = {}
        self._results: dict[str, Tensor] = {}
        self._cache = cache
        capturable = optional(self.context, "is_stream_capturable")
        if capturable is not None:
            self.capturable = bool(capturable(torch.cuda.current_stream(device).cuda_stream))

    def bind(self, name: str, tensor: Tensor) -> None:
        check_input(name, tensor, self._outputs if name in self._outputs else self._inputs)
        self._bound[name] = tensor

    def enqueue(self) -> None:
        self._results = {}
        if self.scratch_bytes and self._scratch is None:
            self.use_scratch(torch.empty(self.scratch_bytes, dtype=torch.uint8, device=self._device))
        for name, spec in self._inputs.items():
            # Keep the tensor until the next call: the engine has only its address, and the work is merely queued.
            self._results[name] = self._bound.pop(name).contiguous()
            if name in self._narrow:
                self._narrow[name].copy_(self._results[name])
            self._set_address(name, self._results[name], spec)
        for name, spec in self._outputs.items():
            given = self._bound.pop(name, None)
            if given is None:
                given = torch.empty(spec.shape, dtype=spec.dtype, device=self._device)
            self._results[name] = given
            self._set_address(name, given, spec)
        if not self.context.execute_async_v3(torch.cuda.current_stream(self._device).cuda_stream):
            raise BackendError(
                f"{self._library.flavour} failed to run {self._name}: {format_errors(self._library.log.take())}"
            )
        for name in self._narrow.keys() & self._outputs.keys():
            self._results[name].copy_(self._narrow[name])

    def output(self, name: str) -> Tensor:
        return self._results[name]

    def release(self) -> None:
        # PyTorch's allocator reuses the memory in the order of this same stream.
        self._results = {}

    def use_scratch(self, tensor: Tensor) -> None:
        if self._library.is_v8:
            v8.set_scratch(self.context, tensor.data_ptr())
        else:
            self.context.set_device_memory(tensor.data_ptr(), tensor.numel())
        self._scratch = tensor

    def use_communicator(self, pointer: int) -> None:
        """Use the NCCL communicator (``ncclComm_t``) at ``pointer`` for the collectives of the engine.

        It must outlive this engine. All ranks call this together. Raises :class:`BackendError` if the library does not
        find NCCL, or the context takes no communicator: its collectives would then do nothing.
        """
        use = optional(self.context, "set_communicator")
        if use is not None and (reason := nccl_missing(self._library)) is not None:
            raise BackendError(reason)
        if use is None or not use(_capsule(pointer)):
            raise BackendError(
                f"{self._library.flavour} accepts no communicator for {self._name}: "
                + format_errors(self._library.log.take())
            )

    def _set_address(self, name: str, tensor: Tensor, spec: TensorSpec) -> None:
        if not tensor.is_contiguous() or tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            raise RuntimeError(f"{self._name}: {name} is {tensor.dtype}{tuple(tensor.shape)}, not a dense {spec}")
        memory = self._narrow.get(name, tensor)
        if not self.context.set_tensor_address(name, memory.data_ptr()):
            raise BackendError(
                f"{self._library.flavour} refuses the memory of {name}: {format_errors(self._library.log.take())}"
            )


def _capsule(pointer: int) -> Any:
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return make(pointer, b"ncclComm_t", None)


def _context(library: Library, engine: types.ICudaEngine, cache: RuntimeCache | None) -> types.IExecutionContext | None:
    """Create a context without activation memory: all contexts of a rank share one block."""
    if library.is_v8:
        return cast("types.IExecutionContext | None", v8.create_context(engine))
    strategy = library.module.ExecutionContextAllocationStrategy.USER_MANAGED
    make_config = optional(engine, "create_runtime_config")
    if make_config is None:
        return engine.create_execution_context(strategy)
    config = make_config()
    set_strategy = optional(config, "set_execution_context_allocation_strategy")
    if set_strategy is None:
        return engine.create_execution_context(strategy)
    set_strategy(strategy)
    if cache is not None:
        cache.attach(config)
    return engine.create_execution_context(config)


@dataclasses.dataclass(eq=False)
class RuntimeCache:
    """The kernels that ``tensorrt_rtx`` compiled for this GPU, in a file that makes the next start fast.

    Losing the file costs only time. A file that does not match, or cannot be written, is ignored.
    """

    path: Path
    _cache: Any = None
    _size: int = 0

    def attach(self, config: Any) -> None:
        """Use this cache for the context that is created with ``config``."""
        make, use = optional(config, "create_runtime_cache"), optional(config, "set_runtime_cache")
        if make is None or use is None:
            return
        if self._cache is None:
            self._cache = make()
            with contextlib.suppress(OSError):
                known = self.path.read_bytes()
                if self._cache.deserialize(known):
                    self._size = len(known)
            atexit.register(_save_at_exit, weakref.ref(self))
        use(self._cache)

    def save(self) -> None:
        """Write the file if its content has changed."""
        if self._cache is None:
            return
        data = memoryview(self._cache.serialize())
        if data.nbytes == self._size:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
            temporary.write_bytes(data)
            temporary.replace(self.path)
            self._size = data.nbytes


def _save_at_exit(cache: weakref.ref[RuntimeCache]) -> None:
    found = cache()
    if found is not None:
        with contextlib.suppress(Exception):
            found.save()


def load_engine(
    library: Library,
    path: Path,
    outputs: tuple[str, ...],
    weights: WeightFile,
    device: torch.device,
    cache: RuntimeCache | None = None,
) -> TensorRTEngine:
    """Deserialise ``path`` for ``device``, with weights from the weight file of the bundle.

    Raises :class:`BackendError` for a file that is not an engine of this flavour and version, or of another segment.
    """
    trt, log = library.module, library.log
    log.take()
    runtime: types.Runtime = trt.Runtime(log)
    with torch.cuda.device(device):
        engine = cast("types.ICudaEngine | None", runtime.deserialize_cuda_engine(path.read_bytes()))
        if engine is None:
            raise BackendError(
                f"{path} cannot be loaded by {library.flavour} {library.version}: {format_errors(log.take())}: "
                "convert again with this version, or for this GPU"
            )
        tensors = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        found = tuple(n for n in tensors if engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT)
        if set(found) != set(outputs):
            raise BackendError(f"{path} is another segment: it gives {found}, not {outputs}")
        bound = {n: weights.tensor(n.removeprefix(WEIGHT), device) for n in tensors if n.startswith(WEIGHT)}
        if engine.refittable:
            _refit(library, engine, path.with_suffix(".onnx"), weights.path)
        wide = v8.wide_integers(path.with_suffix(".onnx")) if library.is_v8 else ()
        return TensorRTEngine(library, path.name, engine, bound, device, cache, wide)


def _refit(library: Library, engine: types.ICudaEngine, onnx: Path, weights: Path) -> None:
    """Put the weights of the bundle into a stripped engine."""
    trt, log = library.module, library.log
    refitter: types.Refitter = trt.Refitter(engine, log)
    parser: types.OnnxParserRefitter = trt.OnnxParserRefitter(refitter, log)
    with beside_weights(onnx, weights) as file:
        if not parser.refit_from_file(str(file)) or not refitter.refit_cuda_engine():
            errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise BackendError(
                f"{library.flavour} cannot refit {onnx.stem} from {weights}: {format_errors(errors or log.take())}"
            )
