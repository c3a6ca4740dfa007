# SPDX-License-Identifier: Apache-2.0
"""Hashes that are computed before they are needed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from districompile.bundle import hashes
from districompile.bundle.hashes import check_hashes, hash_ahead
from districompile.errors import BundleError


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, str]:
    """Write two files, and return their hashes."""
    content = {"a": b"one" * 1000, "b": b"two"}
    for name, text in content.items():
        (tmp_path / name).write_bytes(text)
    return {name: hashlib.sha256(text).hexdigest() for name, text in content.items()}


def read_again(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note the files that are hashed from here on."""
    seen: list[str] = []
    usual = hashes.hash_files

    def noted(paths: dict[str, Path], progress: hashes.Progress | None = None) -> dict[str, str]:
        seen.extend(paths)
        return usual(paths, progress)

    monkeypatch.setattr(hashes, "hash_files", noted)
    return seen


def test_files_are_hashed_once(tmp_path: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    hash_ahead(tmp_path, expected)
    hashes._AHEAD[tmp_path.resolve()].join()
    seen = read_again(monkeypatch)
    check_hashes(tmp_path, expected)
    assert not seen
    check_hashes(tmp_path, expected)  # what was computed before serves once
    assert sorted(seen) == ["a", "b"]


def test_what_changed_since_is_hashed_again(
    tmp_path: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").write_bytes(b"TWO")
    hash_ahead(tmp_path, expected)
    hashes._AHEAD[tmp_path.resolve()].join()
    os.replace(tmp_path / "other", tmp_path / "b")
    seen = read_again(monkeypatch)
    with pytest.raises(BundleError, match="b was changed"):
        check_hashes(tmp_path, expected)
    assert seen == ["b"]


def test_a_file_that_is_damaged_or_missing_is_named_as_ever(tmp_path: Path, expected: dict[str, str]) -> None:
    (tmp_path / "a").write_bytes(b"damaged")
    hash_ahead(tmp_path, expected)
    with pytest.raises(BundleError, match="a was changed"):
        check_hashes(tmp_path, expected)
    (tmp_path / "a").unlink()
    hash_ahead(tmp_path, expected)
    with pytest.raises(BundleError, match="a cannot be read"):
        check_hashes(tmp_path, expected)
