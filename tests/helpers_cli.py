"""Small networks for the command line, and commands that fail."""

from __future__ import annotations

import pytest

from districompile.cli import main

NETS = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Conv2d(4, 8, 3, padding=1)
        self.norm = torch.nn.GroupNorm(2, 8)
        self.outer = torch.nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, sample, timestep):
        return self.outer(torch.nn.functional.silu(self.norm(self.inner(sample)) + timestep * 1e-3))

def tiny():
    return Net(), (torch.randn(2, 4, 24, 16), torch.tensor(5.0)), {}, {"sample": 2}

def wrong_rows():
    return Net(), (torch.randn(2, 4, 24, 16), torch.tensor(5.0)), {}, {"picture": 2}

class Branching(Net):
    def forward(self, sample, timestep):
        return super().forward(sample, timestep) if sample.sum() > 0 else sample

def branching():
    return Branching(), (torch.randn(2, 4, 24, 16), torch.tensor(5.0)), {}, {"sample": 2}
"""


def failing(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must fail; returns its one line, without ``error:``."""
    capsys.readouterr()
    assert main.main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0].removeprefix("error: ")
