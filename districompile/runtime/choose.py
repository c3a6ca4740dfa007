"""Which transport to use: asked for, or the fastest that works between these ranks. All ranks choose alike."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import socket
from collections.abc import Sequence

import torch
import torch.distributed as dist

from districompile.errors import InputError, LaunchError
from districompile.runtime.gloo import GlooLink, GlooTransport, new_group
from districompile.runtime.links import Link
from districompile.runtime.liveness import FOREVER, Liveness
from districompile.runtime.lockstep import LockstepLinks

TRANSPORTS = ("auto", "peer", "nccl", "gloo")
_FACTS = 4096  # bytes


@dataclasses.dataclass(frozen=True)
class Facts:
    """What one rank knows of itself: its host, its GPU ("" without one), the GPUs whose memory that reaches,
    and whether its PyTorch has NCCL and symmetric memory."""

    host: str
    gpu: str
    reaches: tuple[str, ...]
    nccl: bool
    symmetric: bool


def check_transport(name: str) -> None:
    """Raise :class:`InputError` for a name that is none of :data:`TRANSPORTS`."""
    if name not in TRANSPORTS:
        raise InputError(f"there is no transport {name!r}: use one of {', '.join(TRANSPORTS)}")


def choose_transport(wanted: str, device: torch.device, ranks: int, world: GlooTransport) -> str:
    """The transport of groups of ``ranks`` ranks that follow each other in ``world``. Raises :class:`LaunchError`, on
    all ranks alike, where the one that is wanted cannot work, with the reason."""
    check_transport(wanted)
    if world.ranks == 1 or (wanted == "gloo"):
        return "gloo"
    text = json.dumps(dataclasses.asdict(_facts(device))).encode().ljust(_FACTS)
    if len(text) > _FACTS:
        text = json.dumps(dataclasses.asdict(Facts(socket.gethostname(), "", (), False, False))).encode().ljust(_FACTS)
    gathered = world.all_gather(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    facts = [Facts(**json.loads(bytes(t.tolist()))) for t in gathered]
    return decide(wanted, [facts[i : i + ranks] for i in range(0, len(facts), ranks)])


def decide(wanted: str, groups: Sequence[Sequence[Facts]]) -> str:
    """The choice, from the facts of all ranks by group."""
    obstacles = {
        "peer": next(filter(None, map(_no_peer, groups)), None),
        "nccl": next(filter(None, map(_no_nccl, groups)), None),
    }
    if wanted == "auto":
        return next((name for name, obstacle in obstacles.items() if obstacle is None), "gloo")
    obstacle = obstacles.get(wanted)
    if obstacle is not None:
        raise LaunchError(f"the {wanted} transport cannot be used: {obstacle}; use --transport auto")
    return wanted


def _no_gpus(group: Sequence[Facts]) -> str | None:
    if not all(f.gpu for f in group):
        return f"rank {next(i for i, f in enumerate(group) if not f.gpu)} does not compute on an NVIDIA GPU"
    if len({(f.host, f.gpu) for f in group}) < len(group):
        return "several ranks share one GPU"
    return None


def _no_nccl(group: Sequence[Facts]) -> str | None:
    if (reason := _no_gpus(group)) is not None:
        return reason
    return None if all(f.nccl for f in group) else "this PyTorch has no NCCL"


def _no_peer(group: Sequence[Facts]) -> str | None:
    if (reason := _no_gpus(group)) is not None:
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


def make_link(
    name: str, group: dist.ProcessGroup, part: int, parts: int, device: torch.device, liveness: Liveness
) -> Link:
    """The link of this rank in ``group``, which is number ``part`` of ``parts`` groups of equal size that follow each
    other in the world. All processes must call this alike."""
    if name == "gloo":
        return GlooLink(group, device, liveness)
    ranks = dist.get_world_size(group)
    if ranks == 1:  # guidance alone is split: nothing is exchanged within a half
        alone = LockstepLinks(1, device).links[0]
        alone.capturable = True
        return alone
    if name == "nccl":
        from districompile.runtime.nccl import NcclLink

        groups = [new_group(range(g * ranks, (g + 1) * ranks), FOREVER, "nccl") for g in range(parts)]
        return NcclLink(groups[part], GlooTransport(group, liveness=liveness), device, liveness)
    from districompile.runtime.peer import PeerLink

    return PeerLink(group, device, liveness)
