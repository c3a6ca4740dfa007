"""The commands and programs of docs/serve.md, run against a server whose artists draw at once."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_serve import LIMITS, Running, file_of, running
from PIL import Image

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serve.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
CURLS = [line for kind, text in BLOCK.findall(PAGE) if kind == "sh" for line in text.splitlines() if "curl" in line]
PROGRAMS = [text for kind, text in BLOCK.findall(PAGE) if kind == "python"]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A server, and a current folder with the page's picture and mask."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picture.png").write_bytes(file_of(9))
    data = io.BytesIO()
    Image.new("RGBA", (64, 48)).save(data, "PNG")
    (tmp_path / "mask.png").write_bytes(data.getvalue())
    with running() as found:
        yield found


def test_the_page_has_examples() -> None:
    assert len(CURLS) == 4 and len(PROGRAMS) == 2


@pytest.mark.parametrize("line", CURLS, ids=lambda line: line[-30:])
def test_curl_lines_run(server: Running, line: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    command = line.replace("http://127.0.0.1:8000", server.url).replace("curl ", "curl -sS ", 1)
    said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30, check=True).stdout
    if "-X DELETE" in line:
        assert json.loads(said)["error"]["code"] == "not_found"
    elif "stream" in line:
        assert re.findall(r"^event: (.*)$", said, re.MULTILINE) == [
            "image_generation.partial_image", "image_generation.partial_image", "image_generation.completed",
        ]  # fmt: skip
    else:
        assert json.loads(said)["data"]
        assert server.artists.jobs[0].seed == 1


@pytest.mark.parametrize("text", PROGRAMS, ids=["draw", "edit"])
def test_programs_run(server: Running, tmp_path: Path, text: str) -> None:
    pytest.importorskip("openai", reason="openai is not installed")
    names: dict[str, object] = {}
    exec(text.replace("http://127.0.0.1:8000", server.url), names)
    first = server.artists.jobs[0]
    if "edit" in text:
        assert names["edited"] == file_of(first.seed) and first.strength == 0.7 and first.image is not None
    else:
        assert [(tmp_path / f"circle-{i}.png").read_bytes() for i in (0, 1)] == [file_of(1), file_of(2)]
    assert first.steps == 20 != LIMITS.steps
