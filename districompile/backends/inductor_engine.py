"""A compiled segment where it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from districompile.backends.base import Engine, check_input
from districompile.backends.inductor_graph import Operand, Part, Room
from districompile.errors import InputError
from districompile.ir.plan import TensorSpec

CHANNELS_LAST = {
    4: ("channels_last", torch.channels_last),
    5: ("channels_last_3d", torch.channels_last_3d),
}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, **{name: f for name, f in CHANNELS_LAST.values()}}


class InductorEngine(Engine):
    """A loaded package. Inputs, and outputs if the caller has memory for them, are bound by name.

    ``enqueue`` works on the device's current stream and does not wait for it, so that it can be captured into a CUDA
    graph (after one call outside of it, which loads the kernels). An output that is not bound is fresh memory at each
    call. A bound output must not overlap an input. Tensors whose strides are not those compiled for are copied.

    ``rooms``: outputs that are rows of an input, written there; they are not bound.
    """

    binds_outputs = True

    def __init__(
        self, loader: Any, inputs: Mapping[str, Operand], weights: Sequence[Tensor], outputs: Mapping[str, Operand],
        parts: Mapping[str, Sequence[Part]], rooms: Mapping[str, Room], device: torch.device,
    ) -> None:  # fmt: skip
        self.rooms = self._rooms = dict(rooms)
        self._loader, self._weights, self._device = loader, list(weights), device
        self._inputs, self._outputs, self._parts = dict(inputs), dict(outputs), dict(parts)
        self.input_specs = {name: o.spec for name, o in self._inputs.items()}
        self.output_specs = {name: o.spec for name, o in self._outputs.items()}
        for name, room in self._rooms.items():
            source = self._inputs[room.source].spec
            rows = len(range(*slice(room.start, room.stop).indices(source.shape[0])))
            self.output_specs[name] = TensorSpec((rows, *source.shape[1:]), source.dtype)
        self._specs = {name: o.spec for name, o in (*self._outputs.items(), *self._inputs.items())}
        self._bound: dict[str, Tensor] = {}
        self._targets: dict[str, Tensor] = {}
        self._results: dict[str, Tensor] = {}

    @property
    def strides(self) -> dict[str, tuple[int, ...]]:
        """The strides in which this engine writes each output without a copy; row-major for most."""
        return {name: operand.strides for name, operand in self._outputs.items()}

    def bind(self, name: str, tensor: Tensor) -> None:
        check_input(name, tensor, self._specs)
        if tensor.device != self._device:
            raise InputError(f"{name} is on {tensor.device}, and this engine runs on {self._device}")
        if name in self._inputs:
            self._bound[name] = tensor
        else:
            self._targets[name] = tensor

    def enqueue(self) -> None:
        self._results = {}
        if self._device.type == "cuda" and torch.cuda.current_device() != self._device.index:
            with torch.cuda.device(self._device):
                self._run()
        else:
            self._run()

    @torch.no_grad()
    def _run(self) -> None:
        inputs = []
        for name, operand in self._inputs.items():
            tensor = self._as_compiled(operand, self._bound.pop(name))
            for output, room in self._rooms.items():
                if room.source == name:
                    self._results[output] = tensor[room.start : room.stop]
            inputs += [part.of(tensor) for part in self._parts[name]] if name in self._parts else [tensor]
        buffers, late = [], []
        for name, operand in self._outputs.items():
            target = self._targets.pop(name, None)
            buffer = target if target is not None and operand.fits(target) else operand.empty(self._device)
            if target is not None and buffer is not target:
                late.append((target, buffer))
            self._results[name] = target if target is not None else buffer
            buffers.append(buffer)
        self._loader.run([*inputs, *self._weights, *buffers])
        for target, buffer in late:
            target.copy_(buffer)

    def _as_compiled(self, operand: Operand, tensor: Tensor) -> Tensor:
        if operand.fits(tensor):
            return tensor
        same = tensor.is_contiguous(memory_format=MEMORY_FORMATS[operand.format])
        if same and tensor.data_ptr() % 16 == 0:  # but for dims of size 1
            return tensor.as_strided(operand.spec.shape, operand.strides)
        return operand.empty(self._device).copy_(tensor)

    def output(self, name: str) -> Tensor:
        return self._results[name]

    def release(self) -> None:
        self._results = {}
