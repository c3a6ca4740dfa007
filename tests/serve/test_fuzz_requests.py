"""Requests that hypothesis makes: none is answered with a defect, and none is left without an answer."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers_serve import Running, events, file_of, running
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TOOLS = Path(__file__).resolve().parents[2] / "tools"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(TOOLS))
    made = importlib.import_module("serve_requests")
BODIES, BYTES, FIELDS, FORM_WORDS, GOOD = made.BODIES, made.BYTES, made.FIELDS, made.FORM_WORDS, made.GOOD
HEADERS, PATHS, VALUES = made.HEADERS, made.PATHS, made.VALUES

PATH = "/v1/images/generations"
SERVERS: list[Running] = []
CLIENTS: list[httpx.Client] = []


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with running() as found, httpx.Client(base_url=found.url, timeout=10) as client:
        SERVERS[:], CLIENTS[:] = [found], [client]
        yield


def check(response: httpx.Response) -> None:
    """A picture, a stream of them, or an error in OpenAI's shape that is the client's own."""
    assert response.status_code < 500, response.text[:500]
    if response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream"):
        assert [name for name, _ in events(iter(response.text.splitlines()))][-1].endswith("completed")
    elif response.status_code == 200:
        assert response.json()["data"]
    else:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert len(response.content) < 500_000


slow_machine = settings(deadline=None, max_examples=120, suppress_health_check=list(HealthCheck))


@slow_machine
@given(BODIES, st.booleans())
def test_json_bodies(body: dict[str, Any], mended: bool) -> None:
    data = json.dumps({**GOOD, **body} if mended else body)
    check(CLIENTS[0].post(PATH, content=data, headers={"content-type": "application/json"}))


@slow_machine
@given(BYTES)
def test_any_bytes(data: bytes) -> None:
    for kind in ("application/json", "multipart/form-data; boundary=x"):
        path = PATH if "json" in kind else "/v1/images/edits"
        check(CLIENTS[0].post(path, content=data, headers={"content-type": kind}))


@slow_machine
@given(
    st.dictionaries(st.sampled_from(FIELDS), FORM_WORDS, max_size=4),
    st.dictionaries(
        st.sampled_from(["image", "mask", "image[]", "file"]),
        st.binary(max_size=30) | st.integers(0, 400).map(lambda n: file_of(1)[:n]) | st.just(file_of(1, mode="RGBA")),
        max_size=2,
    ),
)
def test_forms(fields: dict[str, str], files: dict[str, bytes]) -> None:
    sent = {name: ("a.png", data) for name, data in files.items()}
    check(CLIENTS[0].post("/v1/images/edits", data={**GOOD, **fields}, files=sent or {"other": ("b", b"")}))


@slow_machine
@given(st.dictionaries(HEADERS, VALUES, max_size=3), st.sampled_from(["GET", "POST", "DELETE"]), PATHS)
def test_headers_and_addresses(headers: dict[str, str], method: str, path: str) -> None:
    address = SERVERS[0].url + "/" + path
    try:
        request = CLIENTS[0].build_request(method, address, headers=headers)
    except httpx.InvalidURL:
        return
    response = CLIENTS[0].send(request)
    assert response.status_code < 500
