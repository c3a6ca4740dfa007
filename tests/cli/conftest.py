"""Commands see a machine without GPUs, unless a test describes another, so that no test depends on this one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_cli import NETS

from districompile.cli import defaults, main


@pytest.fixture(autouse=True)
def machine_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "this_machine", defaults.Machine)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module of factories in it."""
    (tmp_path / "cli_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("cli_nets", None)
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bundle of the tiny net for two ranks; tests that damage it copy it first."""
    home = tmp_path_factory.mktemp("made")
    (home / "cli_nets.py").write_text(NETS)
    sys.modules.pop("cli_nets", None)
    sys.path.insert(0, str(home))
    try:
        assert main.main(["convert", "cli_nets:tiny", "--backend", "eager", "--out", str(home / "b"), "--json"]) == 0
        yield home / "b"
    finally:
        sys.path.remove(str(home))
