# SPDX-License-Identifier: Apache-2.0
"""A group of worker processes that hold the ranks of bundles, as the process sees it that calls them."""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import itertools
import json
import os
import secrets
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from districompile import errors
from districompile.errors import InputError, LaunchError
from districompile.runtime.processes.frames import FrameError, receive, send
from districompile.runtime.processes.supervisor import REASON, SILENCE, Handles, private_folder, reason_in
from districompile.runtime.workers.memory import TensorReceiver, TensorSender

SUPERVISOR = (sys.executable, "-m", "districompile.runtime.workers.supervisor")
START_TIMEOUT = 120.0  # seconds
_PATIENCE = 2.0  # seconds that ranks may take to end by themselves
_MEMORY = ("/dev/shm",)
# Of another launcher, which would make the workers its ranks.
_FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")

Reply = dict[str, Any]


@dataclasses.dataclass
class _Resources:
    """All that has to be ended and removed."""

    folder: Path
    listener: socket.socket
    owner: int
    process: subprocess.Popen[bytes] | None = None
    ranks: dict[int, socket.socket] = dataclasses.field(default_factory=dict)
    handles: Handles = dataclasses.field(default_factory=Handles)
    ended: bool = False


class Workers:
    """``ranks`` processes that hold the ranks of one or several bundles: ``dc.load(bundle, workers=workers)``.

    They start in the background, and end with this process, however that ends, with :meth:`close`, or when nothing
    refers to them any more. Several bundles of one group share its processes, so that each GPU has one.

    ``log_dir`` is a folder for their output. Raises :class:`InputError` for less than one rank, and
    :class:`LaunchError` inside a rank of another launcher.
    """

    def __init__(
        self, ranks: int, *, log_dir: str | os.PathLike[str] | None = None, start_timeout: float = START_TIMEOUT
    ) -> None:  # fmt: skip
        if ranks < 1:
            raise InputError(f"workers={ranks}: at least 1 is needed")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise LaunchError("this process is a rank of torchrun: load the bundle without workers in each of them")
        self.ranks = ranks
        self._lock = threading.RLock()
        self._numbers = itertools.count()
        self._pids: dict[int, int] = {}
        self._heard: dict[int, float] = {}
        self._forgotten: list[int] = []
        self._deadline = time.monotonic() + start_timeout
        self._lost: str | None = None
        self._secret = secrets.token_hex(16)
        folder = private_folder("workers", _MEMORY)
        self._sender, self._receiver = TensorSender(folder, "in"), TensorReceiver(last=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._resources = _Resources(folder, listener, os.getpid())
        self._finalizer = weakref.finalize(self, _end, self._resources)
        listener.bind(str(folder / "owner"))
        listener.listen(ranks)
        orders = {"address": str(folder / "owner"), "secret": self._secret, "ranks": ranks,
                  "log_dir": None if log_dir is None else str(log_dir)}  # fmt: skip
        environment = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
        # Workers import what this process can import.
        environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(p or os.getcwd() for p in sys.path))
        process = self._resources.process = subprocess.Popen(
            SUPERVISOR, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
            start_new_session=True,  # Ctrl-C in a terminal is this process's alone
        )  # fmt: skip
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # a process that has ended is found when it is waited for
            process.stdin.write(json.dumps(orders).encode() + b"\n")
            process.stdin.flush()

    @property
    def alive(self) -> bool:
        """Whether the workers can be called. False after one of them was lost, and after :meth:`close`."""
        if self._lost is None:
            with self._lock, contextlib.suppress(LaunchError):
                self._look(0.0, {})
        return self._lost is None

    @property
    def pids(self) -> dict[int, int]:
        """The process of each rank that has started."""
        return {rank: int(self._pids[rank]) for rank in sorted(self._pids)}

    def ask(
        self, message: Mapping[str, Any], tensors: Sequence[Tensor] = (), silence: float | None = None
    ) -> dict[int, Reply]:  # fmt: skip
        """Send a message to all ranks, and return their replies. ``tensors`` reach them through shared memory.

        A rank that sends no sign of life for ``silence`` seconds counts as lost. Libraries that are imported send none.
        Raises the error that a rank answers with, and :class:`LaunchError` if a rank is lost before it has answered.
        """
        with self._lock:
            self._start()
            while self._forgotten:
                self.ask({"type": "close", "module": self._forgotten.pop()})
            number = next(self._numbers)
            try:
                described = self._sender.put(tensors) if tensors else None
                for connection in self._resources.ranks.values():
                    send(connection, {**message, "id": number, "tensors": described})
            except OSError as e:
                self._lose_with_reason(f"a worker has ended ({e.strerror or e})")
            except BaseException:
                self._lose("a call was interrupted while it was sent")  # to some of them, which are out of step now
                raise
            return self._replies(number, SILENCE if silence is None else silence)

    def tensors(self, reply: Reply) -> list[Tensor]:
        """Return copies of the tensors of a reply, on the CPU."""
        described = reply.get("tensors")
        return [] if described is None else [t.clone() for t in self._receiver.get(described)]

    def forget(self, module: int) -> None:
        """Close a module on the workers before the next message. It may be called while another one is sent."""
        self._forgotten.append(module)

    def close(self) -> None:
        """End the workers. Later calls are refused."""
        with self._lock:
            self._lost = self._lost or "they were closed"
            self._sender.close()
        self._finalizer()

    def __repr__(self) -> str:
        return f"Workers(ranks={self.ranks}, {'alive' if self._lost is None else 'ended'})"

    # Waiting

    def _start(self) -> None:
        """Wait until all ranks have connected."""
        self._check()
        while len(self._pids) < self.ranks:
            left = self._deadline - time.monotonic()
            if left <= 0:
                self._lose("they did not start in time")
            self._look(min(left, 1.0), {})

    def _replies(self, number: int, silence: float) -> dict[int, Reply]:
        """Wait for the replies to a message. Those to an earlier one, whose caller was interrupted, are dropped."""
        found: dict[int, Reply] = {}
        now = time.monotonic()
        self._heard = dict.fromkeys(self._resources.ranks, now)
        while len(found) < self.ranks:
            for rank, message in self._look(silence / 6, self._heard, silence).items():
                if message.get("id") == number:
                    found[rank] = message
        failed = next((found[r] for r in sorted(found) if found[r]["type"] == "failed"), None)
        if failed is not None:
            raise _error(failed)
        return dict(sorted(found.items()))

    def _look(self, seconds: float, last_seen: dict[int, float], silence: float = SILENCE) -> dict[int, Reply]:
        """Take what has arrived, after at most ``seconds``. Return a message of each rank that is no sign of life.

        Raises :class:`LaunchError` for a rank that has ended, or has long been silent, if ``last_seen`` has its time.
        """
        self._check()
        resources = self._resources
        process = resources.process
        assert process is not None and process.stdout is not None
        by_socket = {connection: rank for rank, connection in resources.ranks.items()}
        waiting: list[Any] = [*by_socket, process.stdout]
        if len(by_socket) < self.ranks:
            waiting.append(resources.listener)
        ready = select.select(waiting, [], [], seconds)[0]
        found = {}
        for source in ready:
            if source is resources.listener:
                self._connect()
            elif source in by_socket:
                rank = by_socket[source]
                message = self._received(source, rank)
                last_seen[rank] = time.monotonic()
                if message["type"] != "beat":
                    found[rank] = message
        if process.stdout in ready:
            self._lose(reason_in(process.stdout.readline()) or "the process that launches the workers has ended")
        for rank, at in last_seen.items():
            quiet = time.monotonic() - at
            if quiet > silence and rank not in found:
                self._lose(f"rank {rank} has given no sign of life for {quiet:.0f} s: it is stopped, or hangs")
        return found

    def _connect(self) -> None:
        connection, _ = self._resources.listener.accept()
        connection.settimeout(10.0)
        try:
            hello = receive(connection)
            if hello is None or not hmac.compare_digest(str(hello.get("secret")), self._secret):
                raise FrameError("unknown")
            rank, pid = int(hello["rank"]), int(hello["pid"])
        except (OSError, FrameError, KeyError, ValueError, TypeError):
            connection.close()  # something else that connected, and changes nothing
            return
        connection.settimeout(None)
        self._resources.ranks[rank] = connection
        self._pids[rank] = pid
        self._resources.handles.add(pid)

    def _received(self, connection: socket.socket, rank: int) -> Reply:
        try:
            message = receive(connection)
        except (OSError, FrameError) as e:
            message = None
            problem = f"rank {rank} sent something unknown ({type(e).__name__})"
        else:
            problem = f"rank {rank} has ended"
        if message is None:
            self._lose_with_reason(problem)
        assert message is not None
        return message

    def _check(self) -> None:
        if self._lost is not None:
            raise LaunchError(f"the workers have ended: {self._lost}; load the bundle again")

    def _lose_with_reason(self, otherwise: str) -> None:
        """Give the launcher a moment to say which rank was lost first, and why."""
        process = self._resources.process
        assert process is not None and process.stdout is not None
        said = b""
        if select.select([process.stdout], [], [], REASON)[0]:
            said = process.stdout.readline()
        self._lose(reason_in(said) or otherwise)

    def _lose(self, reason: str) -> None:
        """End all workers. Raises :class:`LaunchError`."""
        self._lost = self._lost or reason
        self._sender.close()
        self._finalizer()
        self._check()


def _error(reply: Reply) -> errors.Error:
    """Return the error of a rank as the class that it had there, if that is one of :mod:`districompile.errors`."""
    kind = getattr(errors, str(reply.get("kind")), errors.Error)
    known = isinstance(kind, type) and issubclass(kind, errors.Error)
    return (kind if known else errors.Error)(str(reply.get("error")))


def _end(resources: _Resources) -> None:
    """End the ranks, by force if they do not end by themselves, and remove the folder. No process stays."""
    if resources.ended or os.getpid() != resources.owner:  # a fork of the owner ends nothing
        return
    resources.ended = True
    process = resources.process
    for connection in resources.ranks.values():
        with contextlib.suppress(OSError, FrameError):
            connection.settimeout(0.5)
            send(connection, {"type": "end"})
    if process is not None:
        complete = len(resources.ranks) > 0
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE if complete else 0.0)
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            if process.returncode is None:
                process.terminate()
            process.wait(2 * _PATIENCE)
        resources.handles.kill(process.pid)
        process.wait()
    for connection in (*resources.ranks.values(), resources.listener):
        connection.close()
    shutil.rmtree(resources.folder, ignore_errors=True)
