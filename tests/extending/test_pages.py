"""The commands of the pages in docs/extending, run as a user would: in another folder, with the example installed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "extending"


def commands(page: Path) -> list[str]:
    return [line for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S) for line in block.splitlines()]


def run(command: str, folder: Path, installed: Path) -> str:
    program, *words = shlex.split(command)
    assert program == "districompile"
    path = os.pathsep.join((str(ROOT), str(installed)))
    done = subprocess.run(
        [sys.executable, "-m", "districompile", *words], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("page", ["backend", "model", "operator", "pass", "rule"])
def test_commands_of_the_page(page: str, tmp_path: Path, installed: Path) -> None:
    found = commands(PAGES / f"{page}.md")
    assert found
    for command in found:
        run(command, tmp_path, installed)


def test_every_page_is_linked_from_its_example() -> None:
    table = (ROOT / "docs" / "examples" / "districompile-example" / "README.md").read_text()
    for page in PAGES.glob("*.md"):
        assert page.name == "transport.md" or f"`{page.name}`" in table


def test_links_of_the_pages_lead_somewhere() -> None:
    for page in PAGES.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_bundles_without_the_package(tmp_path: Path, installed: Path) -> None:
    """Without it a bundle that calls its operator is refused in one line, and one that does not runs."""
    example = f"convert districompile_example.sharpen:network --gpus 2 --out {tmp_path}"
    run(f"districompile {example}/eager --backend eager", tmp_path, installed)
    run(f"districompile {example}/onnx --backend onnxruntime", tmp_path, installed)
    nowhere = tmp_path / "nowhere"
    assert "step without transfers" in run("districompile bench onnx --calls 1", tmp_path, nowhere)
    with pytest.raises(
        AssertionError, match=r"error: .*example\.sharpen\.default of the package districompile-example"
    ):
        run("districompile bench eager --calls 1", tmp_path, nowhere)
    without_entry_points = tmp_path / "modules"
    without_entry_points.mkdir()
    (without_entry_points / "districompile_example").symlink_to(installed / "districompile_example")
    bench = "districompile bench eager --calls 1 --extension districompile_example"
    assert "step without transfers" in run(bench, tmp_path, without_entry_points)
