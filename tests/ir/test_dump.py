"""Dumps: the captured graph first, then each pass with what it changed; fetches name their arguments."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import districompile as dc
from districompile.ir.printer import fit_lines


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.drop = nn.Dropout()

    def forward(self, sample: Tensor) -> Tensor:
        return self.drop(self.conv(self.conv(sample)))


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    dc.convert(Net().eval(), (torch.zeros(1, 2, 16, 4),), ranks=2, dump=folder)
    return folder


def test_the_captured_graph_is_first(dumped: Path) -> None:
    first = sorted(dumped.glob("*.txt"))[0]
    assert first.name == "00-captured.txt"
    text = first.read_text()
    assert text.startswith("# global graph, 2 ranks\n") and "aten.clone" in text


def test_diffs_hold_what_a_pass_changed(dumped: Path) -> None:
    names = [p.stem for p in sorted(dumped.glob("*.txt"))][1:]
    assert names == [p.stem for p in sorted(dumped.glob("*.diff"))]
    diff = next(dumped.glob("*-drop-noops.diff")).read_text()
    removed = [line for line in diff.splitlines() if line.startswith("-") and not line.startswith("---")]
    assert len(removed) == 2 and "aten.clone" in removed[0]  # and the return
    assert next(dumped.glob("*-explicit-casts.diff")).read_text() == ""
    previous = (dumped / "00-captured.txt").read_text().splitlines()
    for name in names:  # each diff leads from the text before to the text after
        text = (dumped / f"{name}.txt").read_text().splitlines()
        diff_lines = (dumped / f"{name}.diff").read_text().splitlines()[2:]
        gone = [line[1:] for line in diff_lines if line.startswith("-")]
        new = [line[1:] for line in diff_lines if line.startswith("+")]
        assert all(line in previous for line in gone) and all(line in text for line in new)
        assert len(text) - len(previous) == len(new) - len(gone)
        previous = text


def test_what_was_chosen_is_printed(dumped: Path) -> None:
    text = next(dumped.glob("*-choose-displaced.txt")).read_text()
    assert "# cut points of 16 rows: 0 8 16\n" in text
    halo, output = (line for line in text.splitlines() if "dc.fetch" in line)
    assert re.search(r"dc\.fetch\(%\w+, dim=2, want=\[-1\.\.9, 7\.\.17\], edge=zeros\)", halo)
    assert halo.endswith("  # displaced") and not output.endswith("# displaced")
    assert "want=[0..16, 0..16]" in output
    conv = [line for line in text.splitlines() if "aten.conv2d" in line][-1]
    assert conv.endswith(" @ [1, 2, 16*, 4]")  # the layout


def test_lines_that_fit() -> None:
    text = "%a = op(%b, %c, @weight.of.a.layer)\n\nreturn %a"
    fitted = fit_lines(text, 20)
    assert max(map(len, fitted.splitlines())) <= 24 and fitted.split() == text.split()
    assert fit_lines(text, None) == text
