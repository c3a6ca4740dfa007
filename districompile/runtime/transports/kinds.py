# SPDX-License-Identifier: Apache-2.0
"""Kinds of transport: when a kind can be used, and what it sets up for a rank.

A kind is chosen once, by name or as an object, and is the same on all ranks (:mod:`.select`). It then sets up three
objects: the channel that carries the rows between the ranks of one image, one that broadcasts rank 0's inputs of a
whole call, and one that gathers the two guidance halves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist

from districompile.runtime.processes.liveness import FOREVER, Liveness
from districompile.runtime.transports.base import Channel
from districompile.runtime.transports.gloo import GlooGroup, new_group


@dataclasses.dataclass(frozen=True)
class Facts:
    """The hardware and software of one rank.

    ``host`` and ``gpu`` identify its host and its GPU ("" without one). ``reaches`` are the GPUs whose memory that GPU
    reaches. ``nccl`` and ``symmetric`` are whether its PyTorch has NCCL and symmetric memory.
    """

    host: str
    gpu: str
    reaches: tuple[str, ...]
    nccl: bool
    symmetric: bool


@dataclasses.dataclass(frozen=True)
class Setup:
    """The environment in which a kind sets up one rank.

    ``world`` holds all processes, and ``group`` (a gloo process group) those of this rank's guidance half. Messages in
    both go through host memory. There are ``guidance_halves`` groups of ``ranks`` ranks, which are consecutive in
    ``world``. Process groups are made together: all processes call the methods below alike, and in the same order.
    """

    device: torch.device
    ranks: int
    guidance_halves: int
    world: GlooGroup
    group: dist.ProcessGroup
    liveness: Liveness

    @property
    def guidance_index(self) -> int:
        """The number of this rank's guidance half."""
        return self.world.rank // self.ranks

    def new_world(self, backend: str = "gloo") -> dist.ProcessGroup:
        """Make a process group of all processes."""
        return new_group(range(self.world.ranks), FOREVER, backend)

    def new_half(self, backend: str = "gloo") -> dist.ProcessGroup:
        """Make a process group of each guidance half. Return that of this rank."""
        starts = range(0, self.world.ranks, self.ranks)
        return [new_group(range(s, s + self.ranks), FOREVER, backend) for s in starts][self.guidance_index]

    def new_pair(self, backend: str = "gloo") -> dist.ProcessGroup:
        """Make process groups of the ranks that have the same rows, one of each half. Return that of this rank."""
        pairs = [new_group(range(r, self.world.ranks, self.ranks), FOREVER, backend) for r in range(self.ranks)]
        return pairs[self.world.rank % self.ranks]


class Shares(Protocol):
    """Broadcast a message (uint8) from rank 0's device to all others."""

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor: ...


class Gather(Protocol):
    """Gather tensors of one shape and dtype from all ranks of a group, in rank order.

    ``waits_on_host``: the results are there when the call returns; else once the work queued on the current stream is
    done.
    """

    waits_on_host: bool

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]: ...


@runtime_checkable
class TransportKind(Protocol):
    """One way to move tensors between ranks.

    Its methods are called once per module, on all ranks alike, in the order ``unavailable_reason``, ``channel``,
    ``shares``, ``gather``. ``shares`` is called again where a shape of larger inputs is added.
    """

    name: str
    own_gpus: bool  #: whether each rank needs a separate NVIDIA GPU

    def unavailable_reason(self, group: Sequence[Facts]) -> str | None:
        """Return why the ranks of a group cannot use this kind, given the facts of each; None if they can."""

    def channel(self, setup: Setup) -> Channel:
        """Make the channel between the ranks of this rank's guidance half."""

    def shares(self, setup: Setup, channel: Channel, nbytes: int) -> Shares | None:
        """Make the object that sends up to ``nbytes`` from rank 0's device to all processes at every call.

        ``channel`` is the result of :meth:`channel`. With None, the bytes go through host memory.
        """

    def gather(self, setup: Setup) -> Gather:
        """Make the object that gathers the outputs of the guidance halves. Called only if there are two."""
