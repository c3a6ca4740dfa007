# SPDX-License-Identifier: Apache-2.0
"""The queue between the HTTP server and the ranks: bounded, one drawing at a time, nothing lost that was accepted."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from districompile.serve.api import ApiError
from districompile.serve.group import GroupLost, Preview, Refused, Stopped
from districompile.serve.jobs import Drawing, Drawn, Facts

Why = Literal["cancelled", "disconnected", "ending", "too_long"]
_ANSWERS: dict[Why, tuple[int, str]] = {
    "cancelled": (499, "The request was cancelled."),
    "disconnected": (499, "The client has left."),
    "ending": (503, "The server is ending."),
    "too_long": (504, "The drawing took too long."),
}


class Artists(Protocol):
    """What draws: :class:`districompile.serve.group.Group`, or something like it in tests."""

    facts: Facts | None
    problem: str | None

    @property
    def ready(self) -> bool: ...

    @property
    def troubled(self) -> bool: ...

    async def draw(
        self, job: Drawing, preview: Preview, cancel: asyncio.Event, free: asyncio.Event | None = None
    ) -> Drawn: ...


@dataclasses.dataclass(frozen=True)
class Event:
    """An event for a client: a preview, a picture (files in base64), the end, or an error."""

    kind: Literal["preview", "picture", "end", "error"]
    image: str = ""
    number: int = 0
    seed: int = 0
    error: ApiError | None = None


class Ticket:
    """One accepted request. ``events`` ends with exactly one "end" or "error"."""

    def __init__(self, name: str, jobs: list[Drawing], count: int) -> None:
        self.name, self.jobs, self.count = name, jobs, count
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.stop = asyncio.Event()
        self.why: Why | None = None
        self.outcome: str | None = None
        self.accepted = time.perf_counter()
        self.started: float | None = None
        self.shown = 0  # pictures
        self.waited = 0.0  # seconds in the queue, or for the ranks
        self.drawing = 0.0  # seconds of the pipeline
        self.encoding = 0.0  # seconds of making files

    @property
    def over(self) -> bool:
        """Whether the client has its last event."""
        return self.outcome is not None

    def cancel(self, why: Why) -> None:
        """Answer the request, and end its drawing between two steps."""
        if not self.over:
            self.why = why
            status, message = _ANSWERS[why]
            self.fail(ApiError(status, message, code=why, headers={"x-should-retry": "false"} if status == 499 else {}))
        self.stop.set()

    def finish(self) -> None:
        """Tell the client that all pictures were drawn."""
        if not self.over:
            self.outcome = "drawn"
            self.events.put_nowait(Event("end"))

    def fail(self, error: ApiError) -> None:
        """Tell the client why there are no more pictures."""
        if not self.over:
            self.outcome = error.code or "failed"
            self.events.put_nowait(Event("error", error=error))

    def show(self, event: Event) -> None:
        """Tell the client of a preview or a picture."""
        if not self.over:
            self.events.put_nowait(event)


class Dispatcher:
    """Accept requests, and have them drawn in order. The next one is drawn while the files of the last are made.

    ``bound``: how many may wait besides the one being drawn. ``limit``: seconds that the drawing of one request may
    take.
    """

    def __init__(self, group: Artists, bound: int, limit: float = 600.0) -> None:
        self._group, self._bound, self._limit = group, bound, limit
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._changed = asyncio.Event()
        self._tickets: dict[str, Ticket] = {}
        self._task: asyncio.Task[None] | None = None
        self._before: asyncio.Task[bool] | None = None  # the drawing before the present one
        self._answering: set[asyncio.Task[None]] = set()  # requests that were drawn, and whose files are being made
        self._recent = 0.0  # seconds that a request took, lately
        self.running: Ticket | None = None
        self.ending = False
        self.on_drawn: Callable[[Ticket, Drawn], None] = lambda ticket, drawn: None

    @property
    def waiting(self) -> int:
        """The number of accepted requests that wait."""
        return len(self._waiting)

    def start(self) -> None:
        """Begin to have requests drawn."""
        self._task = asyncio.create_task(self._work(), name="districompile-dispatcher")

    def changed(self) -> None:
        """Look again whether the ranks are ready."""
        self._changed.set()

    def check_open(self) -> Facts:
        """Return the facts of the ranks. Raise :class:`ApiError` if no request can be accepted now."""
        if self.ending:
            raise ApiError(503, "The server is ending.", code="ending")
        if self._group.facts is None:
            raise ApiError(503, "The ranks are still loading.", code="loading", headers={"retry-after": "5"})
        if self._group.troubled:
            raise ApiError(503, f"The ranks cannot be started: {self._group.problem}", code="ranks_unavailable")
        return self._group.facts

    def accept(self, name: str, jobs: list[Drawing], count: int) -> Ticket:
        """Put a request at the end of the queue. Raise :class:`ApiError` where there is no room."""
        self.check_open()
        if name in self._tickets:
            raise ApiError(409, f"The request id {name!r} is in use.", code="id_in_use", param="x-request-id",
                           headers={"x-should-retry": "false"})  # fmt: skip
        busy = self.running is not None or not self._group.ready
        if len(self._waiting) >= self._bound + (0 if busy else 1):
            wait = max(1, round(self._recent * (len(self._waiting) + 1)))
            raise ApiError(
                429, f"The queue is full: {len(self._waiting)} requests wait.", code="queue_full",
                headers={"retry-after": str(min(wait, 600))},
            )  # fmt: skip
        ticket = self._tickets[name] = Ticket(name, jobs, count)
        self._waiting.append(ticket)
        self._changed.set()
        return ticket

    def cancel(self, name: str, why: Why = "cancelled") -> bool:
        """Cancel an accepted request. Return whether there was one."""
        ticket = self._tickets.get(name)
        if ticket is None or ticket.over:
            return False
        ticket.cancel(why)
        if ticket in self._waiting:
            self._waiting.remove(ticket)
            self._tickets.pop(name, None)
        return True

    async def end(self, within: float) -> None:
        """Accept nothing more, and go on for ``within`` seconds. Then answer what is left."""
        self.ending = True
        self._changed.set()
        limit = time.monotonic() + within
        while (self.running is not None or self._waiting or self._answering) and time.monotonic() < limit:
            await asyncio.sleep(0.02)
        for name in list(self._tickets):
            self.cancel(name, "ending")

    async def close(self) -> None:
        """Stop having requests drawn."""
        for task in (*filter(None, [self._task]), *self._answering):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _work(self) -> None:
        while True:
            while not self._waiting:
                self._changed.clear()
                await self._changed.wait()
            if not self._group.ready:
                if self._group.troubled:  # their clients are not to wait for what does not come back
                    while self._waiting:
                        ticket = self._waiting.popleft()
                        self._tickets.pop(ticket.name, None)
                        ticket.fail(ApiError(503, f"The ranks cannot be started: {self._group.problem}",
                                             code="ranks_unavailable"))  # fmt: skip
                    continue
                self._changed.clear()
                await self._changed.wait()
                continue
            ticket = self.running = self._waiting.popleft()
            ticket.started = time.perf_counter()
            ticket.waited = ticket.started - ticket.accepted
            timer = asyncio.get_running_loop().call_later(self._limit, ticket.cancel, "too_long")
            try:
                drawings = await self._draw(ticket)
            finally:
                self.running = None
                took = time.perf_counter() - ticket.started
                self._recent = took if not self._recent else 0.7 * self._recent + 0.3 * took
            answering = asyncio.create_task(self._answer(ticket, drawings, timer))
            self._answering.add(answering)
            answering.add_done_callback(self._answering.discard)

    async def _draw(self, ticket: Ticket) -> list[asyncio.Task[bool]]:
        """Have all pictures of a request drawn. Return its drawings when the ranks are free, in order."""
        drawings: list[asyncio.Task[bool]] = []
        for number in range(len(ticket.jobs)):
            if ticket.stop.is_set() or any(d.done() and not _succeeded(d) for d in drawings):
                break
            free = asyncio.Event()
            drawing = asyncio.create_task(self._draw_one(ticket, number, free, drawings[-1] if drawings else None))
            drawings.append(drawing)
            freed = asyncio.create_task(free.wait())
            try:
                await asyncio.wait({drawing, freed}, return_when=asyncio.FIRST_COMPLETED)
                # Files of one drawing may be left to make, not of more: those would be requests beyond the bound
                if self._before is not None:
                    await asyncio.wait({self._before})
                self._before = drawing
            except asyncio.CancelledError:  # the server ends
                for each in drawings:
                    each.cancel()
                raise
            finally:
                freed.cancel()
        return drawings

    async def _draw_one(
        self, ticket: Ticket, number: int, free: asyncio.Event, before: asyncio.Task[bool] | None
    ) -> bool:
        """Have one drawing of a request made, and show it behind the one ``before``. Return whether that succeeded."""
        job = ticket.jobs[number]

        def preview(at: int, image: str) -> None:
            ticket.show(Event("preview", image, number * job.previews + at, job.seed))

        try:
            drawn = await self._group.draw(job, preview, ticket.stop, free)
        except Refused as e:
            ticket.fail(ApiError(400, f"The pipeline refused: {e}", code="refused"))
            return False
        except Stopped as e:
            ticket.fail(ApiError(500, f"The ranks gave the drawing up: {e}", code="failed"))
            return False
        except GroupLost as e:
            ticket.fail(ApiError(500, f"The drawing was lost: {e}. The ranks start again.", code="rank_lost"))
            return False
        if before is not None and not await before:
            return False
        ticket.drawing += drawn.seconds
        ticket.encoding += drawn.encoding
        if drawn.not_finite:
            names = " and the ".join(drawn.not_finite)
            ticket.fail(ApiError(500, f"The {names} has NaN or infinite values: convert the model with --dtype "
                                 "float32 or bfloat16", code="not_finite"))  # fmt: skip
            return False
        self.on_drawn(ticket, drawn)
        for place, image in enumerate(drawn.images[: ticket.count - ticket.shown]):
            ticket.show(Event("picture", image, ticket.shown, job.seed + place))
            ticket.shown += 1
        return True

    async def _answer(self, ticket: Ticket, drawings: Sequence[asyncio.Task[bool]], timer: asyncio.TimerHandle) -> None:
        """Answer a request when its drawings are done."""
        try:
            if all([await drawing for drawing in drawings]) and len(drawings) == len(ticket.jobs):
                ticket.finish()
        except Exception:  # a defect fails one request, not those that wait
            traceback.print_exc()
        finally:
            timer.cancel()
            for drawing in drawings:
                drawing.cancel()
            self._tickets.pop(ticket.name, None)
            ticket.fail(ApiError(500, "The drawing was not made.", code="failed"))  # unless it was answered


def _succeeded(drawing: asyncio.Task[bool]) -> bool:
    return not drawing.cancelled() and drawing.exception() is None and drawing.result()
