# SPDX-License-Identifier: Apache-2.0
"""Pictures of ``run`` are written while the next ones are drawn, and none is lost."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from districompile.cli import pictures
from districompile.cli.commands.run_rank import _Writer
from districompile.cli.generate import as_bytes
from districompile.errors import Error

PIXELS = as_bytes(torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing waits until this is set."""
    opened = threading.Event()
    write = pictures.write_picture

    def wait(*args: Any) -> None:
        assert opened.wait(30)
        write(*args)

    monkeypatch.setattr(pictures, "write_picture", wait)
    return opened


def test_drawing_goes_on_while_a_picture_is_written(gate: threading.Event, tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.png" for i in range(2)]
    with _Writer(keep=True) as writer:
        writer.write(PIXELS, files[:1], [{}])
        assert not files[0].exists()
        gate.set()
        writer.write(PIXELS, files[1:], [{}])
        assert files[0].exists()
        assert [made.size for made in writer.finish()] == [(8, 8)] * 2
    assert all(file.exists() for file in files)


def test_what_is_being_written_is_finished_if_drawing_fails(gate: threading.Event, tmp_path: Path) -> None:
    with pytest.raises(Error, match="a rank was lost"), _Writer(keep=False) as writer:
        writer.write(PIXELS, [tmp_path / "a.png"], [{}])
        gate.set()
        raise Error("a rank was lost")
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize("keep", [True, False])
def test_a_picture_that_cannot_be_written_is_an_error(keep: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((OSError, Error)), _Writer(keep) as writer:
        writer.write(PIXELS, [tmp_path / "file" / "a.png"], [{}])
        writer.finish()
