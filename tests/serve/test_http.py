"""The HTTP server over artists that draw at once: OpenAI's shapes, the queue, cancellation, streams, access."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers_serve import FACTS, PATH, Artists, Running, colour, error, events, file_of, lost, refused, running, until
from PIL import Image

from districompile.serve import access, answers


@pytest.fixture
def server() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as found:
        yield found


def test_pictures_come_as_base64_with_their_seeds(client: httpx.Client, server: Running) -> None:
    answer = client.post(PATH, json={"prompt": "a star", "n": 2, "seed": 7, "steps": 3, "size": "64x48"}).json()
    assert [(d["seed"], colour(d["b64_json"])) for d in answer["data"]] == [(7, 7), (8, 8)]
    assert (answer["size"], answer["output_format"], answer["quality"]) == ("64x48", "png", "auto")
    assert [(j.steps, j.seed, j.size, j.prompt) for j in server.artists.jobs] == [
        (3, 7, (64, 48), "a star"), (3, 8, (64, 48), "a star"),
    ]  # fmt: skip


def test_fields_reach_the_ranks(client: httpx.Client, server: Running) -> None:
    body = {
        "prompt": "a star", "model": "toy", "quality": "high", "guidance": 3, "negative_prompt": "a moon",
        "lora": "style", "output_format": "jpeg", "output_compression": 60, "user": "me", "background": "auto",
    }  # fmt: skip
    data = client.post(PATH, json=body).json()["data"][0]["b64_json"]
    assert Image.open(io.BytesIO(base64.b64decode(data))).format == "JPEG"
    job = server.artists.jobs[0]
    assert (job.steps, job.guidance, job.negative_prompt, job.lora) == (8, 3.0, "a moon", "style")
    assert (job.format, job.compression) == ("jpeg", 60)


def test_a_batch_of_the_bundle_is_cut_to_what_was_asked() -> None:
    with running(Artists(FACTS.model_copy(update={"images": 2}))) as server:
        answer = httpx.post(server.url + PATH, json={"prompt": "a star", "n": 3, "seed": 4}).json()
    assert [(d["seed"], colour(d["b64_json"])) for d in answer["data"]] == [(4, 4), (5, 5), (6, 6)]
    assert [job.seed for job in server.artists.jobs] == [4, 6]


def test_a_url_gives_the_picture(client: httpx.Client, server: Running) -> None:
    answer = client.post(PATH, json={"prompt": "a star", "seed": 9, "response_format": "url"}).json()
    url = answer["data"][0]["url"]
    assert url.startswith(server.url + "/v1/files/") and url.endswith(".png")
    fetched = httpx.get(url)
    assert fetched.content == file_of(9) and fetched.headers["content-type"] == "image/png"
    error(client.get("/v1/files/other.png"), 404)


WRONG = [
    ({}, "prompt", "required"),
    ({"prompt": "  "}, "prompt", "required"),
    ({"prompt": 3}, "prompt", "string"),
    ({"prompt": "x" * 32_001}, "prompt", "32000"),
    ({"prompt": "a", "size": "512x512"}, "size", "it has: 64x48"),
    ({"prompt": "a", "size": "big"}, "size", "pattern"),
    ({"prompt": "a", "n": 0}, "n", "greater"),
    ({"prompt": "a", "n": 11}, "n", "less"),
    ({"prompt": "a", "n": "2"}, "n", "integer"),
    ({"prompt": "a", "n": True}, "n", "integer"),
    ({"prompt": "a", "steps": 101}, "steps", "at most 100"),
    ({"prompt": "a", "seed": -1}, "seed", "greater"),
    ({"prompt": "a", "seed": 2**64}, "seed", "less"),
    ({"prompt": "a", "seed": 2**64 - 1, "n": 2}, "seed", "smaller"),
    ({"prompt": "a", "guidance": 1.0}, "guidance", "above 1"),
    ({"prompt": "a", "lora": "other"}, "lora", "this server has: style"),
    ({"prompt": "a", "lora": "../x"}, "lora", "pattern"),
    ({"prompt": "a", "partial_images": 2}, "partial_images", "stream"),
    ({"prompt": "a", "stream": True, "response_format": "url"}, "response_format", "b64_json"),
    ({"prompt": "a", "output_compression": 5}, "output_compression", "jpeg"),
    ({"prompt": "a", "background": "transparent"}, "background", "opaque"),
    ({"prompt": "a", "colour": "red"}, "colour", "Unknown parameter"),
]


@pytest.mark.parametrize(("body", "param", "words"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_fields_are_named_before_anything_is_drawn(body: dict[str, Any], param: str, words: str) -> None:
    found = error(shared().post(PATH, json=body), 400)
    assert found["param"] == param and words in found["message"] and found["type"] == "invalid_request_error"
    assert not SHARED[1].artists.jobs


SHARED: list[Any] = []


@pytest.fixture(scope="module", autouse=True)
def one_server() -> Iterator[None]:
    """One server for the requests that draw nothing."""
    with running() as server, httpx.Client(base_url=server.url, timeout=20) as client:
        SHARED[:] = [client, server]
        yield
        SHARED.clear()


def shared() -> httpx.Client:
    client: httpx.Client = SHARED[0]
    return client


@pytest.mark.parametrize(
    "body", ["", "{", "[]", "null", "1e999", '{"prompt": "\\ud800"}', "[" * 100_000, '{"n":' + "9" * 5000 + "}", "\x00"]
)
def test_bodies_that_are_no_requests(body: str) -> None:
    error(shared().post(PATH, content=body, headers={"content-type": "application/json"}), 400)


def test_other_addresses_methods_and_types() -> None:
    error(shared().get("/v1/nothing"), 404)
    error(shared().get(PATH), 405)
    error(shared().post(PATH, content='{"prompt": "a"}', headers={"content-type": "text/plain"}), 415)
    error(shared().post("/v1/images/edits", json={"prompt": "a"}), 415)
    assert error(shared().post(PATH, json={"prompt": "a", "model": "dall-e-3"}), 404)["code"] == "model_not_found"
    error(shared().post(PATH, json={"prompt": "a"}, headers={"x-request-id": "a b"}), 400)


def test_a_body_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "MOST_BODY", 2000)
    assert error(shared().post(PATH, json={"prompt": "x" * 3000}), 413)["code"] == "body_too_large"

    def parts() -> Iterator[bytes]:  # without a length
        for _ in range(4):
            yield b"x" * 1000

    error(shared().post(PATH, content=parts(), headers={"content-type": "application/json"}), 413)


def test_a_client_that_stops_sending_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_BODY_SECONDS", 0.05)
    import socket

    with socket.create_connection(("127.0.0.1", int(SHARED[1].url.rpartition(":")[2])), timeout=10) as connection:
        lines = [f"POST {PATH} HTTP/1.1", "Host: a", "Content-Type: application/json", "Content-Length: 9", "", "{"]
        connection.sendall("\r\n".join(lines).encode())
        assert b" 408 " in connection.recv(1000)


def test_the_model_says_what_it_draws() -> None:
    card = shared().get("/v1/models").json()["data"][0]
    assert card["id"] == "toy" and card["sizes"] == ["64x48"] and card["loras"] == ["style"] and card["steps"] == 4
    assert shared().get("/v1/models/toy").json() == card
    error(shared().get("/v1/models/other"), 404)


def test_a_full_queue_answers_429_and_loses_nothing(client: httpx.Client, server: Running) -> None:
    server.artists.hold = True
    answers: list[httpx.Response] = []

    def ask(seed: int) -> None:
        answers.append(httpx.post(server.url + PATH, json={"prompt": "a", "seed": seed}))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    dispatcher = server.app.state.dispatcher
    until(lambda: dispatcher.waiting == 3 and dispatcher.running is not None)
    response = client.post(PATH, json={"prompt": "a"})
    assert error(response, 429)["code"] == "queue_full" and int(response.headers["retry-after"]) >= 1
    server.artists.hold = False
    for thread in threads:
        thread.join(10)
    assert sorted(a.json()["data"][0]["seed"] for a in answers) == [0, 1, 2, 3]


def test_a_stream_has_previews_and_the_picture(client: httpx.Client) -> None:
    body = {"prompt": "a star", "seed": 5, "stream": True, "partial_images": 2, "steps": 4}
    with client.stream("POST", PATH, json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        found = list(events(response.iter_lines()))
    assert [name for name, _ in found] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [data.get("partial_image_index") for _, data in found] == [0, 1, None]
    assert all(data["type"] == name and data["size"] == "64x48" for name, data in found)
    assert colour(found[-1][1]["b64_json"]) == 5


def test_a_quiet_stream_says_that_it_lives(
    client: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "_ALIVE", 0.02)
    server.artists.hold = True
    with client.stream("POST", PATH, json={"prompt": "a star", "stream": True}) as response:
        lines = response.iter_lines()
        assert next(lines) == ": waiting"
        server.artists.hold = False
        assert [name for name, _ in events(lines)] == ["image_generation.completed"]


def test_a_client_that_leaves_ends_its_drawing(client: httpx.Client, server: Running) -> None:
    server.artists.hold = True
    for stream in (False, True):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + PATH, json={"prompt": "a", "stream": stream}, timeout=0.3)
    until(lambda: len(server.artists.stopped) == 2)
    server.artists.hold = False
    assert client.post(PATH, json={"prompt": "a"}).status_code == 200


@pytest.mark.parametrize("waits", [False, True])
def test_a_request_can_be_deleted(client: httpx.Client, server: Running, waits: bool) -> None:
    server.artists.hold = True
    found: dict[str, httpx.Response] = {}

    def ask(name: str) -> None:
        found[name] = httpx.post(server.url + PATH, json={"prompt": "a"}, headers={"x-request-id": name})

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
        until(lambda t=thread: server.app.state.dispatcher.running is not None)  # type: ignore[misc]
    until(lambda: server.app.state.dispatcher.waiting == 1)
    running_name = server.app.state.dispatcher.running.name
    waiting_name = "second" if running_name == "first" else "first"
    name = waiting_name if waits else running_name
    error(client.post(PATH, json={"prompt": "a"}, headers={"x-request-id": name}), 409)
    assert client.delete(f"/v1/images/requests/{name}").json()["cancelled"] is True
    until(lambda: name in found)
    assert error(found[name], 499)["code"] == "cancelled"
    server.artists.hold = False
    for thread in threads:
        thread.join(10)
    other = ({"first", "second"} - {name}).pop()
    assert found[other].status_code == 200
    error(client.delete(f"/v1/images/requests/{name}"), 404)


def test_what_the_ranks_say_reaches_the_client(client: httpx.Client, server: Running) -> None:
    server.artists.fault = refused
    assert "no such token" in error(client.post(PATH, json={"prompt": "a"}), 400)["message"]
    server.artists.fault = lost
    assert error(client.post(PATH, json={"prompt": "a"}), 500)["code"] == "rank_lost"
    server.artists.fault = lost
    with client.stream("POST", PATH, json={"prompt": "a", "stream": True}) as response:
        ((name, data),) = events(response.iter_lines())
    assert name == "error" and data["error"]["code"] == "rank_lost"
    assert client.post(PATH, json={"prompt": "a"}).status_code == 200


def test_a_defect_fails_one_request(client: httpx.Client, server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    server.artists.fault = KeyError("defect")
    assert error(client.post(PATH, json={"prompt": "a"}), 500)["code"] == "failed"
    assert client.post(PATH, json={"prompt": "a"}).status_code == 200
    assert "KeyError" in capsys.readouterr().err


def test_requests_wait_for_ranks_that_come_back(client: httpx.Client, server: Running) -> None:
    server.artists.ready, server.artists.problem = False, "rank 1 ended"
    assert client.get("/readyz").json() == {"status": "not ready", "reason": "rank 1 ended"}
    found: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: found.append(httpx.post(server.url + PATH, json={"prompt": "a"})))
    thread.start()
    until(lambda: server.app.state.dispatcher.waiting == 1)
    server.artists.ready = True
    server.call(server.app.state.dispatcher.changed)
    thread.join(10)
    assert found[0].status_code == 200


def test_requests_are_answered_when_ranks_do_not_come_back(client: httpx.Client, server: Running) -> None:
    server.artists.ready, server.artists.problem = False, "no memory"
    found: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: found.append(httpx.post(server.url + PATH, json={"prompt": "a"})))
    thread.start()
    until(lambda: server.app.state.dispatcher.waiting == 1)
    server.artists.troubled = True
    server.call(server.app.state.dispatcher.changed)
    thread.join(10)
    assert "no memory" in error(found[0], 503)["message"]
    error(client.post(PATH, json={"prompt": "a"}), 503)


def test_before_the_ranks_are_loaded() -> None:
    with running(Artists(None)) as server:
        assert httpx.get(server.url + "/healthz").status_code == 200
        assert httpx.get(server.url + "/readyz").status_code == 503
        assert error(httpx.post(server.url + PATH, json={"prompt": "a"}), 503)["code"] == "loading"


def test_a_drawing_that_takes_too_long_is_given_up() -> None:
    with running(seconds=0.1) as server:
        server.artists.hold = True
        assert error(httpx.post(server.url + PATH, json={"prompt": "a"}), 504)["code"] == "too_long"
        until(lambda: len(server.artists.stopped) == 1)


def test_the_end_answers_what_is_accepted(server: Running) -> None:
    server.artists.hold = True
    found: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda: found.append(httpx.post(server.url + PATH, json={"prompt": "a"})))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    dispatcher = server.app.state.dispatcher
    until(lambda: dispatcher.waiting == 2)
    server.call(lambda: setattr(dispatcher, "ending", True))
    error(httpx.post(server.url + PATH, json={"prompt": "a"}), 503)
    server.app.state.end = server.call(lambda: __import__("asyncio").ensure_future(dispatcher.end(0.05)))
    for thread in threads:
        thread.join(10)
    assert [error(response, 503)["code"] for response in found] == ["ending"] * 3


def test_openapi_describes_the_requests() -> None:
    schema = shared().get("/openapi.json").json()
    body = schema["paths"][PATH]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"prompt", "seed", "negative_prompt"} <= body["properties"].keys()
    assert error(shared().get("/docs"), 404)  # whose page would be fetched from elsewhere


def test_the_page_is_complete_and_asks_nobody_else() -> None:
    page = shared().get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for path in ("/", "/page.js", "/page.css"):
        assert "http://" not in shared().get(path).text and "https://" not in shared().get(path).text


def test_curl_draws(server: Running, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    body = json.dumps({"prompt": "a star", "seed": 3})
    result = subprocess.run(
        ["curl", "-sS", server.url + PATH, "-H", "Content-Type: application/json", "-d", body],
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert colour(json.loads(result.stdout)["data"][0]["b64_json"]) == 3


def test_the_client_of_openai_draws(server: Running) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed")
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    answer = client.images.generate(prompt="a star", n=2, size="64x48", extra_body={"seed": 3, "steps": 2})
    assert [colour(d.b64_json) for d in answer.data] == [3, 4]
    answer = client.images.edit(image=("a.png", file_of(1)), prompt="a star", extra_body={"seed": 5})
    assert colour(answer.data[0].b64_json) == 5
    kinds = [e.type for e in client.images.generate(prompt="a star", stream=True, partial_images=2)]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [m.id for m in client.models.list()] == ["toy"]
    with pytest.raises(openai.BadRequestError, match="it has: 64x48"):
        client.images.generate(prompt="a star", size="1024x1024")
    server.artists.fault = lost
    with pytest.raises(openai.APIError, match="rank 1 ended"):
        list(client.images.generate(prompt="a star", stream=True))
