# SPDX-License-Identifier: Apache-2.0
"""The transports of this package: peer, nccl and gloo."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from districompile.runtime.transports.base import Channel
from districompile.runtime.transports.gloo import GlooChannel, GlooGroup
from districompile.runtime.transports.kinds import Facts, Gather, Setup, Shares
from districompile.runtime.transports.nccl import NcclChannel, NcclCollectives
from districompile.runtime.transports.peer import PeerChannel, PeerShares
from districompile.runtime.transports.simulated import SimulatedChannels


class GlooTransport:
    """Messages through host memory. Works everywhere, also between processes that share a GPU."""

    name = "gloo"
    own_gpus = False

    def unavailable_reason(self, group: Sequence[Facts]) -> str | None:
        return None

    def channel(self, setup: Setup) -> Channel:
        return GlooChannel(setup.group, setup.device, setup.liveness)

    def shares(self, setup: Setup, channel: Channel, nbytes: int) -> Shares | None:
        return None

    def gather(self, setup: Setup) -> Gather:
        return GlooGroup(setup.new_pair(), liveness=setup.liveness)


class NcclTransport:
    """NCCL, between ranks with one GPU each."""

    name = "nccl"
    own_gpus = True

    def unavailable_reason(self, group: Sequence[Facts]) -> str | None:
        reason = _no_gpus(group)
        if reason is not None:
            return reason
        return None if all(f.nccl for f in group) else "this PyTorch has no NCCL"

    def channel(self, setup: Setup) -> Channel:
        if setup.ranks == 1:
            return _alone(setup)
        host = GlooGroup(setup.group, liveness=setup.liveness)
        return NcclChannel(setup.new_half("nccl"), host, setup.device, setup.liveness)

    def shares(self, setup: Setup, channel: Channel, nbytes: int) -> Shares | None:
        return _nccl_shares(setup)

    def gather(self, setup: Setup) -> Gather:
        return _nccl_gather(setup)


class PeerTransport:
    """Copy engines that write into the memory of other GPUs of one host."""

    name = "peer"
    own_gpus = True

    def unavailable_reason(self, group: Sequence[Facts]) -> str | None:
        reason = _no_gpus(group)
        if reason is not None:
            return reason
        if len({f.host for f in group}) > 1:
            return "the ranks run on several machines"
        if not all(f.symmetric for f in group):
            return "this PyTorch has no symmetric memory for CUDA"
        for i, one in enumerate(group):
            for j, other in enumerate(group):
                if i != j and other.gpu not in one.reaches:
                    return f"the GPU of rank {i} cannot reach the memory of the GPU of rank {j}"
        return None

    def channel(self, setup: Setup) -> Channel:
        return _alone(setup) if setup.ranks == 1 else PeerChannel(setup.group, setup.device, setup.liveness)

    def shares(self, setup: Setup, channel: Channel, nbytes: int) -> Shares | None:
        if setup.guidance_halves == 1 and isinstance(channel, PeerChannel):
            return PeerShares(channel, nbytes)
        return _nccl_shares(setup)  # the halves may be on several hosts

    def gather(self, setup: Setup) -> Gather:
        return _nccl_gather(setup)


def _no_gpus(group: Sequence[Facts]) -> str | None:
    if not all(f.gpu for f in group):
        return f"rank {next(i for i, f in enumerate(group) if not f.gpu)} does not compute on an NVIDIA GPU"
    if len({(f.host, f.gpu) for f in group}) < len(group):
        return "several ranks share one GPU"
    return None


def _alone(setup: Setup) -> Channel:
    """Return the channel of a rank that exchanges nothing, because only guidance is split."""
    (channel,) = SimulatedChannels(1, setup.device).channels
    channel.capturable = True
    return channel


def _nccl_shares(setup: Setup) -> Shares | None:
    return NcclCollectives(setup.new_world("nccl"), setup.device) if dist.is_nccl_available() else None


def _nccl_gather(setup: Setup) -> Gather:
    if not dist.is_nccl_available():
        return GlooGroup(setup.new_pair(), liveness=setup.liveness)
    return NcclCollectives(setup.new_pair("nccl"), setup.device)
