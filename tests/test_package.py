"""Test the source distribution and the wheel: what they hold, and that an installed wheel works outside of the
repository."""

from __future__ import annotations

import email
import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from districompile.version import __version__

ROOT = Path(__file__).resolve().parents[1]
BUILT = {"__pycache__", "build", "dist", ".git", ".venv"}  # and all caches
FOLDERS = ("docs", "models", "passes", "tests", "tools")

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command in an environment that does not know the repository; return what it printed."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def repository_files() -> set[str]:
    """Return the files of the repository that belong into a source distribution, links not followed."""
    found = set()
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [f for f in folders if f not in BUILT and not f.endswith((".egg-info", "_cache", ".hypothesis"))]
        relative = Path(folder).relative_to(ROOT)
        if relative.parts[:1] in {(name,) for name in (*FOLDERS, "districompile")}:
            found |= {(relative / f).as_posix() for f in files if not f.endswith(".pyc")}
    return found


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the source distribution from a copy, so that the repository stays as it is."""
    folder = tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns(*BUILT, "*.egg-info", "*_cache", ".hypothesis")
    shutil.copytree(ROOT, folder / "copy", symlinks=True, ignore=ignored)
    backend = "from setuptools import build_meta; print(build_meta.build_sdist('../dist'))"
    name = run(sys.executable, "-c", backend, cwd=folder / "copy").splitlines()[-1]
    return folder / "dist" / name


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):  # not in every Python 3.10 and 3.11
            archive.extractall(folder, filter="data")
        else:
            archive.extractall(folder)
    (top,) = folder.iterdir()
    return top


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the source distribution."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, unpacked, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a new environment that sees this one's other packages; return its folder of programs."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # Paths in a .pth file are searched after the environment's own packages, and their .pth files are not read: an
    # editable installation of the repository is not seen.
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    programs = folder / "bin"
    run(sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet", "--no-deps", "--no-index",
        "--force-reinstall", wheel, cwd=folder)  # fmt: skip
    return programs


def test_sdist_holds_what_the_repository_holds(unpacked: Path) -> None:
    for name in repository_files():
        assert (unpacked / name).is_file(), name
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes(), name
    for name in ("README.md", "LICENSE", "pyproject.toml", "setup.py", "constraints-cpu.txt", ".ci/run", "PKG-INFO"):
        assert (unpacked / name).is_file(), name
    for name in ("passes", "models"):
        assert (unpacked / "districompile" / name).resolve() == (unpacked / name).resolve()


def test_sdist_can_be_tested(unpacked: Path) -> None:
    """The tests of the source distribution find their helpers and the package beside them."""
    command = (sys.executable, "-m", "pytest", "-q", "--collect-only", "tests/test_layers.py", "tests/test_golden.py")
    assert "test_layers.py" in run(*command, cwd=unpacked, PYTHONPATH=str(unpacked))


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(n).decode() for n in names if n.endswith(".dist-info/METADATA"))
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"districompile"}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "districompile").rglob("*") if p.is_file()}
    for name in ("passes", "models"):
        folder = ROOT / name
        sources |= {f"districompile/{p.relative_to(ROOT).as_posix()}" for p in folder.rglob("*") if p.is_file()}
    missing = {n for n in sources if "__pycache__" not in n} - names
    assert not missing
    for name in ("passes/rules/table.py", "models/demo/unet/diffusion_pytorch_model.safetensors", "cuda/exchange.ptx"):
        assert f"districompile/{name}" in names
    assert any(n.endswith("licenses/LICENSE") for n in names)
    fields = email.message_from_string(metadata)
    assert fields["License-Expression"] == "Apache-2.0" and fields["Requires-Python"] == ">=3.10"
    assert fields["Author"] and fields["Keywords"] and len(fields.get_all("Classifier", [])) > 10


def test_wheel_can_be_built_from_the_repository_too(wheel: Path, unpacked: Path, tmp_path: Path) -> None:
    """A wheel of the tree and a wheel of the source distribution hold the same files."""
    ignored = shutil.ignore_patterns(*BUILT, "*.egg-info", "*_cache", ".hypothesis")
    shutil.copytree(ROOT, tmp_path / "copy", symlinks=True, ignore=ignored)
    backend = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    name = run(sys.executable, "-c", backend, cwd=tmp_path / "copy").splitlines()[-1]
    with zipfile.ZipFile(tmp_path / name) as one, zipfile.ZipFile(wheel) as other:
        hashes = [{i.filename: i.CRC for i in z.infolist() if ".dist-info/" not in i.filename} for z in (one, other)]
    assert hashes[0] == hashes[1]


def test_installed_program_shows_its_help(installed: Path, tmp_path: Path) -> None:
    assert "convert" in run(installed / "districompile", "--help", cwd=tmp_path)
    assert run(installed / "districompile", "--version", cwd=tmp_path).strip().endswith(__version__)
    place = run(installed / "python", "-c", "import districompile; print(districompile.__file__)", cwd=tmp_path)
    assert Path(place.strip()).is_relative_to(installed.parent)


def test_installed_program_draws_an_image(installed: Path, tmp_path: Path) -> None:
    """Convert the demo model and draw with two processes, from a folder outside of the repository."""
    pytest.importorskip("diffusers")
    program = installed / "districompile"
    run(program, "convert", "demo", "--gpus", "2", "--backend", "eager", "--out", "bundle", cwd=tmp_path)
    assert json.loads((tmp_path / "bundle" / "manifest.json").read_text())["files"]
    run(program, "run", "bundle", "--prompt", "a red circle", "--steps", "4", "--out", "image.png", cwd=tmp_path)
    assert (tmp_path / "image.png").read_bytes().startswith(b"\x89PNG")


def test_every_file_names_the_licence() -> None:
    """Files with code have the line that licence scanners read."""
    for folder in ("districompile", "passes", "models", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = path.read_text().splitlines()[:2]
            assert not lines or "# SPDX-License-Identifier: Apache-2.0" in lines, path
