# SPDX-License-Identifier: Apache-2.0
"""Messages between the server and the ranks: a length of four bytes, big-endian, and one JSON object in UTF-8.

They are data: nothing is unpickled, and a message that is no JSON object, or too long, ends the connection.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any

from districompile.errors import Error

MOST_BYTES = 256 << 20  # of one message: a batch of pictures in base64
_LENGTH = struct.Struct(">I")


class FrameError(Error):
    """What arrived is no message of this protocol."""


def packed(message: dict[str, Any]) -> bytes:
    """Return a message as it is sent. Raise :class:`FrameError` for one that is too long."""
    body = json.dumps(message, separators=(",", ":"), allow_nan=False).encode()
    if len(body) > MOST_BYTES:
        raise FrameError(f"a message of {len(body)} bytes: at most {MOST_BYTES} are sent")
    return _LENGTH.pack(len(body)) + body


def unpacked(body: bytes) -> dict[str, Any]:
    """Return the message in the bytes after its length. Raise :class:`FrameError` for anything but a JSON object."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise FrameError("a message that is not JSON") from e
    if not isinstance(message, dict):
        raise FrameError("a message that is no JSON object")
    return message


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send a message. Raise ``OSError`` where the other end is gone."""
    connection.sendall(packed(message))


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """Wait for a message and return it; None after the other end has closed the connection."""
    head = _exactly(connection, _LENGTH.size)
    if head is None:
        return None
    body = _exactly(connection, _length(head))
    return None if body is None else unpacked(body)


def _exactly(connection: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(min(count - len(parts), 1 << 20))
        if not part:
            return None
        parts += part
    return bytes(parts)


async def read(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """Wait for a message and return it; None after the other end has closed the connection."""
    try:
        head = await reader.readexactly(_LENGTH.size)
        body = await reader.readexactly(_length(head))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return unpacked(body)


def _length(head: bytes) -> int:
    length = int(_LENGTH.unpack(head)[0])
    if length > MOST_BYTES:
        raise FrameError(f"a message of {length} bytes: at most {MOST_BYTES} are read")
    return length
