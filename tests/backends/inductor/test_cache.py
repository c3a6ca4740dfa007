# SPDX-License-Identifier: Apache-2.0
"""What the inductor backend keeps for later conversions, and what it does with a damaged entry. Nothing is compiled."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from districompile.backends.inductor import backend as module
from districompile.backends.inductor.backend import InductorBackend
from districompile.backends.inductor.cache import CompileCache, default_folder, prune, remembered
from districompile.backends.inductor.package import CompileJob
from districompile.bundle.weights import WeightFile
from districompile.testing import make_segment

_REASON = InductorBackend("cpu", cache="none").build_unavailable_reason()


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.package"))


def test_an_entry_is_found_again(tmp_path: Path) -> None:
    (tmp_path / "made").write_bytes(b"code")
    CompileCache(tmp_path / "c").store("a", tmp_path / "made")
    assert CompileCache(tmp_path / "c").fetch("a", tmp_path / "found")
    assert (tmp_path / "found").read_bytes() == b"code"
    assert not CompileCache(tmp_path / "c").fetch("b", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "digest"])
def test_a_damaged_entry_is_deleted(tmp_path: Path, damage: str) -> None:
    (tmp_path / "made").write_bytes(b"some code")
    cache = CompileCache(tmp_path / "c")
    cache.store("a", tmp_path / "made")
    [entry] = entries(tmp_path / "c")
    data = entry.read_bytes()
    entry.write_bytes({"cut": data[:-1], "changed": data[:-1] + b"x", "empty": b"", "digest": b"0" + data[1:]}[damage])
    assert not cache.fetch("a", tmp_path / "found")
    assert not (tmp_path / "found").exists() and not entries(tmp_path / "c")


def test_a_folder_that_others_write_to_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "made").write_bytes(b"code")
    cache = CompileCache(tmp_path / "c")
    cache.store("a", tmp_path / "made")
    (tmp_path / "c").chmod(0o777)
    assert not cache.fetch("a", tmp_path / "found")
    cache.store("b", tmp_path / "made")
    (tmp_path / "c").chmod(0o700)
    assert cache.fetch("a", tmp_path / "found") and not cache.fetch("b", tmp_path / "found")


def test_without_a_folder_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "made").write_bytes(b"code")
    for cache in (CompileCache(None), CompileCache(tmp_path / "made" / "below")):
        cache.store("a", tmp_path / "made")
        assert not cache.fetch("a", tmp_path / "found")
        cache.keep_timed("k", 3)


def test_the_least_recently_used_entries_go(tmp_path: Path) -> None:
    (tmp_path / "made").write_bytes(b"x" * 100)
    cache = CompileCache(tmp_path / "c")
    for age, key in enumerate("abc"):
        before = entries(tmp_path / "c")
        cache.store(key, tmp_path / "made")
        [new] = set(entries(tmp_path / "c")) - set(before)
        os.utime(new, (age, age))
    assert cache.fetch("a", tmp_path / "found")
    prune(tmp_path / "c", 350)
    assert [cache.fetch(key, tmp_path / "found") for key in "abc"] == [True, False, True]


def test_timings_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    calls: list[tuple[int, ...]] = []

    def choose(*sizes: int) -> tuple[int, ...] | None:
        calls.append(sizes)
        return sizes if sizes[0] > 1 else None

    for _ in range(2):  # each as in a new process
        with CompileCache(tmp_path / "c").remembering():
            best = remembered(choose)
            assert [best(1, 2), best(3, 4), best(3, 4)] == [None, (3, 4), (3, 4)]
    assert calls == [(1, 2), (3, 4)]
    file = tmp_path / "c" / "timings.jsonl"
    file.write_text(file.read_text().replace("[3, 4]]", "[3, 5]]"))  # not what was measured
    with CompileCache(tmp_path / "c").remembering():
        assert remembered(choose)(3, 4) == (3, 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another GPU")
    with CompileCache(tmp_path / "c").remembering():
        remembered(choose)(1, 2)
    assert calls == [(1, 2), (3, 4), (3, 4), (1, 2)]


@pytest.mark.skipif(_REASON is not None, reason=str(_REASON))
def test_a_second_conversion_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def compile_here(job: CompileJob, path: Path) -> None:
        compiled.append(job.graph)
        path.write_bytes(b"compiled " + job.graph.encode())

    monkeypatch.setattr(module, "compile_here", compile_here)
    monkeypatch.setattr(module, "versions", lambda: ("1",))
    weights = WeightFile.open(empty_weights(tmp_path))
    segments = [make_segment(f, {"x": torch.randn(3, 5)}) for f in (torch.sin, torch.cos)]

    def convert(name: str) -> list[bytes]:
        folder = tmp_path / name
        folder.mkdir()
        backend = InductorBackend("cpu", workers=1, cache=str(tmp_path / "c"))
        for number, segment in enumerate(segments):
            backend.build(segment, weights, folder / f"{number}.aoti.json")
        files = [json.loads((folder / f"{n}.aoti.json").read_text())["package"] for n in range(len(segments))]
        return [(folder / file).read_bytes() for file in files]

    first = convert("first")
    assert len(compiled) == 2
    assert convert("second") == first and len(compiled) == 2
    entries(tmp_path / "c")[0].write_bytes(b"damaged")
    assert convert("third") == first and len(compiled) == 3
    monkeypatch.setattr(module, "versions", lambda: ("2",))  # of PyTorch, CUDA or Triton
    assert convert("fourth") == first and len(compiled) == 5


def empty_weights(folder: Path) -> Path:
    path = folder / "weights"
    WeightFile.write(path, [])
    return path


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/districompile/inductor")
