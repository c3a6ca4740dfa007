"""The protocol every backend implements: what it cannot do, building a segment, loading an engine, running it.

A backend never sees ranks, layouts or collectives: it is given one plain ``torch.fx.GraphModule`` for one rank, whose
placeholders are the segment's inputs followed by its weights, all with static shapes, and whose nodes are aten
operators and the composites of :mod:`districompile.ir.ops` (each of which decomposes into aten operators).
"""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import fx

from districompile.errors import BackendError, InputError
from districompile.ir.plan import TensorSpec, dtype_name
from districompile.weights import WeightFile


@dataclasses.dataclass(frozen=True)
class BuildSegment:
    """What a backend builds. Nothing may change it afterwards.

    ``graph``'s placeholders are ``inputs`` then ``weights``, in order; its output is a flat tuple, one tensor for each
    of ``outputs``; every node has ``meta["val"]``. Weights are known by their names in the weight file, inputs and
    outputs by the names of their values. ``gathers`` are pairs of an output and an input: what all ranks give as the
    first, one after another, is the second (the backends that can compute such a segment say so in
    ``collectives_inside``); an engine has neither at its border.
    """

    name: str
    graph: fx.GraphModule
    inputs: tuple[tuple[str, TensorSpec], ...]
    weights: tuple[tuple[str, TensorSpec], ...]
    outputs: tuple[tuple[str, TensorSpec], ...]
    gathers: tuple[tuple[str, str], ...] = ()


class Engine(abc.ABC):
    """A loaded segment of one rank. Tensors are bound by name, ``enqueue`` computes, outputs are read by name.

    The contract with the runtime, in the order in which it calls:

    1. ``use_scratch`` once, before the first ``enqueue``, where ``scratch_bytes`` is not 0.
    2. ``bind`` for every input and, where ``binds_outputs``, for any of the outputs but ``rooms``. What the runtime
       binds is dense in row-major order, lies at an address that 256 divides, and stays valid and in place until the
       work is done: the same addresses come back with every call of the same kind, so that a captured call may be
       replayed. An output's memory overlaps neither an input's, nor another output's, nor the scratch memory.
    3. ``enqueue``. On a GPU: all work goes to ``torch.cuda.current_stream()`` of the engine's device (looked up at each
       call), the host waits for nothing, and, unless ``capturable`` is False, the call may happen while that stream is
       being captured into a CUDA graph. The first ``enqueue`` after loading is never captured: an engine sets up there
       what cannot be.
    4. ``output`` for the outputs that were not bound, then ``release``.

    One engine may serve several segments and both phases: bindings hold for one ``enqueue`` only. Engines of a rank are
    never enqueued at once, nor on two streams that are not ordered.
    """

    binds_outputs: bool = False  #: whether ``bind`` takes outputs, too, and ``enqueue`` then writes straight into them
    capturable: bool = True  #: whether ``enqueue`` may be captured into a CUDA graph; means nothing on the CPU
    rooms: Collection[str] = ()  #: outputs that ``enqueue`` writes into an input, where they are read
    input_specs: Mapping[str, TensorSpec] | None = None  #: what has to be bound; None: not known
    output_specs: Mapping[str, TensorSpec] | None = None  #: what ``enqueue`` gives; None: not known
    scratch_bytes: int = 0  #: memory that ``enqueue`` needs and whose contents it neither expects nor leaves

    @abc.abstractmethod
    def bind(self, name: str, tensor: torch.Tensor) -> None:
        """Give an input (or, where ``binds_outputs``, an output) its memory for the next ``enqueue``.

        A bound output is written there by ``enqueue``; ``output`` then gives that very tensor. An output that is not
        bound gets memory of the engine's. Raises :class:`~districompile.errors.InputError` for an unknown name,
        another shape or another dtype (for an output: at the latest in ``enqueue``).
        """

    @abc.abstractmethod
    def enqueue(self) -> None:
        """Compute all outputs; asynchronous on a device with streams. Bindings do not outlive it: every input is bound
        anew, so that an engine does not keep activations alive."""

    @abc.abstractmethod
    def output(self, name: str) -> torch.Tensor:
        """An output of the last ``enqueue``. One that was not bound may be overwritten by the next ``enqueue``, unless
        the backend says that it gives fresh memory each time (``eager`` and ``onnxruntime`` do)."""

    def use_scratch(self, tensor: torch.Tensor) -> None:
        """Work in ``tensor`` (uint8, at least ``scratch_bytes`` long, on the engine's device) from now on. All engines
        of a rank are given the same memory."""
        raise NotImplementedError(f"{type(self).__name__} asked for scratch memory and does not take it")

    def use_communicator(self, pointer: int) -> None:
        """Use the NCCL communicator at ``pointer`` for the collectives inside. It outlives the engine; all ranks call
        this together, once, before the first ``enqueue``."""
        raise NotImplementedError(f"{type(self).__name__} holds no collectives")

    def release(self) -> None:  # noqa: B027  (an engine with memory of its own has nothing to let go)
        """Forget the outputs of the last ``enqueue``: the caller has read those it wants."""

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Bind, enqueue and read, for callers without buffers of their own."""
        for name, tensor in inputs.items():
            self.bind(name, tensor)
        self.enqueue()
        results = {name: self.output(name) for name in outputs}
        self.release()
        return results


class Backend(Protocol):
    """A way of compiling segments. ``suffix`` is the ending of its engine files in ``engines/``; ``version`` changes
    whenever the same segment would give another file.

    Optional: ``native_code = False`` says that loading an engine runs no code of the bundle (:func:`runs_native_code`);
    ``content_name(path)`` gives the name without suffix that an engine file must have by its content.
    """

    @property
    def name(self) -> str: ...

    @property
    def suffix(self) -> str: ...

    @property
    def version(self) -> str: ...

    def unavailable(self) -> str | None:
        """Why this backend cannot be used here (a missing package, and how to install it), or None."""

    def prepare(self, segments: Sequence[BuildSegment]) -> None:
        """Told all distinct segments of a conversion before the first ``refuses`` or ``build``, so that what they have
        in common is translated once. Both work without it, but slowly. Never raises for an operator."""

    def refuses(self, segment: BuildSegment) -> list[str]:
        """What in ``segment`` this backend cannot build: one reason an operator; empty if it can."""

    def build(self, segment: BuildSegment, weights: WeightFile, path: Path) -> None:
        """Write the engine to ``path``. Weights are referred to in the shared file, never copied."""

    def load(self, path: Path, segment: tuple[str, ...], weights: WeightFile, device: torch.device) -> Engine:
        """Load an engine. ``segment`` names its outputs, in order. Raises :class:`BackendError` for a file that is no
        engine of this backend, or another segment's, or for a device that the backend does not run on."""


