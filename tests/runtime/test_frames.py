"""Messages between server and ranks: what is sent arrives, and what is no message is refused."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from districompile.runtime.processes import frames

TEXT = st.text('aé☃\U00010348\x00"\\/\n{', max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8,
)  # fmt: skip


async def read_all(data: bytes) -> list[dict[str, Any] | None]:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    found = []
    while (message := await frames.read(reader)) is not None:
        found.append(message)
    return [*found]


@given(st.lists(st.dictionaries(TEXT, JSON, max_size=3), max_size=3))
def test_messages_arrive_whole_and_in_order(messages: list[dict[str, Any]]) -> None:
    data = b"".join(map(frames.packed, messages))
    assert asyncio.run(read_all(data)) == messages
    here, there = socket.socketpair()
    with here, there:
        here.settimeout(10)
        sender = threading.Thread(target=lambda: [frames.send(there, m) for m in messages])
        sender.start()
        assert [frames.receive(here) for _ in messages] == messages
        sender.join()
        there.close()
        assert frames.receive(here) is None


@pytest.mark.parametrize("body", [b"", b"[]", b"1", b"{", b"\xff", b"[" * 100_000, b"\x80\x04."])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(frames.FrameError):
        asyncio.run(read_all(struct.pack(">I", len(body)) + body))


def test_a_length_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(frames.FrameError, match="at most"):
        asyncio.run(read_all(b"\xff\xff\xff\xff"))
    monkeypatch.setattr(frames, "MOST_BYTES", 10)
    with pytest.raises(frames.FrameError, match="at most 10"):
        frames.packed({"a": "x" * 10})


@given(st.binary(max_size=40))
def test_any_bytes_are_a_message_an_end_or_refused(data: bytes) -> None:
    with contextlib.suppress(frames.FrameError):
        asyncio.run(read_all(data))
