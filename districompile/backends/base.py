# SPDX-License-Identifier: Apache-2.0
"""The base classes of backends, which build and load segments, and of engines, which run them.

A backend has nothing to do with ranks, layouts or collectives. It takes one plain ``torch.fx.GraphModule`` for one
rank. The placeholders are the segment's inputs followed by its weights, all with static shapes. The nodes are aten
operators and the composites of :mod:`districompile.ir.ops`, each of which decomposes into aten operators.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from districompile.bundle.weights import WeightFile
from districompile.errors import InputError
from districompile.ir.layer_size import LayerSize
from districompile.ir.segment import SegmentGraph
from districompile.ir.spec import TensorSpec, dtype_name


class Engine(abc.ABC):
    """A loaded segment of one rank. Tensors are bound by name, ``enqueue`` computes, outputs are read by name.

    The contract with the runtime, in the order in which it calls:

    1. ``use_scratch`` once, before the first ``enqueue``, where ``scratch_bytes`` is not 0.
    2. ``bind`` for every input and, where ``binds_outputs``, for any of the outputs but ``aliased_outputs``. A bound
       tensor is dense in row-major order, and lies at an address that 256 divides. It stays valid and in place until
       the work is done. Every call of the same kind has the same addresses, so that a captured call may be replayed.
       An output's memory overlaps neither an input's, nor another output's, nor the scratch memory.
    3. ``enqueue``. On a GPU, all work goes to ``torch.cuda.current_stream()`` of the engine's device, which is looked
       up at each call, and the host waits for nothing. Unless ``capturable`` is False, the call may happen while that
       stream is captured into a CUDA graph. The first ``enqueue`` after loading is never captured: an engine does
       there the set-up that cannot be captured.
    4. ``output`` for the outputs that were not bound, then ``release``.

    One engine may serve several segments and both phases: bindings hold for one ``enqueue`` only. Engines of a rank are
    never enqueued at once, nor on two streams that are not ordered.
    """

    binds_outputs: bool = False  #: whether ``bind`` takes outputs, too, into which ``enqueue`` then writes directly
    capturable: bool = True  #: whether ``enqueue`` may be captured into a CUDA graph; without meaning on the CPU
    aliased_outputs: Collection[str] = ()  #: outputs that ``enqueue`` writes into a slice of an input buffer
    input_specs: Mapping[str, TensorSpec] | None = None  #: the inputs that must be bound; None: unknown
    output_specs: Mapping[str, TensorSpec] | None = None  #: the outputs of ``enqueue``; None: unknown
    scratch_bytes: int = 0  #: size of the scratch memory, whose contents matter only during an ``enqueue``

    @property
    def strides(self) -> Mapping[str, tuple[int, ...]]:
        """The strides in which ``enqueue`` writes outputs without a copy; row-major for outputs that are not named."""
        return {}

    @abc.abstractmethod
    def bind(self, name: str, tensor: torch.Tensor) -> None:
        """Bind an input (or, where ``binds_outputs``, an output) to its memory for the next ``enqueue``.

        ``enqueue`` writes a bound output there, and ``output`` then returns that very tensor. The engine has memory of
        its own for an output that is not bound. Raise :class:`~districompile.errors.InputError` for an unknown name,
        another shape or another dtype (for an output: at the latest in ``enqueue``).
        """

    @abc.abstractmethod
    def enqueue(self) -> None:
        """Compute all outputs, asynchronously on a device with streams.

        Bindings end with it. Every input is bound anew for the next call, so that an engine keeps no activations alive.
        """

    @abc.abstractmethod
    def output(self, name: str) -> torch.Tensor:
        """Return an output of the last ``enqueue``.

        The next ``enqueue`` may overwrite an output that was not bound, unless the backend promises fresh memory for
        each call, as ``eager`` and ``onnxruntime`` do.
        """

    def use_scratch(self, tensor: torch.Tensor) -> None:
        """Use ``tensor`` as the scratch memory from now on. All engines of a rank share it.

        It is uint8, at least ``scratch_bytes`` long, and on the engine's device.
        """
        raise NotImplementedError(f"{type(self).__name__} asked for scratch memory and does not take it")

    def use_communicator(self, pointer: int) -> None:
        """Use the NCCL communicator at ``pointer`` for the engine's own collectives. It outlives the engine.

        All ranks call this together, once, before the first ``enqueue``.
        """
        raise NotImplementedError(f"{type(self).__name__} holds no collectives")

    def release(self) -> None:  # noqa: B027  (an engine with memory of its own has nothing to release)
        """Release the outputs of the last ``enqueue``, after the caller has read them."""

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Run the engine once, for callers without buffers of their own, and return ``outputs`` by name."""
        for name, tensor in inputs.items():
            self.bind(name, tensor)
        self.enqueue()
        results = {name: self.output(name) for name in outputs}
        self.release()
        return results


