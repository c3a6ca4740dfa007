"""Dumps of small graphs, stage by stage. ``python -m tests.test_golden`` writes them anew; read the difference before
it is committed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import districompile as dc
from districompile.plan.steps_text import phase_text

GOLDEN = Path(__file__).parent / "golden"


class Block(nn.Module):
    """A residual block with attention: every purpose of a transfer once."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.qkv = nn.Linear(4, 12)

    def forward(self, sample: Tensor) -> Tensor:
        h = self.conv(torch.nn.functional.silu(self.norm(sample)))
        q, k, v = self.qkv(h.flatten(2).transpose(1, 2)).chunk(3, -1)
        a = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return sample + a.transpose(1, 2).reshape(h.shape)


def texts() -> dict[str, str]:
    program = dc.convert(Block().eval(), (torch.zeros(1, 4, 12, 5),), ranks=3)
    return {
        "block-exact": program.graph_text("exact"),
        "block-displaced": program.graph_text("displaced"),
        "block-exact-steps": phase_text(program.plan, "exact"),
        "block-displaced-steps": phase_text(program.plan, "displaced"),
    }


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    return texts()


@pytest.mark.parametrize("name", ["block-exact", "block-displaced", "block-exact-steps", "block-displaced-steps"])
def test_golden(name: str, found: dict[str, str]) -> None:
    assert found[name] + "\n" == (GOLDEN / f"{name}.txt").read_text()


if __name__ == "__main__":
    for file, text in texts().items():
        (GOLDEN / f"{file}.txt").write_text(text + "\n")
