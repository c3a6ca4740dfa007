"""Edits, and what surrounds requests: who may ask, metrics and the log."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers_serve import FACTS, PATH, Artists, Running, error, events, file_of, running
from PIL import Image

from districompile.serve.records import RequestLog


@pytest.fixture
def server() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as found:
        yield found


def test_a_token_is_needed_where_there_is_one() -> None:
    token = "correct horse battery"
    with running(token=token) as server:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {token}"}):
            for path in ("/v1/models", "/metrics", "/openapi.json"):
                assert error(httpx.get(server.url + path, headers=headers), 401)["code"] == "invalid_api_key"
            error(httpx.post(server.url + PATH, json={"prompt": "a"}, headers=headers), 401)
            error(httpx.delete(server.url + "/v1/images/requests/a", headers=headers), 401)
        assert not server.artists.jobs
        right = {"authorization": f"Bearer {token}"}
        answer = httpx.post(server.url + PATH, json={"prompt": "a", "response_format": "url"}, headers=right).json()
        for path in ("/", "/page.js", "/page.css", "/healthz", "/readyz"):
            assert httpx.get(server.url + path).status_code == 200
        assert httpx.get(answer["data"][0]["url"]).status_code == 200  # its name is the secret
        behind = {**right, "origin": "https://pictures.example"}  # a proxy that asks under another name
        assert httpx.post(server.url + PATH, json={"prompt": "a"}, headers=behind).status_code == 200


def test_pages_of_other_sites_are_kept_out() -> None:
    with running(hosts=frozenset({"127.0.0.1", "localhost"})) as server:
        own = {"origin": server.url}
        assert httpx.post(server.url + PATH, json={"prompt": "a"}, headers=own).status_code == 200
        for headers in ({"origin": "http://evil.example"}, {"origin": "null"}, {"host": "evil.example"}):
            error(httpx.post(server.url + PATH, json={"prompt": "a"}, headers=headers), 403)
        assert len(server.artists.jobs) == 1


def test_edits_take_a_picture_and_a_mask(client: httpx.Client, server: Running) -> None:
    mask = Image.new("RGBA", (64, 48), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 48))
    data = io.BytesIO()
    mask.save(data, "PNG")
    form = {"prompt": "a star", "seed": "3", "strength": "0.5", "n": "1"}
    one = {"image": ("a.jpg", file_of(200, "jpeg"))}
    two = {"image": ("a.png", file_of(200)), "mask": ("m.png", data.getvalue())}
    for files in (one, two):
        response = client.post("/v1/images/edits", data=form, files=files)
        assert response.status_code == 200 and response.json()["data"][0]["seed"] == 3
    first, second = server.artists.jobs
    assert first.mask is None and first.strength == 0.5 and first.image is not None and second.mask is not None
    drawn_anew = Image.open(io.BytesIO(base64.b64decode(second.mask)))
    assert drawn_anew.mode == "L" and drawn_anew.getpixel((0, 0)) == 255 and drawn_anew.getpixel((63, 0)) == 0
    with client.stream("POST", "/v1/images/edits", data={**form, "stream": "true"}, files=one) as streamed:
        assert [name for name, _ in events(streamed.iter_lines())] == ["image_edit.completed"]


def test_wrong_edits_are_refused_with_the_field(client: httpx.Client) -> None:
    good = file_of(1)
    path = "/v1/images/edits"
    cases: list[tuple[dict[str, str], dict[str, Any], str]] = [
        ({"prompt": "a"}, {"other": ("a.png", good)}, "other"),
        ({"prompt": "a"}, {"image": ("a.png", b"no picture")}, "image"),
        ({"prompt": "a"}, {"image": ("a.png", good[:60])}, "image"),
        ({"prompt": "a"}, {"image": ("a.png", file_of(1, size=(32, 32)))}, "image"),
        ({"prompt": "a"}, {"image": ("a.png", good), "mask": ("m.png", good)}, "mask"),
        ({"prompt": "a", "strength": "2"}, {"image": ("a.png", good)}, "strength"),
        ({"prompt": "a", "strength": "0.1"}, {"image": ("a.png", good)}, "strength"),
        ({"prompt": "a", "n": "many"}, {"image": ("a.png", good)}, "n"),
        ({"prompt": "a", "mask": "text"}, {"image": ("a.png", good)}, "mask"),
    ]
    two = [("image[]", ("a.png", good))] * 2
    assert error(client.post(path, data={"prompt": "a"}, files=two), 400)["message"] == "'image' is given twice."
    for form, files, param in cases:
        assert error(client.post(path, data=form, files=files), 400)["param"] == param
    error(client.post(path, content=b"--x\r\n", headers={"content-type": "multipart/form-data; boundary=x"}), 400)
    error(client.post(path, content=b"abc", headers={"content-type": "multipart/form-data"}), 400)
    with running(Artists(FACTS.model_copy(update={"edits": False}))) as server:
        found = error(httpx.post(server.url + path, data={"prompt": "a"}, files={"image": ("a.png", good)}), 400)
        assert found["code"] == "unsupported"


def test_what_a_bundle_cannot_do_is_refused() -> None:
    facts = FACTS.model_copy(update={"guidance": "none", "negative": False, "previews": False, "text": False})
    with running(Artists(facts)) as server:
        for body in (
            {"prompt": "a"}, {"guidance": 3}, {"negative_prompt": "a"}, {"stream": True, "partial_images": 1},
        ):  # fmt: skip
            assert error(httpx.post(server.url + PATH, json=body), 400)["param"] == list(body)[-1]
        assert httpx.post(server.url + PATH, json={}).status_code == 200


def test_metrics_and_log_tell_of_requests(tmp_path: Path) -> None:
    with running(log=RequestLog(tmp_path / "log")) as server, httpx.Client(base_url=server.url) as client:
        client.post(PATH, json={"prompt": "a secret", "n": 2, "seed": 1}, headers={"x-request-id": "mine"})
        client.post(PATH, json={})
        client.get("/healthz")
        text = client.get("/metrics").text
    assert 'districompile_requests_total{route="/v1/images/generations",status="200"} 1.0' in text
    assert 'districompile_requests_total{route="/v1/images/generations",status="400"} 1.0' in text
    assert "districompile_images_total 2.0" in text and 'districompile_steps_total{phase="exact"} 8.0' in text
    assert 'districompile_rank_resident_bytes{pid="11",rank="1"} 2000.0' in text
    assert "districompile_overhead_seconds_count 1.0" in text
    first, second = (json.loads(line) for line in (tmp_path / "log").read_text().splitlines())
    assert first["id"] == "mine" and first["status"] == 200 and first["n"] == 2 and first["outcome"] == "drawn"
    assert first["drawing_s"] == 0.02 and first["seconds"] > 0 and first["overhead_s"] >= 0
    assert second["status"] == 400 and "secret" not in (tmp_path / "log").read_text()


def test_a_log_that_cannot_be_written_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    log = RequestLog(Path("/dev/full"))
    for _ in range(2):
        log.write({"id": "a"})
    assert capsys.readouterr().err.count("cannot be written") == 1