class Backend(abc.ABC):
    """The base class of all backends: a compiler of segments.

    A subclass needs ``name``, ``suffix``, ``version``, ``unsupported_ops``, ``build`` and ``load``. The other methods
    have defaults.

    A backend is registered by an entry point of the group ``districompile.backends``. The entry point has the backend's
    name, and its value is a class (or function) that constructs one from options. An object may stand for a name.
    """

    native_code: bool = True  #: whether loading an engine runs machine code of the bundle
    calls_operators: bool = True  #: whether engines call operators of other packages by name when they run
    reads_weights: bool = False  #: whether engines read tensors of the weight file at each call, and hold no copies

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The backend's name on the command line, in the manifest and for ``get_backend``. A class attribute serves."""

    @property
    @abc.abstractmethod
    def suffix(self) -> str:
        """The suffix of its engine files in ``engines/`` (``".graph.json"``). A class attribute serves."""

    @property
    @abc.abstractmethod
    def version(self) -> str:
        """A text that changes whenever the same segment would be built to another file. A class attribute serves."""

    @property
    def device(self) -> str:
        """The device that engines are for, as in a manifest: ``"cpu"``, ``"cuda"`` or ``"cuda: NAME"``."""
        return "cpu"

    @property
    def collectives_inside(self) -> str | None:
        """The reason why an engine cannot hold collectives, or None if it can: see ``SegmentGraph.collectives``."""
        return f"the {self.name} backend cuts at every collective"

    @property
    def all_to_all_inside(self) -> bool:
        """Whether such collectives may be an ``all_to_all``, too. Without, each is an ``all_gather``."""
        return False

    @property
    def builds_at_once(self) -> int:
        """How many calls of ``build`` may be made at once, from threads."""
        return 1

    def unavailable_reason(self) -> str | None:
        """Return why this backend cannot be used here (a missing package, and how to install it), or None."""
        return None

    def describe(self) -> Mapping[str, Any] | None:
        """Return data for the manifest on what built the engines and for which devices, or None."""
        return None

    def begin(self) -> None:  # noqa: B027  (most have nothing to begin)
        """Start what a conversion will need, such as processes, before its model is loaded and partitioned."""

    def faster_in_8_bits(self, size: LayerSize) -> bool | None:
        """Return whether a layer of this size is faster in 8 bits than in its own type, or None where that is unknown.

        A conversion with ``quantise`` leaves layers as they are for which this is False.
        """
        return None

    def prepare(self, segments: Sequence[SegmentGraph]) -> None:  # noqa: B027  (most have nothing to prepare)
        """Prepare for all distinct segments of a conversion, before the first ``unsupported_ops`` or ``build``.

        Whatever they have in common is then translated once. Both methods work without it, but slowly. This never
        raises an error for an operator.
        """

    @abc.abstractmethod
    def unsupported_ops(self, segment: SegmentGraph) -> list[str]:
        """Return one reason for each operator of ``segment`` that this backend cannot build."""

    @abc.abstractmethod
    def build(self, segment: SegmentGraph, weights: WeightFile, path: Path) -> None:
        """Write the engine to ``path``. It refers to weights in the shared file, and never copies them."""

    @abc.abstractmethod
    def load(self, path: Path, segment: tuple[str, ...], weights: WeightFile, device: torch.device) -> Engine:
        """Load an engine. ``segment`` names its outputs, in order.

        Raise :class:`BackendError` for a file that is no engine of this backend, or another segment's, and for a device
        that the backend does not run on.
        """

    def content_name(self, path: Path) -> str | None:
        """Return the name without suffix that the content of the engine file at ``path`` requires; None if unknown."""
        return None


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
    """Return the line of the user's code that a node comes from, as `` at file.py:12``, or ``""`` if it is unknown."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f" at {found[-1][0]}:{found[-1][1]}" if found else ""
