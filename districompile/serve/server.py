# SPDX-License-Identifier: Apache-2.0
"""Run the server: bind its address, start the ranks, answer until a signal, and end within ten seconds."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import uvicorn

from districompile.errors import Error
from districompile.progress import terminal_progress
from districompile.serve.app import DRAIN, STOP, ServeOptions, create_app
from districompile.serve.dispatcher import Dispatcher
from districompile.serve.group import KEEPER, Group
from districompile.serve.jobs import GroupOptions

_CONNECTIONS = 1024  # at a time
_SHORTEST_TOKEN = 16


class ServeError(Error):
    """The server cannot be started as asked."""


def bind(host: str, port: int, token: str | None) -> socket.socket:
    """Return a listening socket. Raise :class:`ServeError` for an address that cannot be had, or is open to others
    without a token."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as e:
        raise ServeError(f"--host {host}: there is no such address here ({e})") from e
    loopback = ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
    if token is None and not loopback:
        raise ServeError(
            f"--host {host} is open to other machines: give --token or --token-file, or leave --host at 127.0.0.1"
        )
    if token is not None and (len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
        raise ServeError(f"the token must have at least {_SHORTEST_TOKEN} printable ASCII characters")
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(256)
    except OSError as e:
        listener.close()
        raise ServeError(f"--host {host} --port {port}: {e.strerror}") from e
    return listener


def allowed_hosts(host: str, token: str | None) -> frozenset[str] | None:
    """Return the names under which a server without a token is asked; None for any where there is a token."""
    return None if token is not None else frozenset({"localhost", "127.0.0.1", "::1", host.lower()})


async def serve(
    options: ServeOptions, ranks: GroupOptions, listener: socket.socket, host: str,
    supervisor: Sequence[str] = KEEPER,
) -> None:  # fmt: skip
    """Serve until SIGTERM or SIGINT. ``supervisor``: the command that launches the ranks.

    Raises :class:`ServeError` if they cannot be started at first.
    """
    group = Group(ranks, supervisor=supervisor)
    app = create_app(options, group)
    dispatcher: Dispatcher = app.state.dispatcher
    server = _Server(uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=1, server_header=False,
        limit_concurrency=_CONNECTIONS, http="h11", ws="none", proxy_headers=False,
    ))  # fmt: skip
    signalled, hurried = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurried if signalled.is_set() else signalled).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    await group.start()
    answering = asyncio.create_task(server.serve([listener]))
    waits = [asyncio.create_task(e) for e in (signalled.wait(), group.wait_started())]
    try:
        with terminal_progress().task("loading the ranks"):
            await asyncio.wait({*waits, answering}, return_when=asyncio.FIRST_COMPLETED)
        if group.ready and not signalled.is_set():
            print(f"serving {options.limits.name} at {_url(listener, host)}", file=sys.stderr, flush=True)
        if group.fatal is None:
            await asyncio.wait({waits[0], answering}, return_when=asyncio.FIRST_COMPLETED)
            await _first(dispatcher.end(DRAIN), hurried.wait())
            await dispatcher.end(0.0)
    finally:
        await asyncio.sleep(0.1)  # the last answers are on their way
        server.should_exit = True
        for task in waits:
            task.cancel()
        await group.stop(STOP)
        await answering
    if group.fatal is not None:
        raise ServeError(group.fatal)


class _Server(uvicorn.Server):
    """A server that leaves signals to whoever runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _first(*work: Any) -> None:
    tasks = [asyncio.ensure_future(w) for w in work]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def _url(listener: socket.socket, host: str) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}"
