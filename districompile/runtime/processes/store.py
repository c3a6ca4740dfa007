# SPDX-License-Identifier: Apache-2.0
"""The store at which the ranks of a run meet. Rank 0 holds it."""

from __future__ import annotations

from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from districompile.runtime.processes.loopback import bind, take_listener

__all__ = ["PrefixStore", "Store", "TCPStore", "open_store"]


def open_store(host: str, port: int, *, timeout: float) -> TCPStore:
    """Open the store of a run at one address, and no other: at the launcher's socket, if that is bound to it.

    A store that PyTorch opens by itself listens on every interface. Raises ``OSError`` if the address is not one of
    this machine, or in use.
    """
    listener = take_listener(host, port) or bind(host, port)
    return TCPStore(
        host,
        port,
        is_master=True,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
