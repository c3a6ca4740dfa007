"""Factories of models, a bundle of one of them, and a check that a command fails with one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from districompile.cli import main

NETS = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(12, 4)
        self.inner = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample, timestep):
        return self.inner(sample) + self.table(timestep)[:, :, None, None]

def table():
    return Net(), (torch.randn(2, 4, 8, 8), torch.tensor([5, 5])), {}, {"sample": 2}

def broken():
    net = Net()
    with torch.no_grad():
        net.inner.bias[1] = torch.nan
    return net, *table()[1:]

def raises():
    return {}["no such key"]

def bad_rows():
    return Net(), (torch.randn(2, 4, 8, 8), torch.tensor([5, 5])), {}, {"sample": "2"}

def of_no_values():
    return Net(), (torch.empty(2, 4, 8, 8, device="meta"), torch.tensor([5, 5])), {}, {"sample": 2}
"""


@pytest.fixture(scope="module", name="nets")
def nets_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An importable folder with factories."""
    home = tmp_path_factory.mktemp("nets")
    (home / "error_nets.py").write_text(NETS)
    sys.path.insert(0, str(home))
    try:
        yield home
    finally:
        sys.path.remove(str(home))
        sys.modules.pop("error_nets", None)


@pytest.fixture(scope="module", name="bundle")
def bundle_of_nets(nets: Path) -> Path:
    assert main.main(["convert", "error_nets:table", "--backend", "eager", "--out", str(nets / "b"), "--json"]) == 0
    return nets / "b"


def failing(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must fail with one line, and return that line."""
    capsys.readouterr()
    assert main.main(list(words)) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and lines[-1].startswith("error: ") and "Traceback" not in err, err
    assert len([line for line in lines if line.startswith("error")]) == 1
    return lines[-1]
