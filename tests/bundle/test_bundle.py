"""Bundles: written whole or not at all, checked when opened, refused in one line."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_toy import make_plan

from districompile.bundle.bundle import FORMAT_VERSION, MANIFEST, Bundle, BundleWriter
from districompile.errors import BundleError


def write(path: Path, weights: bytes = b"weights" * 100, **manifest: Any) -> Path:
    with BundleWriter(path) as writer:
        writer.path("weights.safetensors").write_bytes(weights)
        for engine in ("a", "b"):
            writer.path(f"engines/{engine}.toy").write_text(engine)
        writer.finish(make_plan(), "for people", backend="toy", **manifest)
    return path


def left_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    path = write(tmp_path / "b", source="some/model", config={"in_channels": 4, "odd": {1, 2}.__class__}, device="cpu")
    bundle = Bundle.open(path)
    assert bundle.plan == make_plan()
    assert bundle.manifest["source"] == "some/model" and bundle.manifest["config"]["in_channels"] == 4
    assert bundle.manifest["mesh"] == {"cfg": 1, "patch": 2}
    assert set(bundle.manifest["files"]) == {
        "plan.json", "plan.txt", "weights.safetensors", "engines/a.toy", "engines/b.toy",
    }  # fmt: skip
    assert bundle.engine_path("a", ".toy").read_text() == bundle.engine_path("a.toy").read_text() == "a"
    assert (path / "plan.txt").read_text() == "for people"
    assert left_in(tmp_path) == ["b"]


def test_hashes_are_of_the_contents(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(100))
    with BundleWriter(tmp_path / "b") as writer:
        writer.copy("weights.safetensors", source)
        writer.text("engines/a.toy", "a")
        writer.finish(make_plan(), "", backend="toy", graphs={"01-capture.txt": "%x"})
    assert Bundle.open(tmp_path / "b").manifest["files"]["graphs/01-capture.txt"]["size"] == 2


def test_a_wrong_known_hash_is_noticed(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b") as writer:
        writer.path("weights.safetensors").write_bytes(b"x")
        writer.known("weights.safetensors", "0" * 64)
        writer.finish(make_plan(), "", backend="toy")
    with pytest.raises(BundleError, match=r"weights\.safetensors was changed"):
        Bundle.open(tmp_path / "b")


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    assert write(tmp_path / "b").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_replaces_a_bundle_and_an_empty_folder_only(tmp_path: Path) -> None:
    path = write(tmp_path / "b", b"old")
    write(path, b"new")
    assert (path / "weights.safetensors").read_bytes() == b"new"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    (tmp_path / "file").touch()
    for name in ("photos", "file"):
        with pytest.raises(BundleError, match=f"{name} exists and is not a bundle"):
            write(tmp_path / name)
    assert left_in(tmp_path) == ["b", "empty", "file", "photos"]
    assert left_in(tmp_path / "photos") == ["cat.png"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_and_the_old_bundle(tmp_path: Path, error: BaseException) -> None:
    path = write(tmp_path / "b", b"old")
    with pytest.raises(type(error)), BundleWriter(path) as writer:
        writer.path("weights.safetensors").write_bytes(b"new")
        raise error
    assert left_in(tmp_path) == ["b"] and Bundle.open(path)
    assert (path / "weights.safetensors").read_bytes() == b"old"


def test_leaving_without_finish_writes_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b") as writer:
        writer.path("weights.safetensors").write_bytes(b"new")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), Exception("I/O error: No space left on device (os error 28)")],
)
def test_disk_full_is_one_line(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(BundleError) as caught, BundleWriter(tmp_path / "b"):
        raise error
    text = str(caught.value)
    assert "\n" not in text and "No space left on device" in text and "free some space" in text
    assert left_in(tmp_path) == []


def test_disk_full_for_real(tmp_path: Path) -> None:
    """A child that may write no file above 64 kB, as on a full disk."""
    report = tmp_path / "report"
    place = tmp_path / "place"
    place.mkdir()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
            write(place / "b", b"x" * (1 << 20))
        except BundleError as e:
            report.write_text(str(e))
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert "File too large: free some space" in report.read_text()
    assert left_in(place) == []


def test_a_failed_rename_keeps_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "b", b"old")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(BundleError, match="Input/output error"):
        write(path, b"new")
    assert left_in(tmp_path) == ["b"] and (path / "weights.safetensors").read_bytes() == b"old"


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda p: (p / MANIFEST).unlink(), "is not a bundle: it has no manifest.json"),
    "broken manifest": (lambda p: truncate(p / MANIFEST), "manifest.json cannot be read"),
    "no files": (lambda p: edit_manifest(p, lambda m: m.pop("files")), "does not list the bundle's files"),
    "newer format": (
        lambda p: edit_manifest(p, lambda m: m.update(format_version=FORMAT_VERSION + 1)),
        f"has format version {FORMAT_VERSION + 1}, and this districompile reads version {FORMAT_VERSION}: use the",
    ),
    "missing engine": (lambda p: (p / "engines/a.toy").unlink(), "a.toy is missing: copy the bundle again, or convert"),
    "truncated weights": (lambda p: truncate(p / "weights.safetensors"), "has 699 bytes instead of 700: copy the"),
    "changed weights": (lambda p: flip(p / "weights.safetensors"), "weights.safetensors was changed: its hash is not"),
    "changed plan": (lambda p: flip(p / "plan.json"), "plan.json was changed"),
    "file outside": (
        lambda p: edit_manifest(p, lambda m: m["files"].update({"../x": {"size": 0, "sha256": ""}})),
        r"lists the file '\.\./x' outside of the bundle",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "b")
    act, message = DAMAGES[damage]
    act(path)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(path)
    assert "\n" not in str(caught.value)


def test_quick_checks_sizes_but_not_hashes(tmp_path: Path) -> None:
    path = write(tmp_path / "b")
    flip(path / "weights.safetensors")
    Bundle.open(path, verify="quick")
    truncate(path / "weights.safetensors")
    with pytest.raises(BundleError):
        Bundle.open(path, verify="quick")
    Bundle.open(path, verify=False)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no such bundle"):
        Bundle.open(tmp_path / "none")


def test_progress_counts_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "b")
    told: list[tuple[int, int]] = []
    bundle = Bundle.open(path, progress=lambda done, total: told.append((done, total)))
    total = sum(f["size"] for f in bundle.manifest["files"].values())
    assert told[-1] == (total, total) and told == sorted(told)
