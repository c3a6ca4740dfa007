# SPDX-License-Identifier: Apache-2.0
"""Keep the sockets on which ranks listen off the network: on one machine they use the loopback interface.

Nothing here imports PyTorch.
"""

from __future__ import annotations

import ipaddress
import os
import socket

LOOPBACK = "127.0.0.1"

_given: list[socket.socket] = []  # bound by the launcher of this process


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket to one address, and no other. Port 0 selects a free port.

    Raises ``OSError`` if the address is not one of this machine, or in use.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def give_listener(listener: socket.socket) -> None:
    """Keep a socket that the launcher has bound, until this process, as rank 0, opens the store there."""
    _given.append(listener)


def take_listener(host: str, port: int) -> socket.socket | None:
    """Return the kept socket, if it is bound to ``host`` and ``port``."""
    found = next((s for s in _given if s.getsockname()[:2] == (host, port)), None)
    _given.clear()
    return found


def on_one_machine() -> bool:
    """Return whether all ranks run on this machine, according to the launcher's environment."""
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
    """Return the variables that make gloo and NCCL listen on the loopback interface; none without such an interface."""
    try:
        name = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    except OSError:
        name = None
    return {} if name is None else {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}


def stay_on_machine() -> None:
    """Make gloo and NCCL listen on the loopback interface alone if all ranks run on this machine.

    Variables that the user has set stay as they are.
    """
    if on_one_machine():
        for name, value in loopback_interface().items():
            os.environ.setdefault(name, value)
