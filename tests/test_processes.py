"""Compiled programs in real processes: convert, save, start N ranks over gloo, compare with one device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import districompile as dc
from districompile.runtime.launcher import launch
from tests.helpers_processes import call, worker
from tests.small_models import captured, first, reference, relative_error

NAME, SIZE = "sdxl", (2, 20, 16)


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_equal_one_device(ranks: int, tmp_path: Path) -> None:
    _, kwargs, want = reference(NAME, *SIZE)
    program = dc.convert(captured(NAME, *SIZE), ranks=ranks, warmup_steps=2, drift_limit=0.0)
    program.save(tmp_path / "bundle", backend="onnxruntime")
    torch.save(kwargs, tmp_path / "inputs.pt")
    steps = 5
    results = launch(worker, (str(tmp_path / "bundle"), str(tmp_path / "inputs.pt"), steps), ranks)
    assert all(results[r] == results[0] for r in range(ranks))  # the whole image on every rank, bit for bit
    outputs = [torch.frombuffer(bytearray(b), dtype=torch.float32).reshape(want.shape) for b in results[0]]
    assert relative_error(outputs[0], want) <= 1e-4
    # The displaced steps are those of the simulation, which runs operator by operator
    for i, got in enumerate(outputs[1:]):
        expected = first(program.simulate(**call(kwargs, i), phase="warmup" if i < 2 else "steady"))
        assert relative_error(got, expected) <= 1e-4, f"step {i}"
