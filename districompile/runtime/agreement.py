"""What the ranks settle before each call: that all are at the same step, and rank 0's inputs and decision.

Each rank sends all others one small record, so that all come to the same result: the call goes on everywhere, or every
rank raises the same error before anything of the call was computed, and the next call finds them in step. Rank 0's
sample travels with every call, and its conditioning where it differs from the last call's.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from districompile.errors import RanksDifferError
from districompile.ir.plan import InputSpec, TensorSpec
from districompile.runtime.gloo import GlooTransport
from districompile.runtime.streams import Decision
from districompile.runtime.transport import Message, Slot


class Shares(Protocol):
    """Sends a message from rank 0's device to all others."""

    def broadcast(self, tensor: Tensor) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A call as one rank sees it; rank 0's decision and inputs hold. ``timestep`` is None for a module without one.

    ``fresh``: the conditioning is another than in the last call of the stream.
    """

    decision: Decision
    inputs: Mapping[str, Tensor]
    timestep: float | None = None
    fresh: bool = True


_NONE = 0x7FF8_0000_0000_0D15  # a NaN that no computation gives: there is no timestep


@dataclasses.dataclass(frozen=True)
class _Record:
    refused: bool
    decision: Decision
    fresh: bool
    timestep: int  # its bits, so that NaN equals itself

    @staticmethod
    def of(proposal: Proposal) -> _Record:
        bits = _NONE if proposal.timestep is None else struct.unpack("<q", struct.pack("<d", proposal.timestep))[0]
        return _Record(False, proposal.decision, proposal.fresh, bits)

    def pack(self) -> Tensor:
        d = self.decision
        numbers = (int(self.refused), int(d.phase == "steady"), d.stream, int(d.reset), int(self.fresh), self.timestep)
        return torch.tensor(numbers, dtype=torch.int64)

    @staticmethod
    def unpack(record: Tensor) -> _Record:
        refused, steady, stream, reset, fresh, timestep = record.tolist()
        return _Record(
            bool(refused), Decision("steady" if steady else "warmup", stream, bool(reset)), bool(fresh), timestep
        )

    def __str__(self) -> str:
        value = struct.unpack("<d", struct.pack("<q", self.timestep))[0]
        return "no timestep" if self.timestep == _NONE else f"timestep {value:g}"


class Agreement:
    """The agreement of one process. ``samples`` are inputs that are sent with every call, ``conditioning`` those that
    are sent where they change. ``shares`` sends from device to device; without it all goes through host memory."""

    def __init__(
        self, world: GlooTransport, device: torch.device, samples: Mapping[str, TensorSpec],
        conditioning: Mapping[str, TensorSpec], shares: Shares | None,
    ) -> None:  # fmt: skip
        self._world, self._device, self._shares = world, device, shares
        self._samples, self._conditioning = message_of(samples), message_of(conditioning)
        self._message = torch.zeros(self._samples.nbytes, dtype=torch.uint8, device=device if shares else "cpu")
        self._received: dict[int, dict[str, Tensor]] = {}  # stream -> rank 0's conditioning

    def settle(self, proposal: Proposal) -> tuple[Decision, dict[str, Tensor]]:
        """Rank 0's decision and inputs. Raises :class:`RanksDifferError`, on all ranks, where they differ."""
        records = [_Record.unpack(r) for r in self._world.all_gather(_Record.of(proposal).pack())]
        first = records[0]
        for rank, record in enumerate(records):
            if record.refused:
                raise RanksDifferError(f"rank {rank} refused its inputs: see the error of that rank")
            if record.timestep != first.timestep:
                raise RanksDifferError(
                    f"rank {rank} is at {record} and rank 0 at {first}: all ranks make the same calls, and an image "
                    "that is stopped is stopped on all of them; the next call starts a new image"
                )
        inputs = {**proposal.inputs, **self._send_samples(proposal.inputs)}
        if first.decision.reset:
            self._received.clear()
        if first.fresh and self._conditioning.nbytes:
            self._received[first.decision.stream] = self._send_conditioning(proposal.inputs)
        if self._world.rank != 0:
            inputs |= self._received.get(first.decision.stream, {})
        return first.decision, inputs

    def refuse(self) -> None:
        """Tell the others that this rank refused its call."""
        nothing = _Record(True, Decision("warmup", 0, False), False, _NONE)
        self._world.all_gather(nothing.pack())

    def _send_samples(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Nothing on rank 0. Where it goes from device to device, the host does not wait."""
        message = self._message
        if self._world.rank == 0:
            self._samples.pack(inputs, message)
        message = (self._shares or self._world).broadcast(message)
        if self._world.rank == 0:
            return {}
        return {s.name: s.inside(message).to(self._device) for s in self._samples.slots}

    def _send_conditioning(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        message = torch.zeros(self._conditioning.nbytes, dtype=torch.uint8)
        if self._world.rank == 0:
            self._conditioning.pack(inputs, message)
        message = self._world.broadcast(message)
        return {s.name: s.inside(message).to(self._device) for s in self._conditioning.slots}


def message_of(specs: Mapping[str, TensorSpec]) -> Message:
    """All of ``specs``, by input path, in one message."""
    return Message.of(Slot(path, path, None, 0, 0, spec) for path, spec in specs.items() if math.prod(spec.shape))


def kinds_of(inputs: Sequence[InputSpec], timestep: str | None) -> tuple[list[InputSpec], list[InputSpec]]:
    """The inputs that change with every call (rows of the image), and those that stay the same within an image."""
    samples = [i for i in inputs if i.rows is not None]
    return samples, [i for i in inputs if i.rows is None and i.path != timestep]
