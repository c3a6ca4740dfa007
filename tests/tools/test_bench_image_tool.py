# SPDX-License-Identifier: Apache-2.0
"""Test tools/bench_image.py and tools/soak_serve.py: what they refuse, draw and judge. Nothing is drawn by a model."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def load(name: str) -> ModuleType:
    """Import a file that belongs to no package, and those beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        return importlib.import_module(name)


bench_image, bench_serve, soak_serve = load("bench_image"), load("bench_serve"), load("soak_serve")
LINE: dict[str, Any] = {
    "device": "CPU", "model": "demo", "steps": 4, "width": 64, "height": 64, "processes": 2, "first_s": 2.0,
    "median_s": 1.0,
}  # fmt: skip


def test_lines_are_plotted(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines = [
        {**LINE, "way": "eager"}, {**LINE, "way": "compiled", "skipped": "no compiler"}, {**LINE, "way": "distrifuser"},
        {**LINE, "way": "ours", "backend": "inductor", "warm": True},
    ]  # fmt: skip
    lines[1].pop("median_s")
    bench_image.plot(lines, tmp_path / "a.svg")
    bench_image.plot(lines, tmp_path / "b.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text() and "<svg" in text  # the same file for the same lines
    assert bench_image.label(lines[3]) == "districompile, 2 ranks, inductor, warmed up"
    with pytest.raises(SystemExit, match="no line has a picture"):
        bench_image.plot([{"way": "eager", "skipped": "x"}], tmp_path / "c.svg")


def test_distrifuser_is_left_out_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = argparse.Namespace(distrifuser=None, distrifuser_gpus=2)
    assert "no checkout" in bench_image.skipped("distrifuser", args) and bench_image.skipped("eager", args) is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    args.distrifuser = tmp_path
    assert bench_image.skipped("distrifuser", args) == "it needs 2 GPUs, and there are 0"


def test_a_way_that_fails_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, "", "some warning\nno pipeline")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: done)
    assert bench_image.run_worker("eager", {}, 1) == {"skipped": "no pipeline"}


def tally() -> Any:
    return bench_serve.Tally(io.StringIO())


def response(status: int, body: Any) -> httpx.Response:
    return httpx.Response(status, content=body if isinstance(body, bytes) else json.dumps(body).encode())


@pytest.mark.parametrize(
    ("status", "body", "counted", "wrong"),
    [
        (200, {"data": []}, "made: drawn", 0),
        (400, {"error": {"code": "invalid_json"}}, "made: refused", 0),
        (503, {"error": {"code": "rank_lost"}}, "made: rank_lost", 0),
        (500, {"error": {"code": "internal"}}, "made: internal", 1),
        (500, b"Traceback", None, 1),
    ],
)
def test_answers_are_judged(status: int, body: Any, counted: str | None, wrong: int) -> None:
    found = tally()
    soak_serve.judge_any(response(status, body), found, "made")
    assert found.wrong == wrong and list(found.answers) == ([] if counted is None else [counted])


def test_memory_that_grows_is_found() -> None:
    found = tally()
    found.memory = [{"server": 100.0, "ranks": 50.0 + (i > 20) * 10} for i in range(30)]
    assert soak_serve.growth(found, "server") == 0.0 and soak_serve.growth(found, "ranks") == 20.0
    found.memory = found.memory[:4]
    assert soak_serve.growth(found, "ranks") is None
