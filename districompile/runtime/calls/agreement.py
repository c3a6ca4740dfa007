# SPDX-License-Identifier: Apache-2.0
"""Agreement of the ranks before each call, on their step and on rank 0's inputs and decision.

Each rank sends one small record to all others, so that all reach the same result. Either the call goes on everywhere,
or every rank raises the same error before anything of the call is computed. The ranks are then still in step for the
next call. Rank 0's sample is sent with every call, and its conditioning when it differs from the last call's.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from districompile.errors import RanksDifferError
from districompile.ir.spec import PHASES, InputSpec, TensorSpec
from districompile.runtime.calls.call_tracker import Decision
from districompile.runtime.transports.gloo import GlooGroup
from districompile.runtime.transports.kinds import Shares
from districompile.runtime.transports.messages import Message, PackedSlice


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A call as one rank sees it. Rank 0's decision and inputs hold for all ranks.

    ``timestep`` is None for a module without one. ``fresh``: the conditioning differs from that of the stream's last
    call. ``shape`` is the number of the plan that the inputs fit.
    """

    decision: Decision
    inputs: Mapping[str, Tensor]
    timestep: float | None = None
    fresh: bool = True
    shape: int = 0


_NONE = 0x7FF8_0000_0000_0D15  # stands for no timestep: a NaN that no computation gives


@dataclasses.dataclass(frozen=True)
class _Record:
    refused: bool
    decision: Decision
    fresh: bool
    timestep: int  # its bits, so that NaN equals itself
    shape: int  # the number of the plan; below 0: a shape that is to be added

    @staticmethod
    def of(proposal: Proposal) -> _Record:
        bits = _NONE if proposal.timestep is None else struct.unpack("<q", struct.pack("<d", proposal.timestep))[0]
        return _Record(False, proposal.decision, proposal.fresh, bits, proposal.shape)

    def pack(self) -> Tensor:
        d = self.decision
        numbers = (
            int(self.refused),
            PHASES.index(d.phase),
            d.stream,
            int(d.reset),
            int(self.fresh),
            self.timestep,
            self.shape,
        )
        return torch.tensor(numbers, dtype=torch.int64)

    @staticmethod
    def unpack(record: Tensor) -> _Record:
        refused, phase, stream, reset, fresh, timestep, shape = record.tolist()
        return _Record(
            bool(refused),
            Decision(PHASES[phase], stream, bool(reset)),
            bool(fresh),
            timestep,
            shape,
        )

    def __str__(self) -> str:
        value = struct.unpack("<d", struct.pack("<q", self.timestep))[0]
        return "no timestep" if self.timestep == _NONE else f"timestep {value:g}"


@dataclasses.dataclass(frozen=True)
class _Messages:
    """What rank 0 sends for calls of one shape, and how. ``memory`` holds the samples."""

    samples: Message
    conditioning: Message
    memory: Tensor
    shares: Shares | None


class Agreement:
    """The agreement of one process with the others.

    Each shape of the inputs has its own messages, which :meth:`add` plans. ``shares`` sends from device to device;
    without it, everything goes through host memory.
    """

    def __init__(self, world: GlooGroup, device: torch.device) -> None:
        self._world, self._device = world, device
        self._messages: list[_Messages] = []
        self._received: dict[int, dict[str, Tensor]] = {}  # stream -> rank 0's conditioning

    def add(
        self, samples: Mapping[str, TensorSpec], conditioning: Mapping[str, TensorSpec], shares: Shares | None
    ) -> None:
        """Add a shape. ``samples`` are inputs that are sent with every call, ``conditioning`` those that are sent when
        they change."""
        sent = message_of(samples)
        memory = torch.zeros(sent.nbytes, dtype=torch.uint8, device=self._device if shares else "cpu")
        self._messages.append(_Messages(sent, message_of(conditioning), memory, shares))

    def settle(self, proposal: Proposal) -> tuple[Decision, dict[str, Tensor]]:
        """Return rank 0's decision and inputs. Raises :class:`RanksDifferError`, on all ranks, if the ranks differ."""
        first = self._compare(_Record.of(proposal))
        messages = self._messages[first.shape]
        inputs = {**proposal.inputs, **self._send_samples(messages, proposal.inputs)}
        if first.decision.reset:
            self._received.clear()
        if first.fresh and messages.conditioning.nbytes:
            self._received[first.decision.stream] = self._send_conditioning(messages, proposal.inputs)
        if self._world.rank != 0:
            inputs |= self._received.get(first.decision.stream, {})
        return first.decision, inputs

    def unknown(self, key: int) -> None:
        """Agree that the call has a shape that is to be added, with a ``key`` below 0.

        Raises :class:`RanksDifferError`, on all ranks, if the ranks differ.
        """
        self._compare(_Record(False, Decision("exact", 0, False), False, _NONE, key))

    def _compare(self, own: _Record) -> _Record:
        """Return rank 0's record. Raises :class:`RanksDifferError` for a rank that makes another call."""
        records = [_Record.unpack(r) for r in self._world.all_gather(own.pack())]
        first = records[0]
        for rank, record in enumerate(records):
            if record.refused:
                raise RanksDifferError(f"rank {rank} refused its inputs: see the error of that rank")
            if record.shape != first.shape:
                raise RanksDifferError(
                    f"rank {rank} has inputs of other shapes than rank 0: all ranks make the same calls"
                )
            if record.timestep != first.timestep:
                raise RanksDifferError(
                    f"rank {rank} is at {record} and rank 0 at {first}: all ranks make the same calls, and an image "
                    "that is stopped is stopped on all of them; the next call starts a new image"
                )
        return first

    def refuse(self) -> None:
        """Report to the other ranks that this one refused its call."""
        nothing = _Record(True, Decision("exact", 0, False), False, _NONE, 0)
        self._world.all_gather(nothing.pack())

    def _send_samples(self, messages: _Messages, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return rank 0's samples on the other ranks, and nothing on rank 0.

        The host does not wait for a transfer from device to device.
        """
        message = messages.memory
        if self._world.rank == 0:
            messages.samples.pack(inputs, message)
        message = (messages.shares or self._world).broadcast(message)
        if self._world.rank == 0:
            return {}
        return {s.name: s.inside(message).to(self._device) for s in messages.samples.slots}

    def _send_conditioning(self, messages: _Messages, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        message = torch.zeros(messages.conditioning.nbytes, dtype=torch.uint8)
        if self._world.rank == 0:
            messages.conditioning.pack(inputs, message)
        message = self._world.broadcast(message)
        return {s.name: s.inside(message).to(self._device) for s in messages.conditioning.slots}


def message_of(specs: Mapping[str, TensorSpec]) -> Message:
    """Return one message with all of ``specs``, by input path."""
    return Message.of(
        PackedSlice(path, path, None, 0, 0, spec) for path, spec in specs.items() if math.prod(spec.shape)
    )


def kinds_of(inputs: Sequence[InputSpec], timestep: str | None) -> tuple[list[InputSpec], list[InputSpec]]:
    """Split inputs into those that change with every call (rows of the image) and those that stay the same."""
    samples = [i for i in inputs if i.rows is not None]
    return samples, [i for i in inputs if i.rows is None and i.path != timestep]
