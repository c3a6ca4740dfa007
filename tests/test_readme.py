"""Check what the README and the pages of docs/ show: Python runs, command lines parse, set-up commands fit CI."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer

from districompile.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(<!-- test: run -->\n)?```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str, run: bool | None = None) -> list[str]:
    """Code blocks of a page; with ``run``, only those that are marked to be run, or only those that are not."""
    found = [(bool(mark), text) for mark, kind, text in BLOCK.findall(page.read_text()) if kind == language]
    return [text for mark, text in found if run is None or mark == run]


def commands(page: Path) -> list[list[str]]:
    """All districompile command lines of a page, without the program's name."""
    parts = [part for text in blocks(page, "bash") for line in text.splitlines() for part in line.split("&&")]
    words = [shlex.split(part) for part in parts]
    return [w[1:] for w in words if w and Path(w[0]).name == "districompile"]


def python_blocks(run: bool | None = None) -> list[object]:
    return [
        pytest.param(text, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, text in enumerate(blocks(page, "python", run))
    ]


@pytest.mark.parametrize("words", [words for page in PAGES for words in commands(page)], ids=" ".join)
def test_command_lines_parse(words: list[str]) -> None:
    """Every option exists and every value fits; nothing is run."""
    group = typer.main.get_command(app)
    name, *rest = words
    command = group.commands[name]  # type: ignore[attr-defined]
    with command.make_context(name, rest):
        pass


def test_commands_are_all_shown() -> None:
    shown = {words[0] for page in PAGES for words in commands(page)}
    assert shown == {"convert", "plan", "inspect", "verify", "run", "refit", "bench", "doctor", "serve"}


@pytest.mark.parametrize("text", python_blocks())
def test_python_parses(text: str) -> None:
    ast.parse(text)


@pytest.mark.parametrize("text", python_blocks(run=True))
def test_python_runs(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "page", "exec"), {})
    assert (tmp_path / "bundle" / "manifest.json").is_file()


def test_readme_has_python_that_runs() -> None:
    assert len(blocks(README, "python", run=True)) == 1


def test_ci_runs_the_test_command() -> None:
    """CI runs what the README tells people to run, and both set-up commands are one line each."""
    set_up = [text.strip() for text in blocks(README, "bash") if text.startswith((".venv", "python3 -m venv"))]
    assert len(set_up) == 2 and not any("\n" in text for text in set_up)
    draw, test = set_up
    assert "districompile run demo --gpus 2 --prompt" in draw and draw.endswith('at sunset"')
    assert test.endswith("-m pytest -q -n 3") and '-e ".[dev]"' in test
    script = (ROOT / ".ci" / "run").read_text()
    assert "-m pytest -q -n 3" in script and '-e ".[dev]"' in script
    assert "torch==2.13.0" in script and "torch==2.13.0" in draw


def test_readme_is_short() -> None:
    """At most 150 lines and two tables."""
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert sum(bool(re.fullmatch(r"\|( *:?-+:? *\|)+", line)) for line in lines) <= 2
