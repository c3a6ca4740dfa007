"""Compiled programs in real processes: convert, save, start N ranks over gloo, compare with one device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import districompile as dc
from districompile.ir.spec import Phase
from districompile.runtime.processes.launcher import launch
from tests.helpers_net import make_program
from tests.helpers_processes import call, worker
from tests.small_models import captured, first, reference, relative_error

NAME, SIZE = "sdxl", (2, 20, 16)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [2, 3])
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
        expected = first(program.simulate(**call(kwargs, i), phase="exact" if i < 2 else "displaced"))
        assert relative_error(got, expected) <= 1e-4, f"step {i}"


@pytest.mark.always
@pytest.mark.multiprocess
def test_reused_steps_and_differences_in_processes(tmp_path: Path) -> None:
    """Transfers of deep levels stay pending over reused steps, and both sides count differences alike."""
    program = make_program(2, reuse="deep=2", transfer_bits=8)
    program.save(tmp_path / "bundle", backend="eager")
    kwargs = {"sample": torch.randn(2, 4, 40, 32), "timestep": torch.tensor(10.0)}
    torch.save(kwargs, tmp_path / "inputs.pt")
    phases: list[Phase] = ["exact"] * 3 + ["reused", "displaced"] * 2  # type: ignore[list-item]
    results = launch(worker, (str(tmp_path / "bundle"), str(tmp_path / "inputs.pt"), len(phases)), 2)
    assert results[0] == results[1]
    for number, phase in enumerate(phases):
        want = first(program.simulate(**call(kwargs, number), phase=phase))
        got = torch.frombuffer(bytearray(results[0][number + 1]), dtype=torch.float32).reshape(want.shape)
        assert relative_error(got, want) <= 1e-5, f"step {number}"
