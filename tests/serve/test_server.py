"""Starting the server: where it listens, what it needs for that, and errors before anything is loaded."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from districompile.bundle.manifest import manifest_text
from districompile.cli import main
from districompile.runtime.processes.supervisor import private_folder
from districompile.serve.server import ServeError, allowed_hosts, bind

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "correct horse battery"


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_need_a_token(host: str) -> None:
    with pytest.raises(ServeError, match="give --token"):
        bind(host, 0, None)
    with pytest.raises(ServeError, match="16 printable"):
        bind(host, 0, "short")
    try:
        bind(host, 0, TOKEN).close()
    except ServeError as e:
        assert host == "::" and "--host ::" in str(e)  # without IPv6


def test_the_loopback_needs_none() -> None:
    for host in ("127.0.0.1", "localhost"):
        bind(host, 0, None).close()
    with pytest.raises(ServeError, match="no such address"):
        bind("no.such.host.invalid", 0, None)
    with bind("127.0.0.1", 0, None) as taken, pytest.raises(ServeError, match="in use"):
        bind("127.0.0.1", taken.getsockname()[1], None)


def test_names_are_checked_where_no_token_is() -> None:
    assert allowed_hosts("127.0.0.1", TOKEN) is None
    assert {"localhost", "127.0.0.1", "me"} <= (allowed_hosts("ME", None) or frozenset())


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A folder with a manifest that can be read, and nothing that can be loaded."""
    entry = {"size": 1, "sha256": "0" * 64}
    manifest = {
        "format_version": 3, "created": "", "versions": {}, "source": "demo", "class": None, "backend": "eager",
        "device": "cpu", "engines": None, "mesh": {"cfg": 1, "patch": 2}, "config": None,
        "files": {"plan.json": entry, "weights.safetensors": entry},
    }  # fmt: skip
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").write_text(manifest_text(manifest))
    return tmp_path / "b"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "give --token"),
        (["--token", "short"], "16 printable"),
        (["--token", TOKEN, "--token-file", "x"], "give one of them"),
        (["--token-file", "no/such"], "--token-file no/such"),
        (["--lora", "style"], "NAME=FILE"),
        (["--lora", "style=no/such.safetensors"], "there is no file"),
        (["--lora", "style=a@much"], "NAME=FILE"),
        (["--steps", "300"], "--most-steps"),
        (["--log", "/no/such/folder/log"], "--log"),
        (["--port", "99999"], "--port"),
    ],
)
def test_wrong_options_are_one_line(
    bundle: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["serve", str(bundle), *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_no_bundle_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["serve", str(tmp_path / "none")]) == 2
    assert "there is no such bundle" in capsys.readouterr().err


def test_the_command_imports_no_pytorch(bundle: Path) -> None:
    """The socket is bound before the ranks start, so a port in use is found without them."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        script = (
            "import sys; from districompile.cli.main import main; import districompile.serve.server\n"
            f"code = main(['serve', {str(bundle)!r}, '--port', '{taken.getsockname()[1]}'])\n"
            "print([code, 'torch' in sys.modules, 'diffusers' in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert json.loads(done.stdout.lower()) == [2, False, False]
    assert "in use" in done.stderr


@pytest.mark.slow
@pytest.mark.multiprocess
def test_what_the_ranks_refuse_ends_the_command(bundle: Path) -> None:
    command = [sys.executable, "-m", "districompile", "serve", str(bundle), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "copy the bundle again" in done.stderr


def test_the_private_folder_fits_the_address_of_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for length in (1, 150):
        place = (tmp_path if length > 1 else tmp_path.parents[1]) / ("x" * length)
        place.mkdir(exist_ok=True)
        monkeypatch.setattr("tempfile.tempdir", str(place))
        folder = private_folder("serve")
        try:
            assert folder.stat().st_mode & 0o77 == 0 and (folder.parent == place) is (length == 1)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(folder / "server"))
        finally:
            shutil.rmtree(folder)
