"""Where results go: refused before the work, written whole or not at all, and nothing of the user's is lost."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers_toy import make_plan

import districompile as dc
from districompile.bundle.bundle import MANIFEST, Bundle, BundleWriter, check_replaceable
from districompile.bundle.refit import refit
from districompile.cli import main
from districompile.common.outputs import OutputError, check_file, check_folder, other_file, uninterrupted, write_file
from districompile.errors import BundleError


def write(path: Path, weights: bytes = b"weights", **manifest: object) -> Path:
    with BundleWriter(path) as writer:
        writer.path("weights.safetensors").write_bytes(weights)
        writer.path("engines/a.toy").write_text("a")
        writer.finish(make_plan(), "for people", backend="toy", **manifest)  # type: ignore[arg-type]
    return path


def tree(folder: Path) -> dict[str, object]:
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.is_file() and p.read_bytes()
        for p in folder.rglob("*")
    }


FOREIGN = {
    "a note beside the manifest": lambda b: (b / "notes.txt").write_text("mine"),
    "a note beside the engines": lambda b: (b / "engines" / "notes.txt").write_text("mine"),
    "a hidden file": lambda b: (b / ".git").touch(),
    "an empty folder": lambda b: (b / "pictures").mkdir(),
    "a link": lambda b: (b / "link").symlink_to("/"),
    "a file that became a link": lambda b: _to_link(b / "engines" / "a.toy"),
    "a file that became a folder": lambda b: _to_folder(b / "engines" / "a.toy"),
    "another program's manifest": lambda b: (b / MANIFEST).write_text(json.dumps({"name": "app", "files": {}})),
    "a list as manifest": lambda b: (b / MANIFEST).write_text("[1]"),
    "no manifest": lambda b: (b / MANIFEST).unlink(),
}


def _to_link(path: Path) -> None:
    path.rename(path.parent.parent.parent / "kept")
    path.symlink_to(path.parent.parent.parent / "kept")


def _to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_not_wholly_a_bundle_is_never_replaced(what: str, tmp_path: Path) -> None:
    path = write(tmp_path / "b")
    FOREIGN[what](path)
    was = tree(tmp_path)
    for attempt in (lambda: write(path, b"new"), lambda: check_replaceable(path, {}, force=True)):
        with pytest.raises(BundleError, match="is not a bundle|is not a file of the bundle") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert tree(tmp_path) == was


def test_what_comes_during_the_work_is_not_lost(tmp_path: Path) -> None:
    path = write(tmp_path / "b", b"old")
    with pytest.raises(BundleError, match=r"holds notes\.txt"), BundleWriter(path) as writer:
        writer.path("weights.safetensors").write_bytes(b"new")
        (path / "notes.txt").write_text("mine")
        writer.finish(make_plan(), "", backend="toy")
    assert (path / "notes.txt").read_text() == "mine" and (path / "weights.safetensors").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_damaged_bundle_and_a_cache_of_engines_are_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "b")
    (path / "engines" / "a.toy").unlink()
    (path / "cache").mkdir()
    (path / "cache" / "tensorrt_rtx-1.7-gpu.cache").touch()
    write(path, b"new")
    assert Bundle.open(path) and not (path / "cache").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a bundle"])
def test_a_link_stays_a_link(there: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    if there == "an empty folder":
        disk.mkdir()
    elif there == "a bundle":
        write(disk, b"old")
    (tmp_path / "link").symlink_to("disk")
    write(tmp_path / "link", b"new")
    assert os.readlink(tmp_path / "link") == "disk" and Bundle.open(disk)
    assert (disk / "weights.safetensors").read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "link"]


def test_folders_that_were_made_on_the_way_go_again(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), BundleWriter(tmp_path / "a" / "b" / "c"):
        raise RuntimeError
    assert tree(tmp_path) == {}
    write(tmp_path / "a" / "b" / "c")
    assert Bundle.open(tmp_path / "a" / "b" / "c")


def net(scale: float = 1.0) -> torch.nn.Module:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1))
    module[0].weight.data *= scale
    return module


def program(ranks: int = 2, **options: object) -> dc.Program:
    return dc.convert(net(), args=(torch.randn(1, 4, 16, 8),), ranks=ranks, rows={"input": 2}, **options)  # type: ignore[arg-type]


def test_another_bundle_is_replaced_by_force_alone(tmp_path: Path) -> None:
    path, made = tmp_path / "b", program()
    made.save(path, "eager")
    made.save(path, "eager")  # the same again
    program().save(path, "eager")
    was = tree(path)
    for other, more in ((program(3), {}), (program(warmup_steps=7), {}), (made, {"source": "another/model"})):
        with pytest.raises(BundleError, match="with other options: give --force"):
            other.save(path, "eager", **more)  # type: ignore[arg-type]
        assert tree(path) == was
    program(3).save(path, "eager", force=True)
    assert Bundle.open(path).plan.ranks == 3


def test_weights_of_the_user_are_replaced_by_force_alone(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    program().save(a, "eager")
    refit(a, b, module=net(2.0), note={"weights": "two"})
    refit(a, b, module=net(2.0), note={"weights": "two"})  # the same again
    with pytest.raises(BundleError, match="give --force"):
        refit(a, b, module=net(3.0), note={"weights": "three"})
    refit(a, b, module=net(3.0), note={"weights": "three"}, force=True)
    refit(b, module=net(4.0), note={"weights": "four"})  # in its place, as asked for
    with pytest.raises(BundleError, match="give --force"):
        program().save(b, "eager")
    (b / "notes.txt").touch()
    with pytest.raises(BundleError, match="holds notes.txt"):
        refit(b, module=net(5.0))


# Files

LONG = "x" * 300


def test_places_of_files(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name in ("file", "new", "new/deep/er", "x" * 240):
        check_file(tmp_path / name)
    refused = {
        "folder": "is a folder", LONG: "File name too long", f"{LONG}/a": "File name too long",
        f"new/{LONG}": "File name too long", "file/a": "Not a directory", "a\0b": "null",
        "/".join(["y" * 200] * 25): "File name too long",
    }  # fmt: skip
    for name, reason in refused.items():
        with pytest.raises(OutputError, match=reason) as caught:
            check_file(tmp_path / name, "--report")
        assert str(caught.value).startswith("--report ") and "\n" not in str(caught.value)
    for name in (LONG, "file/a", "file", "a\0b"):
        with pytest.raises(OutputError):
            check_folder(tmp_path / name)
        with pytest.raises(BundleError):
            write(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        check_file(tmp_path / "locked" / "a")


def test_a_place_where_nothing_can_be_made() -> None:
    with pytest.raises(OutputError, match="choose another place"):
        check_file(Path("/proc/self/a"))


def test_files_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to("real")
    write_file(tmp_path / "link", "one")
    assert os.readlink(tmp_path / "link") == "real" and (tmp_path / "real").read_text() == "one"
    write_file(Path("/dev/null"), "gone")
    assert not Path("/dev/null").is_file()
    (tmp_path / "part").mkdir()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="real cannot be written: No space left on device"):
        write_file(tmp_path / "real", "two")
    assert (tmp_path / "real").read_text() == "one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "part", "real"]


def test_foreign_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").touch()
    assert other_file(tmp_path, {"a/b/c": {}}) is None
    assert other_file(tmp_path, {"a/c": {}}) == "a/b"


def test_signals_wait_for_the_end() -> None:
    done = []
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append(True)
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert done


# Commands


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "b"
    program().save(path, "eager", source="demo")
    return path


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["convert", "demo", "--out"], ""),
        (["convert", "demo", "--out", "b2", "--dump"], "--dump"),
        (["run", "{made}", "--out"], "--out"),
        (["run", "{made}", "--log-dir"], "--log-dir"),
        (["bench", "{made}", "--trace"], "--trace"),
        (["verify", "{made}", "--quality", "--report"], "--report"),
        (["refit", "{made}", "--weights", "demo", "--out"], ""),
    ],
)
def test_commands_refuse_before_the_work(
    words: list[str], option: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    ending = {"--out": ".png", "--report": ".html"}.get(option, "")
    for name in (LONG + ending, f"file/a{ending}"):
        assert main.main([*(w.format(made=made) for w in words), name]) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and ("too long" in err or "Not a directory" in err), err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert main.main(["run", "demo", "--prompt", "a star", "--out", str(tmp_path / "a.png")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: the bundle cannot be kept") and "set XDG_CACHE_HOME" in err
    assert len(err.splitlines()) == 1
