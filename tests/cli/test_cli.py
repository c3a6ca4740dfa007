"""The command line: every error a user can cause is one line with exit code 2; results are what the core gave."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from helpers_cli import NETS, failing

from districompile.cli import main
from districompile.errors import BackendError

ROOT = Path(__file__).resolve().parents[2]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([]) == 0
    out = capsys.readouterr().out
    for name in ("convert", "inspect", "verify", "run", "refit", "bench", "doctor"):
        assert name in out
    assert main.main(["convert", "--help"]) == 0
    assert "--warmup-steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compile"], "No such command 'compile'."),
        (["convert"], "Missing argument 'MODEL'."),
        (["convert", "demo", "--gpus", "0"], "Invalid value for '--gpus' / '-n': "),
        (["convert", "demo", "--gpus", "two"], "Invalid value for '--gpus' / '-n': "),
        (["convert", "demo", "--cfg", "half"], "Invalid value for '--cfg': "),
        (["convert", "demo", "--groupnorm", "batch"], "Invalid value for '--groupnorm': "),
        (["convert", "demo", "--warmup-steps", "0"], "Invalid value for '--warmup-steps': "),
        (["convert", "demo", "--batch", "0"], "Invalid value for '--batch': "),
        (["convert", "demo", "--colour", "red"], "No such option: --colour"),
        (["run", "demo", "--steps", "0"], "Invalid value for '--steps': "),
        (["inspect", "x", "--graph", "hot"], "Invalid value for '--graph': "),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_options(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(capsys, *words).startswith(message)


def test_unknown_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accepted = "give 'demo', a diffusers folder, a .safetensors file, a hub id (owner/name), or package.module:factory"
    assert failing(capsys, "convert", "nonsense") == f"unknown model 'nonsense': {accepted}"
    assert failing(capsys, "run", "nonsense") == f"unknown model 'nonsense': {accepted}"
    assert "has no 'nothing'" in failing(capsys, "convert", "cli_nets:nothing")
    assert "fixes its own inputs" in failing(capsys, "convert", "cli_nets:tiny", "--height", "64")
    assert not list(folder.glob("*gpu"))


def test_conversions_that_cannot_be(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eager = ["--backend", "eager", "--out", "b"]
    assert "rows" in failing(capsys, "convert", "cli_nets:wrong_rows", *eager)
    assert "25" in failing(capsys, "convert", "cli_nets:tiny", "--gpus", "25", *eager)
    assert "must be even, not 3" in failing(capsys, "convert", "cli_nets:tiny", "--gpus", "3", "--cfg", "split", *eager)
    assert "cannot displace 'colour'" in failing(capsys, "convert", "cli_nets:tiny", "--displace", "colour", *eager)
    assert "no_module" in failing(capsys, "convert", "cli_nets:tiny", "--passes", "no_module:P", *eager)
    assert "no_rules" in failing(capsys, "convert", "cli_nets:tiny", "--rules", "no_rules", *eager)
    assert "no pass named 'nap'" in failing(capsys, "convert", "cli_nets:tiny", "--skip", "nap", *eager)
    assert "no pass named 'nap'" in failing(capsys, "convert", "cli_nets:tiny", "--stop-after", "nap", *eager)
    assert main.main(["convert", "cli_nets:branching", *eager]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.splitlines()[-1].startswith("error: Branching cannot be exported: ")
    assert not (folder / "b").exists()


def test_backends(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no backend named 'fast'; there are: " in failing(capsys, "convert", "cli_nets:tiny", "--backend", "fast")

    def missing(name: str) -> None:
        raise BackendError(f"the backend {name} needs onnxruntime: pip install 'districompile[onnxruntime]'")

    from districompile.cli.commands import convert

    monkeypatch.setattr(convert, "get_backend", missing)
    line = failing(capsys, "convert", "cli_nets:tiny")
    assert line == "the backend onnxruntime needs onnxruntime: pip install 'districompile[onnxruntime]'"


def test_targets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("text")
    assert "mine exists and is not a bundle" in failing(capsys, "convert", "cli_nets:tiny", "--out", "mine")
    assert "cannot be written" in failing(capsys, "convert", "cli_nets:tiny", "--out", "cli_nets.py/b")
    assert "no image format" in failing(capsys, "run", "cli_nets:tiny", "--out", "image.xyz")
    assert (folder / "mine" / "thesis.txt").read_text() == "text"


def test_missing_and_damaged_bundles(made: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("inspect", "verify"):
        assert "there is no such bundle" in failing(capsys, command, "nowhere")
        assert "is not a bundle" in failing(capsys, command, str(folder))
    damaged = folder / "damaged"
    shutil.copytree(made, damaged)
    weights = damaged / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "weights.safetensors was changed" in failing(capsys, "verify", str(damaged))
    weights.write_bytes(data[:-10])
    assert "weights.safetensors has" in failing(capsys, "inspect", str(damaged))
    weights.unlink()
    assert "weights.safetensors is missing" in failing(capsys, "inspect", str(damaged))
    (damaged / "manifest.json").write_text("{")
    assert "manifest.json cannot be read" in failing(capsys, "inspect", str(damaged))


def test_convert_and_inspect(made: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main.main(["inspect", str(made), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"]["ranks"] == 2
    assert found["report"]["rows"] == {"24": [12, 12]}
    assert found["report"]["fallbacks"] == []
    assert found["report"]["sites"]["conv"]["count"] == 1
    assert found["manifest"]["backend"] == "eager" and found["manifest"]["source"] == "cli_nets:tiny"
    assert main.main(["inspect", str(made)]) == 0
    text = capsys.readouterr().out
    assert "rows per rank" in text and "fallbacks: none" in text and "passes: " in text
    titles = [line for line in text.splitlines() if line.isupper()]
    assert titles == ["MODEL", "PARTITION", "TRANSFERS", "ENGINES", "MEMORY", "PASSES", "WORDS"]
    assert "\x1b" not in text and all(line == line.rstrip() for line in text.splitlines())
    passes = next(line for line in text.splitlines() if line.startswith("passes: "))
    assert len(passes) > 160  # not folded
    for phase in ("exact", "displaced"):
        assert main.main(["inspect", str(made), "--graph", phase]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"{phase}: ") and " run     " in text and " start   " in text and " wait    " in text
        assert "pending until step" in text and max(map(len, text.splitlines())) <= 110
        assert main.main(["inspect", str(made), "--graph", phase, "--json"]) == 0
        assert any(" start   " in line for line in json.loads(capsys.readouterr().out)["steps"])


def test_convert_prints_what_it_made(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["convert", "cli_nets:tiny", "--gpus", "3", "--backend", "eager", "--dump", "graphs"]) == 0
    out = capsys.readouterr().out
    assert "rows per rank" in out and "tiny-3gpu" in out
    assert (folder / "tiny-3gpu" / "manifest.json").is_file()
    assert (folder / "graphs" / "00-captured.txt").is_file()
    assert len(list((folder / "graphs").glob("*.txt"))) == 1 + len(list((folder / "graphs").glob("*.diff"))) > 3
    # A bundle is replaced by a new one of the same name.
    assert main.main(["convert", "cli_nets:tiny", "--gpus", "3", "--backend", "eager"]) == 0


def test_stop_after_prints_the_graph(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["convert", "cli_nets:tiny", "--stop-after", "drop-noops"]) == 0
    assert "conv2d" in capsys.readouterr().out
    assert not (folder / "tiny-2gpu").exists()


def test_verify(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = ("--model", "cli_nets:tiny")
    capsys.readouterr()
    assert main.main(["verify", str(made), *known, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exact"]["ok"] and found["exact"]["max_relative_error"] <= 1e-5
    assert found["drift"] is None
    assert main.main(["verify", str(made), *known, "--tolerance", "0"]) in (0, 1)
    capsys.readouterr()
    assert main.main(["verify", str(made), *known]) == 0
    text = capsys.readouterr().out
    assert "exact phase: largest relative error" in text and "a difference is expected" not in text
    assert "only with --nodes" in failing(capsys, "verify", str(made), *known, "--rules", "cli_rules")


PASS = """
import dataclasses
from typing import ClassVar

