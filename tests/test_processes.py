"""Compiled programs in real processes: convert, save, start N ranks over gloo, compare with one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import districompile as dc
from districompile.runtime.launcher import launch
from tests.small_models import first, reference, relative_error

NAME, SIZE = "sdxl", (2, 20, 16)


def worker(bundle: str, steps: int) -> list[bytes]:
    """One rank: an exact call, then calls of one image whose timesteps fall."""
    _, kwargs, _ = reference(NAME, *SIZE)
    unet = dc.load(bundle)
    outputs: list[Tensor] = []
    with unet.exact():
        outputs.append(first(unet(**kwargs)))
    unet.reset()
    for i in range(steps):
        outputs.append(first(unet(**call(kwargs, i))))
    unet.close()
    return [t.numpy().tobytes() for t in outputs]


def call(kwargs: dict[str, Any], i: int) -> dict[str, Any]:
    """The i-th call of an image: a sample that changes a little, a timestep that falls."""
    return {**kwargs, "sample": kwargs["sample"] * (1 - 0.02 * i), "timestep": torch.tensor(900.0 - 20 * i)}


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_equal_one_device(ranks: int, tmp_path: Path) -> None:
    _, kwargs, want = reference(NAME, *SIZE)
    module, _, _ = reference(NAME, *SIZE)
    program = dc.convert(module, kwargs=kwargs, ranks=ranks, warmup_steps=2)
    program.save(tmp_path / "bundle", backend="onnxruntime")
    steps = 5
    results = launch(worker, (str(tmp_path / "bundle"), steps), ranks)
    assert all(results[r] == results[0] for r in range(ranks))  # the whole image on every rank, bit for bit
    outputs = [torch.frombuffer(bytearray(b), dtype=torch.float32).reshape(want.shape) for b in results[0]]
    assert relative_error(outputs[0], want) <= 1e-4
    # The displaced steps are those of the simulation, which runs operator by operator
    for i, got in enumerate(outputs[1:]):
        expected = first(program.simulate(**call(kwargs, i), phase="warmup" if i < 2 else "steady"))
        assert relative_error(got, expected) <= 1e-4, f"step {i}"
