# SPDX-License-Identifier: Apache-2.0
"""The ranks as the server sees them: started, watched, given drawings, and started again when one is lost."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from districompile.errors import Error
from districompile.runtime.processes.frames import FrameError, packed, read
from districompile.runtime.processes.supervisor import REASON, SILENCE, Handles, private_folder, reason_in
from districompile.serve.jobs import Drawing, Drawn, Facts, GroupOptions, Start

KEEPER = (sys.executable, "-m", "districompile.serve.supervisor")
_REASON = REASON
_STRAGGLE = 30.0  # seconds that other ranks may take to end a drawing that rank 0 has ended
_CANCEL = 60.0  # seconds that a cancelled drawing may take to end: one step, usually
_SHORT = 10.0  # seconds: a group that lives for less is not started again at once
_LONGEST_PAUSE = 30.0  # seconds between two starts
_TROUBLED = 3  # starts in a row that failed

Preview = Callable[[int, str], None]  # the number of a preview, and its file in base64


class GroupLost(Error):
    """A rank was lost during a drawing. The group starts again by itself."""


class Refused(Error):
    """The pipeline refused a drawing."""


class Stopped(Error):
    """A drawing was cancelled."""


@dataclasses.dataclass
class _Current:
    """A drawing that the ranks work on, or whose files rank 0 still makes. ``free``: the ranks can draw another."""

    job: Drawing
    preview: Preview
    pending: set[int]
    free: asyncio.Event
    outcomes: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    ended: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    first: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)  # rank 0 is free

    def left(self, rank: int) -> None:
        """Take it that a rank does not compute this drawing any more."""
        self.pending.discard(rank)
        if rank == 0:
            self.first.set()
        if not self.pending:
            self.free.set()


class _Run:
    """One start of the group."""

    def __init__(self) -> None:
        self.secret = secrets.token_hex(16)
        self.process: asyncio.subprocess.Process | None = None
        self.writers: dict[int, asyncio.StreamWriter] = {}
        self.last_message: dict[int, float] = {}
        self.memory: dict[int, int] = {}
        self.pids: dict[int, int] = {}
        self.handles = Handles()
        self.loaded: set[int] = set()
        self.facts: Facts | None = None
        self.lost = asyncio.Event()
        self.reason: str | None = None
        self.ready_at: float | None = None
        self.over = asyncio.Event()  # the launcher has said why, or has ended

    def kill(self) -> None:
        """End every process that is still there."""
        self.handles.kill(None if self.process is None else self.process.pid)

    def lose(self, reason: str) -> None:
        """Give the ranks up. The first reason holds, unless the launcher knows a better one."""
        self.reason = self.reason or reason
        self.lost.set()


class Group:
    """The resident ranks of one bundle.

    ``silence``: seconds after which a rank that sends nothing is lost. ``supervisor``: the command that launches the
    ranks. ``changed`` is called when the group becomes ready, or is lost.
    """

    def __init__(
        self, options: GroupOptions, *, silence: float = SILENCE, supervisor: Sequence[str] = KEEPER
    ) -> None:  # fmt: skip
        self._options, self._silence, self._supervisor = options, silence, tuple(supervisor)
        self.changed: Callable[[], None] = lambda: None
        self.facts: Facts | None = None  # of the newest start that was ready
        self.fatal: str | None = None  # why the first start failed
        self.restarts = 0
        self.problem: str | None = None  # why the group is not ready
        self._failures = 0
        self._ending = False
        self._run: _Run | None = None
        self._drawings: dict[str, _Current] = {}
        self._ready, self._started = asyncio.Event(), asyncio.Event()
        self._scratch: Path | None = None
        self._server: asyncio.Server | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether all ranks are loaded and alive."""
        return self._ready.is_set() and self._run is not None and not self._run.lost.is_set()

    @property
    def troubled(self) -> bool:
        """Whether the group does not come back: several starts in a row have failed."""
        return self.fatal is not None or (self._failures >= _TROUBLED and not self.ready)

    @property
    def memory(self) -> dict[int, int]:
        """The resident memory of each rank, in bytes."""
        return {} if self._run is None else dict(self._run.memory)

    @property
    def pids(self) -> dict[int, int]:
        """The process of each rank."""
        return {} if self._run is None else dict(self._run.pids)

    async def start(self) -> None:
        """Start the ranks. They load in the background: :meth:`wait_started`."""
        self._scratch = private_folder("serve")
        self._server = await asyncio.start_unix_server(self._connected, self._address)
        self._task = asyncio.create_task(self._keep(), name="districompile-group")

    async def wait_started(self) -> None:
        """Wait until the group was ready once, or its first start has failed (:attr:`fatal`)."""
        await self._started.wait()

    @property
    def _address(self) -> str:
        assert self._scratch is not None
        return str(self._scratch / "server")

    # Drawing

    async def draw(
        self, job: Drawing, preview: Preview, cancel: asyncio.Event, free: asyncio.Event | None = None
    ) -> Drawn:
        """Have the ranks draw, one drawing at a time. Set ``cancel`` to end it between two steps.

        ``free`` is set when the ranks can draw another. Rank 0 makes the files of this one meanwhile.

        Raises :class:`Refused`, :class:`Stopped`, and :class:`GroupLost` if a rank is lost before the drawing is done.
        """
        run = self._run
        if run is None or not self.ready:
            raise GroupLost(self.problem or "the ranks are not loaded")
        assert all(other.free.is_set() for other in self._drawings.values()), "one drawing at a time"
        current = _Current(job, preview, set(run.writers), free or asyncio.Event())
        self._drawings[job.id] = current
        events = (current.ended, run.lost, cancel, current.first, current.free)
        waits = [asyncio.create_task(e.wait()) for e in events]
        ended, lost, cancelled, first, freed = waits
        try:
            self._send(run, {"type": "draw", "job": job.model_dump(mode="json")})
            limit: float | None = None
            pending = set(waits)
            while not (ended.done() or lost.done()):
                left = None if limit is None else limit - time.monotonic()
                if left is not None and left <= 0:
                    late = ", ".join(f"rank {r}" for r in sorted(current.pending))
                    run.lose(f"{late} did not end a drawing in time")
                    break
                done, pending = await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if cancelled in done and not current.free.is_set():
                    self._send(run, {"type": "cancel", "id": job.id})
                    limit = time.monotonic() + _CANCEL
                if first in done:
                    limit = time.monotonic() + _STRAGGLE
                if freed in done:
                    limit = None  # making the files takes as long as it takes
            if not current.ended.is_set():
                await self._reason_of(run)
                raise GroupLost(run.reason or "a rank ended")
        finally:
            for wait in waits:
                wait.cancel()
            del self._drawings[job.id]
        return _result(current.outcomes[0])

    def _send(self, run: _Run, message: dict[str, Any]) -> None:
        data = packed(message)
        for writer in run.writers.values():
            writer.write(data)

    async def _reason_of(self, run: _Run) -> None:
        """Give the launcher a moment to name the rank that was lost first."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(run.over.wait(), _REASON)

    # Processes

    async def _keep(self) -> None:
        while True:
            run = self._run = _Run()
            began = time.monotonic()
            try:
                await self._live(run)
            except Exception as e:  # whatever it is, the ranks start again
                run.lose(f"the ranks cannot be started: {type(e).__name__}: {e}")
            finally:
                self._ready.clear()
                await self._clear(run)
            if self._ending:
                return
            self.problem = run.reason or "the ranks ended"
            if run.ready_at is None and not self._started.is_set():
                self.fatal = self.problem
                self._started.set()
                self.changed()
                return
            lived = 0.0 if run.ready_at is None else time.monotonic() - run.ready_at
            self._failures = 0 if lived > _SHORT else self._failures + 1
            self.restarts += 1
            self.changed()
            print(f"the ranks start again: {self.problem}", file=sys.stderr, flush=True)
            pause = 0.0 if self._failures < 2 else min(_LONGEST_PAUSE, 2.0 ** (self._failures - 1))
            await asyncio.sleep(max(0.0, pause - (time.monotonic() - began)))

    async def _live(self, run: _Run) -> None:
        """Start the supervisor, and return when it has ended or a rank is lost."""
        process = run.process = await asyncio.create_subprocess_exec(
            *self._supervisor,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal is the server's alone
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        orders = Start(address=self._address, secret=run.secret, options=self._options)
        process.stdin.write(orders.model_dump_json().encode() + b"\n")
        over, lost = asyncio.create_task(self._hear(run, process.stdout)), asyncio.create_task(run.lost.wait())
        try:
            while not (over.done() or lost.done()):
                await asyncio.wait({over, lost}, timeout=self._silence / 6, return_when=asyncio.FIRST_COMPLETED)
                self._check_silence(run)
            self.problem = run.reason
            await self._reason_of(run)  # the launcher ends as well, and knows more
            self.problem = run.reason
        finally:
            for task in (over, lost):
                task.cancel()

    async def _hear(self, run: _Run, said: asyncio.StreamReader) -> None:
        """Wait for the supervisor's one line, which says why the ranks ended, or for its end."""
        reason = reason_in(await said.readline())
        if reason is not None and not self._ending:
            run.reason = reason
        run.over.set()
        run.lose("the process that launches the ranks ended")

    def _check_silence(self, run: _Run) -> None:
        if run.ready_at is None:
            return
        rank = min(run.last_message, key=run.last_message.__getitem__)
        quiet = time.monotonic() - run.last_message[rank]
        if quiet > self._silence:
            run.lose(f"rank {rank} has given no sign of life for {quiet:.0f} s: it is stopped, or hangs")
            run.over.set()  # the launcher will know nothing better soon

    async def _clear(self, run: _Run) -> None:
        """End what is left of a start. No process stays."""
        for writer in run.writers.values():
            writer.close()
        process = run.process
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        if process.returncode is None:
            process.terminate()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(process.wait(), 4.0)
        run.kill()
        await process.wait()

    async def stop(self, within: float = 3.0) -> None:
        """End the ranks, by force after ``within`` seconds."""
        self._ending = True
        self._ready.clear()
        run = self._run
        if run is not None and run.process is not None and run.process.returncode is None:
            with contextlib.suppress(OSError):
                self._send(run, {"type": "end"})
            patience = within / 2 if run.ready_at is not None else 0.0
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(run.process.wait(), patience)
            if run.process.returncode is None:
                run.process.terminate()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(run.process.wait(), within / 2)
            run.kill()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._server is not None:
            self._server.close()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    # Connections of ranks

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        run = self._run
        known = False  # others that connect are sent away, and change nothing
        try:
            hello = await asyncio.wait_for(read(reader), 10.0)
            if run is None or hello is None or not hmac.compare_digest(str(hello.get("secret")), run.secret):
                return
            rank, pid = int(hello["rank"]), int(hello["pid"])
            if rank in run.writers:
                return
            known = True
            run.writers[rank], run.last_message[rank], run.pids[rank] = writer, time.monotonic(), pid
            run.handles.add(pid)
            while (message := await read(reader)) is not None:
                run.last_message[rank] = time.monotonic()
                self._take(run, rank, message)
            run.lose(f"rank {rank} ended")
        except (FrameError, ValidationError, KeyError, ValueError, TypeError, asyncio.TimeoutError) as e:
            if run is not None and known:
                run.lose(f"a rank sent something unknown ({type(e).__name__})")
        finally:
            writer.close()

    def _take(self, run: _Run, rank: int, message: dict[str, Any]) -> None:
        """Take a message of a rank."""
        kind, current = message["type"], self._drawings.get(str(message.get("id")))
        if kind == "beat":
            run.memory[rank] = int(message["memory"])
        elif kind == "ready":
            facts = Facts.model_validate(message["facts"])
            run.loaded.add(rank)
            if rank == 0:
                run.facts = facts
            if run.facts is not None and len(run.loaded) == run.facts.world_size and run is self._run:
                self.facts, self.problem, run.ready_at = run.facts, None, time.monotonic()
                self._ready.set()
                self._started.set()
                self.changed()
        elif current is not None:
            if kind == "preview" and rank == 0:
                current.preview(int(message["number"]), str(message["image"]))
            elif kind == "free":  # the files follow
                current.left(rank)
            elif kind == "done":
                current.outcomes[rank] = message
                current.left(rank)
                if current.free.is_set() and 0 in current.outcomes:
                    current.ended.set()


def _result(outcome: dict[str, Any]) -> Drawn:
    if outcome["outcome"] == "drawn":
        return Drawn.model_validate(outcome["drawn"])
    if outcome["outcome"] == "stopped":
        raise Stopped(str(outcome.get("error") or "cancelled"))
    raise Refused(str(outcome.get("error")))
