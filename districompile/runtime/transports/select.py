# SPDX-License-Identifier: Apache-2.0
"""Choose the transport: the requested one, or the best that works between these ranks. All ranks agree."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import socket
from collections.abc import Sequence

import torch
import torch.distributed as dist

from districompile.errors import LaunchError
from districompile.runtime.transports.builtin import GlooTransport
from districompile.runtime.transports.gloo import GlooGroup
from districompile.runtime.transports.kinds import Facts, TransportKind
from districompile.runtime.transports.registry import AUTO, candidates, transport_name

_FACTS = 4096  # bytes


def check_transport(transport: str | TransportKind) -> None:
    """Check a transport. Raises :class:`InputError` for an unknown name, or an object that is no transport."""
    candidates(transport)


def choose_transport(
    wanted: str | TransportKind, device: torch.device, ranks: int, world: GlooGroup
) -> TransportKind:  # fmt: skip
    """Choose the transport of groups of ``ranks`` ranks that are consecutive in ``world``.

    Raises :class:`LaunchError`, on all ranks alike and with the reason, if the requested one cannot work.
    """
    check_transport(wanted)
    if world.ranks == 1:
        return GlooTransport()
    text = json.dumps(dataclasses.asdict(_facts(device))).encode().ljust(_FACTS)
    if len(text) > _FACTS:
        text = json.dumps(dataclasses.asdict(Facts(socket.gethostname(), "", (), False, False))).encode().ljust(_FACTS)
    gathered = world.all_gather(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    facts = [Facts(**json.loads(bytes(t.tolist()))) for t in gathered]
    return decide(wanted, [facts[i : i + ranks] for i in range(0, len(facts), ranks)])


def decide(wanted: str | TransportKind, groups: Sequence[Sequence[Facts]]) -> TransportKind:
    """Choose from the facts of all ranks, by group. Raises :class:`LaunchError` if no transport can be used."""
    reasons = []
    for kind in candidates(wanted):
        reason = next(filter(None, map(kind.unavailable_reason, groups)), None)
        if reason is None:
            return kind
        reasons.append(reason)
    raise LaunchError(
        f"the {transport_name(wanted)} transport cannot be used: {'; '.join(reasons)}; use --transport {AUTO}"
    )


def _facts(device: torch.device) -> Facts:
    host = socket.gethostname()
    if device.type != "cuda":
        return Facts(host, "", (), False, False)
    index = device.index if device.index is not None else torch.cuda.current_device()
    reaches = [
        _identity(i)
        for i in range(torch.cuda.device_count())
        if i != index and torch.cuda.can_device_access_peer(index, i)
    ]
    symmetric = importlib.util.find_spec("torch.distributed._symmetric_memory") is not None
    return Facts(host, _identity(index), tuple(reaches), dist.is_nccl_available(), symmetric)


def _identity(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
