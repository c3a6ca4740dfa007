# SPDX-License-Identifier: Apache-2.0
"""What every request passes: who may ask, how much may be sent, and the record of what was answered."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from districompile.serve.api import ApiError
from districompile.serve.records import Metrics, RequestLog

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MOST_BODY = 64 << 20  # bytes
_BODY_SECONDS = 30.0  # that a client may take to send the next part of a body
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
# Requests without a secret: probes, the page itself, and pictures, whose names are secrets.
_OPEN = re.compile(r"/(healthz|readyz|page\.(js|css)|v1/files/[^/]+)?")
_UNLOGGED = ("/healthz", "/readyz", "/metrics")


class _TooLate(Exception):
    """A client stopped sending in the middle of a body."""


class Access:
    """An ASGI middleware around the server.

    ``token``: the bearer token that requests need, None for none. ``hosts``: the names under which the server may be
    asked, None for any. A page of another site, whose name resolves to this machine, is kept out that way.
    """

    def __init__(
        self, app: App, *, token: str | None, hosts: frozenset[str] | None, metrics: Metrics, log: RequestLog | None
    ) -> None:
        self._app, self._token, self._hosts = app, token, hosts
        self._metrics, self._log = metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        given = headers.get("x-request-id", "")
        name = given if _ID.fullmatch(given) else secrets.token_hex(12)
        scope["name"] = name
        record: dict[str, Any] = {}
        scope["record"] = record
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = [(b"x-request-id", name.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        try:
            if given and not _ID.fullmatch(given):
                raise ApiError(400, "X-Request-Id has letters, digits, '_', '.' and '-', and at most 64 of them.")
            self._admit(scope, headers)
            await self._app(scope, _limited(receive, headers), send_on)
        except ApiError as e:
            if not status:
                await answer(send_on, e)
        except _TooLate:
            if not status:
                await answer(send_on, ApiError(408, "The body did not arrive in time.", code="timeout"))
        finally:
            self._record(scope, headers, record, status, time.perf_counter() - began)

    def _admit(self, scope: Scope, headers: dict[str, str]) -> None:
        """Raise :class:`ApiError` for a request that may not be made."""
        host = _name(headers.get("host", ""))
        if self._hosts is not None and host not in self._hosts:
            raise ApiError(403, "This server is not asked under that name.", code="forbidden_host")
        origin = headers.get("origin")
        # A page of another site cannot know the token, and a proxy in front may ask under another name.
        if self._token is None and origin is not None and (urlsplit(origin).netloc or None) != headers.get("host"):
            raise ApiError(403, "Pages of other sites may not ask this server.", code="forbidden_origin")
        if self._token is None or _OPEN.fullmatch(scope["path"]):
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token.encode()):
            raise ApiError(
                401, "Incorrect API key provided: send 'Authorization: Bearer TOKEN'.", code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )  # fmt: skip

    def _record(
        self, scope: Scope, headers: dict[str, str], record: dict[str, Any], status: int, seconds: float
    ) -> None:
        path = scope["path"]
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.requests.labels(route, str(status or 499)).inc()
        if "drawing_s" in record:
            overhead = seconds - record["waiting_s"] - record["drawing_s"]
            record |= {"overhead_s": round(max(0.0, overhead), 6)}
            self._metrics.overhead.observe(max(0.0, overhead))
            self._metrics.drawing.observe(record["drawing_s"])
            self._metrics.waiting.observe(record["waiting_s"])
        if self._log is not None and path not in _UNLOGGED:
            client = scope.get("client")
            self._log.write({
                "id": scope["name"], "client": client[0] if client else None, "method": scope["method"],
                "path": path if len(path) <= 200 else path[:197] + "...", "status": status or 499,
                "seconds": round(seconds, 6), **record,
            })  # fmt: skip


def _limited(receive: Receive, headers: dict[str, str]) -> Receive:
    """Return ``receive`` with a limit on the body's size, and on the time between two of its parts."""
    announced = headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced[:20]) > MOST_BODY:
        raise _too_large()
    size, whole = 0, False

    async def limited() -> Message:
        nonlocal size, whole
        if whole:  # from here on, this waits for the client to leave
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), _BODY_SECONDS)
        except asyncio.TimeoutError:
            raise _TooLate from None
        size += len(message.get("body", b""))
        if size > MOST_BODY:
            raise _too_large()
        whole = not message.get("more_body", False)
        return message

    return limited


def _too_large() -> ApiError:
    return ApiError(413, f"The body is too large: at most {MOST_BODY >> 20} MiB are read.", code="body_too_large")


def _name(host: str) -> str:
    """Return the name in a Host header, without its port."""
    if host.startswith("["):
        return host.partition("]")[0].lstrip("[").lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()


async def answer(send: Send, error: ApiError) -> None:
    """Send an error as a whole response."""
    body = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(k.encode(), v.encode()) for k, v in error.headers.items()]
    if error.status in (408, 413):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