@dataclasses.dataclass(frozen=True)
class Rounding:
    name: ClassVar[str] = "rounding"
    exact: ClassVar[bool] = False
    needs: ClassVar[str] = "spmd"
    gives: ClassVar[str] = "spmd"

    def run(self, unit):
        pass
"""


def test_verify_expects_what_an_inexact_pass_changes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "cli_rounding.py").write_text(PASS)
    options = ["--backend", "eager", "--out", "inexact", "--passes", "cli_rounding:Rounding"]
    assert main.main(["convert", "cli_nets:tiny", *options, "--json"]) == 0
    assert main.main(["verify", "inexact", "--model", "cli_nets:tiny", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out[out.rindex("\n{") :])["exact"]["inexact_passes"] == ["rounding"]
    assert main.main(["verify", "inexact", "--model", "cli_nets:tiny"]) == 0
    assert "a difference is expected: the bundle was converted with the pass rounding" in capsys.readouterr().out


def test_verify_compares_nodes_with_rules(made: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["verify", str(made), "--model", "cli_nets:tiny", "--nodes"]
    (folder / "cli_rules.py").write_text("imported = True")
    capsys.readouterr()
    assert main.main([*command, "--rules", "cli_rules", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["nodes"]
    assert found["rules"] == ["cli_rules"] and found["compared"] > 3 and "cli_rules" in sys.modules
    assert "no_such_rules" in failing(capsys, *command, "--rules", "no_such_rules")


def test_verify_finds_another_model(made: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "cli_other.py").write_text(NETS.replace("manual_seed(0)", "manual_seed(1)"))
    capsys.readouterr()
    assert main.main(["verify", str(made), "--model", "cli_other:tiny"]) == 1
    assert "ABOVE the tolerance" in capsys.readouterr().out