def runs_native_code(backend: Backend) -> bool:
    """Whether engines of ``backend`` are machine code. A backend that does not say so is taken for one."""
    return bool(getattr(backend, "native_code", True))


def check_input(name: str, tensor: torch.Tensor, specs: Mapping[str, TensorSpec]) -> None:
    """Raise :class:`InputError` unless ``tensor`` fits the input (or output) ``name``, which is one of ``specs``."""
    spec = specs.get(name)
    if spec is None:
        raise InputError(f"no input named {name!r}; there are: {', '.join(specs)}")
    if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
        given = f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
        wanted = f"{dtype_name(spec.dtype)} {list(spec.shape)}"
        raise InputError(f"{name} was converted as {wanted}, but is given as {given}")


def source_line(node: fx.Node) -> str:
    """`` at file.py:12`` of the user's code that a node comes from, or nothing if the graph does not say."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f" at {found[-1][0]}:{found[-1][1]}" if found else ""


def get_backend(name: str, **options: Any) -> Backend:
    """The backend called ``name``, made with ``options``; raises :class:`BackendError` naming what there is, or what to
    install."""
    from districompile.backends.eager import EagerBackend
    from districompile.backends.inductor import InductorBackend
    from districompile.backends.onnxruntime import OnnxRuntimeBackend
    from districompile.backends.tensorrt import TensorRTBackend

    kinds = (EagerBackend, InductorBackend, OnnxRuntimeBackend, TensorRTBackend)
    known: dict[str, Callable[..., Backend]] = {b.name: b for b in kinds}
    if name not in known:
        raise BackendError(f"no backend named {name!r}; there are: {', '.join(sorted(known))}")
    backend = known[name](**options)
    reason = backend.unavailable()
    if reason is not None:
        raise BackendError(reason)
    return backend
