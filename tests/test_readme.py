"""The README says what is so: its Python runs, its command lines parse, its links lead somewhere."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer

from districompile.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"(<!-- test: run -->\n)?```(\w+)\n(.*?)```", re.DOTALL)


def blocks(language: str, run: bool | None = None) -> list[str]:
    found = [(bool(mark), text) for mark, kind, text in BLOCK.findall(README) if kind == language]
    return [text for mark, text in found if run is None or mark == run]


def commands() -> list[list[str]]:
    """All districompile command lines, without the program's name."""
    parts = [part for text in blocks("bash") for line in text.splitlines() for part in line.split("&&")]
    words = [shlex.split(part) for part in parts]
    return [w[1:] for w in words if w and Path(w[0]).name == "districompile"]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command_lines_parse(words: list[str]) -> None:
    """Every option exists and every value fits; nothing is run."""
    group = typer.main.get_command(app)
    name, *rest = words
    command = group.commands[name]  # type: ignore[attr-defined]
    with command.make_context(name, rest):
        pass


def test_commands_are_all_shown() -> None:
    assert {words[0] for words in commands()} == {"convert", "inspect", "verify", "run", "refit", "bench", "doctor"}


@pytest.mark.parametrize("text", blocks("python"))
def test_python_parses(text: str) -> None:
    ast.parse(text)


@pytest.mark.parametrize("text", blocks("python", run=True))
def test_python_runs(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "README.md", "exec"), {})
    assert (tmp_path / "bundle" / "manifest.json").is_file()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_ci_runs_the_test_command() -> None:
    """CI runs what the README tells people to run."""
    test_command = blocks("bash")[1].strip()
    assert test_command.endswith("-m pytest -q -n 2")
    assert '-e ".[dev]"' in test_command
    script = (ROOT / ".ci" / "run").read_text()
    assert "-m pytest -q -n 2" in script and '-e ".[dev]"' in script
    assert "torch==2.13.0" in script and "torch==2.13.0" in blocks("bash")[0]


def test_nothing_is_left_to_fill() -> None:
    assert not re.findall(r"<!-- (?:TABLE|PICTURE): .*? -->", README)
