# SPDX-License-Identifier: Apache-2.0
"""Run a compiled segment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from districompile.backends.base import Engine, check_input
from districompile.backends.inductor.package import CHANNELS_LAST, AliasedOutput, InputSlice, Operand
from districompile.backends.inductor.pytorch_private import PackageLoader
from districompile.errors import InputError
from districompile.ir.spec import TensorSpec

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, **{name: f for name, f in CHANNELS_LAST.values()}}


class InductorEngine(Engine):
    """A loaded package, with the names of its operands in one segment.

    ``enqueue`` uses the current stream of the device and does not wait for it, so that a CUDA graph can capture it,
    after a first call outside of the capture, which loads the kernels. An output that is not bound is new memory at
    each call. A bound output must not overlap an input. Tensors whose strides differ from the compiled ones are copied.

    ``aliased_outputs`` are outputs that the program writes into rows of an input; they are not bound.
    """

    binds_outputs = True

    def __init__(
        self, loader: PackageLoader, inputs: Mapping[str, Operand], weights: Sequence[Tensor],
        outputs: Mapping[str, Operand],
        slices: Mapping[str, Sequence[InputSlice]], aliased_outputs: Mapping[str, AliasedOutput], device: torch.device,
    ) -> None:  # fmt: skip
        self.aliased_outputs = self._aliases = dict(aliased_outputs)
        self._loader, self._weights, self._device = loader, list(weights), device
        self._inputs, self._outputs, self._slices = dict(inputs), dict(outputs), dict(slices)
        self.input_specs = {name: o.spec for name, o in self._inputs.items()}
        self.output_specs = {name: o.spec for name, o in self._outputs.items()}
        for name, alias in self._aliases.items():
            source = self._inputs[alias.source].spec
            rows = len(range(*slice(alias.start, alias.stop).indices(source.shape[0])))
            self.output_specs[name] = TensorSpec((rows, *source.shape[1:]), source.dtype)
        self._specs = {name: o.spec for name, o in (*self._outputs.items(), *self._inputs.items())}
        self._bound: dict[str, Tensor] = {}
        self._targets: dict[str, Tensor] = {}
        self._results: dict[str, Tensor] = {}

    @property
    def strides(self) -> dict[str, tuple[int, ...]]:
        """The strides of memory into which this engine writes each output without a copy; row-major for most."""
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
            for output, alias in self._aliases.items():
                if alias.source == name:
                    self._results[output] = tensor[alias.start : alias.stop]
            inputs += [piece.of(tensor) for piece in self._slices[name]] if name in self._slices else [tensor]
        buffers, copies = [], []
        for name, operand in self._outputs.items():
            target = self._targets.pop(name, None)
            buffer = target if target is not None and operand.fits(target) else operand.empty(self._device)
            if target is not None and buffer is not target:
                copies.append((target, buffer))
            self._results[name] = target if target is not None else buffer
            buffers.append(buffer)
        self._loader.run([*inputs, *self._weights, *buffers])
        for target, buffer in copies:
            target.copy_(buffer)

    def _as_compiled(self, operand: Operand, tensor: Tensor) -> Tensor:
        if operand.fits(tensor):
            return tensor
        dense = tensor.is_contiguous(memory_format=MEMORY_FORMATS[operand.format])
        if dense and tensor.data_ptr() % 16 == 0:  # then only the strides of dims of size 1 differ
            return tensor.as_strided(operand.spec.shape, operand.strides)
        return operand.empty(self._device).copy_(tensor)

    def output(self, name: str) -> Tensor:
        return self._results[name]

    def release(self) -> None:
        self._results = {}
