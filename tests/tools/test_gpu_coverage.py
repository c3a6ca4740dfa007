# SPDX-License-Identifier: Apache-2.0
"""Test tools/gpu_coverage.py: what is done is not done again, and the page says what ran where. Nothing is compiled."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def load(name: str) -> ModuleType:
    """Import a file that belongs to no package, and those beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        return importlib.import_module(name)


gpu_coverage = load("gpu_coverage")
page = load("gpu_coverage_page").page

GOOD = {"group": "g", "size": [8, 8], "eager": 0.0, "exact": 2e-7, "displaced": 3e-6, "packages": 4, "error": None}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, str]]:
    """The runs that were started. vq fails, and the process of norms dies, on 3 ranks."""
    started: list[tuple[str, int, str]] = []

    class Worker:
        def __init__(self, log: Any) -> None:
            pass

        def ask(self, job: dict[str, Any], timeout: float) -> dict[str, Any]:
            started.append((job["family"], job["ranks"], job["dtype"]))
            if job["family"] == "norms" and job["ranks"] == 3:
                raise gpu_coverage.Died("the process ended with -11: Segmentation fault")
            return {"group": "g", "size": [8, 8], "error": "KeyError: 3"} if job["family"] == "vq" else GOOD

        def close(self) -> None:
            pass

    monkeypatch.setattr(gpu_coverage, "Worker", Worker)
    return started


def start(monkeypatch: pytest.MonkeyPatch, file: Path, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_coverage.py", "--device", "cpu", "--file", str(file), *options])
    code: int = gpu_coverage.main()
    return code


def test_what_is_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: list[tuple[str, int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.jsonl"
    assert start(monkeypatch, file, "--only", "norms", "--ranks", "2") == 0
    assert sorted(ran) == [("norms", 2, "float16"), ("norms", 2, "float32")]
    with file.open("a") as opened:
        opened.write('{"family": "norms", "ran')  # a run that was stopped
    ran.clear()
    with file.open("a") as opened:
        opened.write("\n")
    assert start(monkeypatch, file, "--only", "norms,vq", "--dtypes", "float32") == 1
    assert sorted(ran) == [("norms", 3, "float32"), ("vq", 2, "float32"), ("vq", 3, "float32")]
    text = capsys.readouterr().out
    assert "norms: FAILED on 3 ranks in float32: the process ended with -11: Segmentation fault" in text
    ran.clear()
    assert start(monkeypatch, file, "--only", "norms,vq", "--dtypes", "float32") == 0
    assert ran == []
    assert start(monkeypatch, file, "--only", "norms,vq", "--again", "--dtypes", "float32") == 1
    assert sorted(ran) == [("norms", 3, "float32"), ("vq", 2, "float32"), ("vq", 3, "float32")]
    monkeypatch.setattr(torch, "__version__", "9.9")  # figures of another version do not count
    ran.clear()
    assert start(monkeypatch, file, "--only", "norms", "--ranks", "2") == 0
    assert len(ran) == 2


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: list[tuple[str, int, str]]) -> None:
    file, out = tmp_path / "found.jsonl", tmp_path / "page.md"
    start(monkeypatch, file, "--only", "norms,vq", "--dtypes", "float32")
    assert start(monkeypatch, file, "--docs", "--out", str(out)) == 0
    text = out.read_text()
    assert "**Nothing on this page ran on a GPU.**" in text
    assert "| norms | 2.0e-07, 3.0e-06 | failed |" in text and "| vq | failed | failed |" in text
    assert "- vq on 2 ranks in float32: `KeyError: 3`" in text
    assert "Not run: " in text and "sdxl" in text.partition("Not run: ")[2]
    gpu = {**json.loads(file.read_text().splitlines()[0]), "device": "NVIDIA H200"}
    assert "Nothing on this page" not in page([gpu], ["norms", "vq"])


def test_an_unknown_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        start(monkeypatch, tmp_path / "f", "--only", "nothing")
    assert "there is no family 'nothing'" in capsys.readouterr().err


SERVANT = """
import json, os, sys, time
print("started", file=sys.stderr, flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if job["family"] == "dies":
        print("Segmentation fault", file=sys.stderr, flush=True)
        os._exit(7)
    if job["family"] == "hangs":
        time.sleep(60)
    print(json.dumps({"error": "wrong" if job["family"] == "fails" else None, "pid": os.getpid()}), flush=True)
"""


def test_a_process_serves_until_something_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "gpu_coverage_run.py").write_text(SERVANT)
    monkeypatch.setattr(gpu_coverage, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_coverage, "_JOBS", 3)
    log = (tmp_path / "log").open("w+")
    worker = gpu_coverage.Worker(log)
    pids = [worker.ask({"family": "good"}, 60)["pid"] for _ in range(4)]
    assert len(set(pids[:3])) == 1 and pids[3] != pids[0]  # a new one after so many
    found = worker.ask({"family": "fails"}, 60)
    assert found["error"] == "wrong" and found["pid"] == pids[3]
    with pytest.raises(gpu_coverage.Died, match="ended with 7: Segmentation fault"):
        worker.ask({"family": "dies"}, 60)
    with pytest.raises(gpu_coverage.Died, match=r"more than 1 s: "):
        worker.ask({"family": "hangs"}, 1)
    assert worker.ask({"family": "good"}, 60)["pid"] not in pids
    worker.close()
    log.close()
