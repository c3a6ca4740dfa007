"""Keep what ranks listen on off the network: stores and transports on one machine use the loopback interface."""

from __future__ import annotations

import ipaddress
import os
import socket
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

__all__ = ["LOOPBACK", "PrefixStore", "Store", "TCPStore", "bind_store", "loopback_interface", "stay_on_machine"]

LOOPBACK = "127.0.0.1"


def bind_store(host: str, port: int, *, timeout: float) -> tuple[TCPStore, int]:
    """Open the store of a run at one address, and no other; port 0 takes a free one, which is returned.

    A store that PyTorch opens by itself listens on every interface. Raises ``OSError`` where the address is not one of
    this machine.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        bound = int(listener.getsockname()[1])
        store = TCPStore(
            host,
            bound,
            is_master=True,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
    return store, bound


def on_one_machine() -> bool:
    """Whether all ranks run on this machine, as far as the launcher's environment tells."""
    world = os.environ.get("WORLD_SIZE")
    if world is not None and world == os.environ.get("LOCAL_WORLD_SIZE"):
        return True
    host = os.environ.get("MASTER_ADDR", "")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def loopback_interface() -> dict[str, str]:
    """The variables that make gloo and NCCL listen on the loopback interface; none where there is no such interface."""
    try:
        name = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    except OSError:
        name = None
    return {} if name is None else {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}


def stay_on_machine() -> None:
    """Let gloo and NCCL listen on the loopback interface alone where all ranks run on this machine; what the user has
    set stays as it is."""
    if on_one_machine():
        for name, value in loopback_interface().items():
            os.environ.setdefault(name, value)
