# SPDX-License-Identifier: Apache-2.0
"""Slices of tensors packed into one message of bytes, and the combination of the contributions of all ranks.

Small tensors from one rank to another travel as one message: their cost depends on the number of messages, not on their
size. The offset of each slice follows from shapes and dtypes alone, so that a message holds payload and nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from districompile.ir.spec import TensorSpec
from districompile.plan.plan import Collective, Reduction

_ALIGN = 16  # bytes: any dtype may be viewed at a multiple of this


@dataclasses.dataclass(frozen=True)
class PackedSlice:
    """A row slice in a message.

    It holds the rows of ``source`` from ``start`` along ``dim``, which belong at row ``at`` of the result of the
    collective ``name``. ``spec`` is its shape and dtype. For a reduction, ``dim`` is None and the slice is a whole
    contribution.
    """

    name: str
    source: str
    dim: int | None
    start: int
    at: int
    spec: TensorSpec
    offset: int = 0

    def inside(self, message: torch.Tensor) -> torch.Tensor:
        """Return the part of ``message`` (uint8) that holds this slice, as a tensor of the slice's shape and dtype."""
        part = message[self.offset : self.offset + self.spec.nbytes]
        return part.view(self.spec.dtype).view(self.spec.shape)

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """Return the slice's rows of the sender's ``value``."""
        return value if self.dim is None else value.narrow(self.dim, self.start, self.spec.shape[self.dim])

    def in_result(self, result: torch.Tensor) -> torch.Tensor:
        """Return the slice's rows of the receiver's ``result``."""
        return result if self.dim is None else result.narrow(self.dim, self.at, self.spec.shape[self.dim])


@dataclasses.dataclass(frozen=True)
class Message:
    """All row slices that one rank sends to another in one ``Start``."""

    slots: tuple[PackedSlice, ...]
    nbytes: int

    @staticmethod
    def of(slots: Iterable[PackedSlice]) -> Message:
        placed: list[PackedSlice] = []
        offset = 0
        for slot in slots:
            placed.append(dataclasses.replace(slot, offset=offset))
            offset += -(-slot.spec.nbytes // _ALIGN) * _ALIGN
        return Message(tuple(placed), offset)

    def pack(self, values: Mapping[str, torch.Tensor], message: torch.Tensor) -> None:
        """Copy the slices from ``values`` (by source name) into ``message``."""
        for slot in self.slots:
            slot.inside(message).copy_(slot.of(values[slot.source]))


def combine(op: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Reduce ``parts`` in their order, so that every rank gets the same bits. Half precision is summed in float32."""
    dtype = parts[0].dtype
    wide = torch.float32 if op == "sum" and dtype in (torch.float16, torch.bfloat16) else dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        other = part.to(wide)
        total = total + other if op == "sum" else torch.maximum(total, other) if op == "max" else total.minimum(other)
    return total.to(dtype)


def slots_of(c: Collective, src: int, dst: int) -> list[PackedSlice]:
    """Return the slices of ``c`` from ``src`` to ``dst``, in the order in which both sides pack them."""
    spec = c.specs[src]
    if isinstance(c, Reduction):
        return [PackedSlice(c.name, c.source, None, 0, 0, spec)] if spec.nbytes else []
    slots = []
    for p in c.pieces:
        if p.src == src and p.dst == dst:
            shape = (*spec.shape[: c.dim], p.rows, *spec.shape[c.dim + 1 :])
            if math.prod(shape):
                slots.append(PackedSlice(c.name, c.source, c.dim, p.start, p.at, TensorSpec(shape, spec.dtype)))
    return slots
