# SPDX-License-Identifier: Apache-2.0
"""Turn the events of an accepted request into a response: one JSON object, or a stream of server-sent events."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response

from districompile.serve.access import Receive, Scope, Send, answer
from districompile.serve.api import ApiError
from districompile.serve.dispatcher import Dispatcher, Event, Ticket
from districompile.serve.records import Pictures

_ALIVE = 15.0  # seconds between two comments of a stream that has nothing to say


class Answer(Response):
    """The response to an accepted request. A client that leaves cancels it.

    ``about`` are the fields that every picture of the request shares, as OpenAI's API names them.
    """

    def __init__(
        self, dispatcher: Dispatcher, ticket: Ticket, about: dict[str, Any], *, url: Callable[[str], str] | None,
        pictures: Pictures, event: str | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._dispatcher, self._ticket, self._about = dispatcher, ticket, about
        self._url, self._pictures, self._event = url, pictures, event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        talk = asyncio.create_task(self._stream(send) if self._event else self._whole(send))
        leave = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({talk, leave}, return_when=asyncio.FIRST_COMPLETED)
            if not talk.done():
                self._dispatcher.cancel(self._ticket.name, "disconnected")
            with contextlib.suppress(OSError):
                await talk
        finally:
            self._dispatcher.cancel(self._ticket.name, "disconnected")  # if this response was ended from outside
            leave.cancel()
            ticket = self._ticket
            scope["record"] |= {
                "outcome": ticket.outcome, "waiting_s": round(ticket.waited, 6),
                "drawing_s": round(ticket.drawing, 6), "encoding_s": round(ticket.encoding, 6),
            } if ticket.started is not None and ticket.outcome == "drawn" else {"outcome": ticket.outcome}  # fmt: skip

    async def _events(self) -> AsyncIterator[Event | None]:
        """Yield the events of the request; None where nothing has happened for a while."""
        while True:
            try:
                event = await asyncio.wait_for(self._ticket.events.get(), _ALIVE)
            except asyncio.TimeoutError:
                yield None
                continue
            yield event
            if event.kind in ("end", "error"):
                return

    async def _whole(self, send: Send) -> None:
        data = []
        async for event in self._events():
            if event is not None and event.kind == "picture":
                entry: dict[str, Any] = {"seed": event.seed}
                if self._url is None:
                    entry["b64_json"] = event.image
                else:
                    kept = self._pictures.keep(base64.b64decode(event.image), self._about["output_format"])
                    entry["url"] = self._url(kept)
                data.append(entry)
            elif event is not None and event.error is not None:
                await answer(send, event.error)
                return
        body = json.dumps({"created": int(time.time()), "data": data, **self._about}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"),
                   (b"x-accel-buffering", b"no")]  # fmt: skip
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for event in self._events():
            if event is None:
                text = ": waiting\n\n"
            elif event.kind == "error":
                assert event.error is not None
                text = _sse("error", event.error.body)
            elif event.kind == "end":
                break
            else:
                text = self._picture_event(event)
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    def _picture_event(self, event: Event) -> str:
        partial = event.kind == "preview"
        kind = f"{self._event}.{'partial_image' if partial else 'completed'}"
        fields = {"type": kind, "created_at": int(time.time()), "b64_json": event.image, "seed": event.seed}
        if partial:
            fields["partial_image_index"] = event.number
        return _sse(kind, {**fields, **self._about})


def _sse(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"


async def _left(receive: Receive) -> None:
    """Wait until the client has left."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return


def check_json(content_type: str) -> None:
    """Raise :class:`ApiError` for a body that is not announced as JSON: a page of another site can send others."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "Send the body as 'Content-Type: application/json'.", code="unsupported_media_type")
