"""Test tools/check.py, the command-line options of the tests, and the turns of slow tests."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(path: Path) -> ModuleType:
    """Import a file that belongs to no package."""
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = load(ROOT / "tools" / "check.py")
conftest = load(ROOT / "tests" / "conftest.py")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record the command lines that are started, without the interpreter, instead of running them."""
    lines: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[0] == sys.executable
        lines.append(command[1:])
        return subprocess.CompletedProcess(command, 1 if "ruff" in command else 0)

    monkeypatch.setattr(check.subprocess, "run", run)
    monkeypatch.setattr(check, "fetch", lambda: None)
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: object())
    return lines


def main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["check.py", *words])
    return int(check.main())


def test_every_check_runs_even_if_one_fails(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(monkeypatch) == 1
    tools = [line[1] for line in started]
    assert tools == ["ruff", "ruff", "mypy", "mkdocs", "pytest"]
    assert capsys.readouterr().out.endswith("failed: lint\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["test"], "-m pytest -q"),
        (["test", "--all"], "-m pytest -q --all"),
        (["test", "--fast"], "-m pytest -q -m not slow"),
        (["test", "-k", "cli"], "-m pytest -q -k cli"),
        (["--nightly"], "-m pytest -q --fresh-seed random --networks 1200 tests/passes tests/test_fuzz.py"),
        (["docs"], "-m mkdocs build --strict --quiet --site-dir build/site"),
        (["types"], "-m mypy --strict"),
    ],
)
def test_command_lines(words: list[str], line: str, started: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(monkeypatch, *words) == 0
    assert [" ".join(started[0])] == [line] and len(started) == 1


def test_docs_are_left_out_without_mkdocs(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    assert main(monkeypatch, "docs") == 0 and not started
    assert 'pip install -e ".[docs]"' in capsys.readouterr().out


def test_an_unknown_check_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(monkeypatch, "spelling")
    assert "no check named 'spelling'; there are: lint, types, docs, test" in capsys.readouterr().err


def test_the_nightly_run_names_files_that_exist() -> None:
    assert all((ROOT / name).exists() for name in check.PROPERTIES)


def test_seeds() -> None:
    assert conftest.read_seed("7") == 7
    seeds = {conftest.read_seed("random") for _ in range(8)}
    assert len(seeds) == 8 and all(0 <= s < 2**32 for s in seeds)
    with pytest.raises(ValueError):
        conftest.read_seed("some")


@pytest.mark.slow
def test_a_fresh_seed_draws_other_examples(tmp_path: Path) -> None:
    """Equal seeds draw equal examples, in tests of hypothesis and in those that take the fixture."""
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_example.py").write_text(
        "from hypothesis import given, settings, strategies as st\n"
        "drawn = []\n"
        "@settings(derandomize=False, database=None, max_examples=20)\n"
        "@given(st.integers(0, 10**9))\n"
        "def test_a(x):\n    drawn.append(x)\n"
        "def test_b(fresh_seed):\n    print('drawn', fresh_seed, drawn)\n"
    )
    lines = []
    for seed in ("5", "5", "6"):
        command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "--fresh-seed", seed]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert f"Fresh seed: {seed}." in result.stdout
        lines.append(next(line for line in result.stdout.splitlines() if "drawn" in line))
    assert lines[0] == lines[1] and lines[1].partition("[")[2] != lines[2].partition("[")[2]
    assert "drawn 5 [" in lines[0] and "drawn 6 [" in lines[2]


def test_turns_share_the_slow_tests() -> None:
    turns = [conftest.turn_of(f"tests/test_example.py::test_case[{i}]") for i in range(300)]
    assert all(5 < turns.count(t) < 50 for t in range(conftest.TURNS))
    assert turns == [conftest.turn_of(f"tests/test_example.py::test_case[{i}]") for i in range(300)]


def test_what_was_recorded_to_take_long_is_slow(tmp_path: Path) -> None:
    """Unless it is to run always; and what did not run keeps its record."""
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: s\n    always: a\n")
    (tmp_path / "test_it.py").write_text(
        "import pytest, time\n"
        "def test_short(): pass\ndef test_long(): pass\n"
        "@pytest.mark.always\ndef test_always(): pass\n"
        "def test_now(): time.sleep(0.02)\n"
    )
    record = tmp_path / "durations.json"
    record.write_text(
        json.dumps({"test_it.py::test_long": 99, "test_it.py::test_always": 99, "test_it.py::test_now": 3})
    )
    turn = (conftest.turn_of("test_it.py::test_long") + 1) % conftest.TURNS

    def ran(*words: str) -> str:
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *words, "."]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return result.stdout

    some = ran("--turn", str(turn))
    assert "3 passed" in some and "test_long" not in some and "not run: 1." in some
    fast = ran("-m", "not slow", "--turn", str(turn), "--record-durations")
    assert "3 passed" in fast and "test_long" not in fast
    assert json.loads(record.read_text()) == {"test_it.py::test_long": 99}  # the others took less than is recorded
    assert "4 passed" in ran("--all")
