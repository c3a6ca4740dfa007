"""A transport of another package, which counts the transfers of gloo, and the ranks that use it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

import districompile as dc
from districompile.runtime.transports.base import Channel, TransferPlan
from districompile.runtime.transports.builtin import GlooTransport
from districompile.runtime.transports.gloo import GlooChannel
from districompile.runtime.transports.kinds import Facts, Gather, Setup, Shares
from tests.helpers_processes import call


class CountingChannel(GlooChannel):
    """A gloo channel that counts the transfers that it starts, and their bytes."""

    transfers = 0
    nbytes = 0

    def post(self, transfer: TransferPlan) -> None:
        self.transfers += 1
        self.nbytes += transfer.sent_bytes
        super().post(transfer)


class CountingTransport:
    """A gloo transport that counts. At most ``most`` ranks can use it."""

    name = "counting"
    own_gpus = False

    def __init__(self, most: int = 8) -> None:
        self.most = most
        self.calls: list[str] = []
        self.made: list[CountingChannel] = []

    def unavailable_reason(self, group: Sequence[Facts]) -> str | None:
        self.calls.append("unavailable_reason")
        return None if len(group) <= self.most else f"it counts up to {self.most} ranks"

    def channel(self, setup: Setup) -> Channel:
        self.calls.append("channel")
        self.made.append(CountingChannel(setup.group, setup.device, setup.liveness))
        return self.made[-1]

    def shares(self, setup: Setup, channel: Channel, nbytes: int) -> Shares | None:
        assert channel is self.made[-1] and nbytes > 0
        self.calls.append("shares")
        return None

    def gather(self, setup: Setup) -> Gather:
        self.calls.append("gather")
        return GlooTransport().gather(setup)


def rank_of(bundle: str, inputs: str, transport: str, installed: str | None = None) -> dict[str, Any]:
    """Run one rank: four calls of an image over a transport, by name or as an object.

    The folder ``installed`` holds the package of the named transport.
    """
    if installed is not None:
        sys.path.insert(0, installed)
    kwargs = torch.load(inputs)
    kinds = {"object": CountingTransport(), "refusing": CountingTransport(most=1)}
    unet = dc.load(bundle, transport=kinds.get(transport, transport))
    with unet.image():
        outputs = [unet(**call(kwargs, i)) for i in range(4)]
    counted = unet._runner._channel  # type: ignore[attr-defined]
    found = {
        "name": unet.transport,
        "outputs": [o.numpy().tobytes() for o in outputs],
        "transfers": getattr(counted, "transfers", None),
        "nbytes": getattr(counted, "nbytes", None),
        "calls": kinds["object"].calls,
    }
    unet.close()
    return found
