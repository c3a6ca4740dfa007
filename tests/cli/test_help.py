"""Help and version: without PyTorch, in 80 columns, with every default and every choice; docs/cli.md is the same."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

import districompile as dc
from districompile.cli import bench, convert, doctor, inspect, plan, refit, run, serve, verify

ROOT = Path(__file__).resolve().parents[2]
SETTINGS: dict[str, Any] = {
    "convert": convert.Settings, "plan": plan.Settings, "inspect": inspect.Settings, "verify": verify.Settings,
    "run": run.Settings, "refit": refit.Settings, "bench": bench.Settings, "doctor": doctor.Settings,
    "serve": serve.Settings,
}  # fmt: skip
# Runs the command line where torch and the libraries around it cannot be imported.
BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "numpy"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
from districompile.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def blocked(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "TERMINAL_WIDTH", "FORCE_COLOR")}
    environment |= {"COLUMNS": "80", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, *words], capture_output=True, text=True, env=environment, timeout=60
    )


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], *([name, "--help"] for name in SETTINGS)], ids=str)
def test_no_torch(words: list[str]) -> None:
    done = blocked(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout and max(map(len, done.stdout.splitlines())) <= 80


def test_errors_of_options_need_no_torch() -> None:
    done = blocked("convert", "demo", "--gpus", "many")
    assert done.returncode == 2 and done.stderr.startswith("error: Invalid value for '--gpus'")


def test_the_blocker_blocks() -> None:
    done = blocked("inspect", "nowhere")
    assert done.returncode != 0 and "torch is blocked" in done.stderr


@pytest.mark.parametrize("name", SETTINGS)
def test_every_option_shows_its_default_and_its_choices(name: str) -> None:
    shown = "".join(c for c in blocked(name, "--help").stdout if c not in "│ \n").replace("[default:", "[")
    hints = typing.get_type_hints(SETTINGS[name], include_extras=True)
    for field in dataclasses.fields(SETTINGS[name]):
        base, info = typing.get_args(hints[field.name])
        assert info.help and "[" not in info.help, field.name  # rich reads brackets as markup
        for choice in [c for a in (base, *typing.get_args(base)) for c in typing.get_args(a) if isinstance(c, str)]:
            assert choice.replace(" ", "") in shown, (field.name, choice)
        if field.default is dataclasses.MISSING or base is bool:
            continue
        if field.default in (None, ()):
            assert isinstance(info.show_default, str), f"{field.name} does not say its default"
            assert f"[({info.show_default.replace(' ', '')})]" in shown, field.name
        else:
            assert f"[{field.default}]".replace(" ", "") in shown, field.name


def test_the_page_is_the_command_line() -> None:
    path = ROOT / "tools" / "cli_page.py"
    found = importlib.util.spec_from_file_location("cli_page", path)
    assert found is not None and found.loader is not None
    tool = importlib.util.module_from_spec(found)
    sys.modules["cli_page"] = tool  # dataclasses look their module up
    try:
        found.loader.exec_module(tool)
        assert (ROOT / "docs" / "cli.md").read_text() == tool.page(), "run python tools/cli_page.py"
    finally:
        del sys.modules["cli_page"]
    assert set(tool.JSON_KEYS) == set(SETTINGS)


def test_names_of_the_package_are_lazy() -> None:
    script = "import sys, districompile as dc; assert 'torch' not in sys.modules; print(sorted(dir(dc)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    for name in dc.__all__:
        assert f"'{name}'" in done.stdout
        assert name == "__version__" or getattr(dc, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        dc.colour  # noqa: B018
