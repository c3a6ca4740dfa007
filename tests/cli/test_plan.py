# SPDX-License-Identifier: Apache-2.0
"""Test ``districompile plan``: what it prints, and mistakes that it refuses before the work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from districompile.cli import main

NETS = """
import torch

def tiny():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.Conv2d(8, 4, 3, padding=1))
    return net, (torch.randn(1, 4, 24, 16),), {}, {"input": 2}
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "plan_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "plan_nets:tiny"


def test_every_number_of_gpus_is_predicted(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["plan", model, "--gpus", "3", "--gpu", "a100", "--link", "10", "--steps", "20", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(d["gpus"], d["guidance"]) for d in found["divisions"]] == [(1, "none"), (2, "none"), (3, "none")]
    assert found["divisions"][2]["rows"] == [8, 8]
    assert found["gpu"]["name"] == "a100" and found["gpu"]["link"] == 10
    assert found["best"] in found["divisions"]


def test_the_table_ends_with_the_command(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["plan", model, "--gpus", "2", "--gpu", "h100"]) == 0
    out = capsys.readouterr().out
    assert "exact step, ms" in out and "GPU: h100" in out
    assert "Predicted from the graph" in out
    assert "convert plan_nets:tiny --gpus 2" in out or "not worth it" in out


def test_machines_are_predicted(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", model, "--gpus", "4", "--gpu", "h100", "--machines", "2", "--network", "12.5"]
    assert main.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["network"] == {"gpus": 2, "rate": 12.5, "wait_us": 30.0}
    assert [d["crossing_mb"] > 0 for d in found["divisions"]] == [False, False, True]
    assert main.main(words) == 0
    assert "2 machines of 2 GPUs, 12.5 GB/s between them" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--machines", "2"], "give the rate between them by --network"),
        (["--network", "2"], "give their number by --machines"),
        (["--gpus", "5", "--machines", "2", "--network", "2"], "no equal shares of 2 machines"),
        (["--gpu", "h1000"], "no GPU 'h1000' in the table (did you mean h100?)"),
        (["--size", "big"], "give width and height in pixels"),
        (["--plot", "plan.txt"], "must end with .png, .svg, .pdf"),
        (["--plot", "."], "is a folder"),
        (["--gpus", "0"], "--gpus"),
        (["--size", "64x64"], "fixes its own inputs"),
    ],
)
def test_mistakes_are_one_line(model: str, given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["plan", model, *given]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_measuring_needs_a_gpu(model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main.main(["plan", model, "--measure"]) == 2
    assert "--measure compiles for the GPU of this machine" in capsys.readouterr().err


def test_a_plot_is_drawn(model: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main.main(["plan", model, "--gpus", "2", "--plot", "plan.svg"]) == 0
    assert "<svg" in (tmp_path / "plan.svg").read_text()
