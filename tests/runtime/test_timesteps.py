"""Timesteps are read from the device once an image."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from districompile.runtime.calls import timesteps
from districompile.runtime.calls.timesteps import Timesteps

copies: list[torch.Tensor] = []


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Timesteps:
    """Takes the host for a device, and notes what is copied from it."""
    copies.clear()
    original = torch.Tensor.cpu

    def cpu(self: torch.Tensor) -> torch.Tensor:
        copies.append(self)
        return original(self).clone()

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(timesteps, "_HOST", "nowhere")
    return Timesteps()


def test_one_copy_for_all_elements(reader: Timesteps) -> None:
    steps = torch.tensor([981, 961, 941])
    assert [reader.read(t) for t in steps] == [981.0, 961.0, 941.0]
    assert reader.read(steps[1].expand(4)) == 961.0 and reader.read(steps[2:]) == 941.0
    assert len(copies) == 1


def test_what_is_written_or_new_is_read_again(reader: Timesteps) -> None:
    steps = torch.tensor([5.0, 4.0])
    assert reader.read(steps[0]) == 5.0
    steps[0] = 7.0
    assert reader.read(steps[0]) == 7.0
    assert reader.read(torch.tensor([3.0])[0]) == 3.0
    assert len(copies) == 3


@pytest.mark.parametrize("value, want", [(3, 3.0), (2.5, 2.5), (torch.tensor([1.0, 1.0]), 1.0), (torch.ones(0), None)])
def test_numbers(value: Any, want: float | None) -> None:
    assert Timesteps().read(value) == want


def test_inference_tensors_are_read_each_time(reader: Timesteps) -> None:
    with torch.inference_mode():
        steps = torch.tensor([5.0, 4.0])
        assert reader.read(steps[0]) == 5.0
        steps[0] = 6.0
        assert reader.read(steps[0]) == 6.0
    assert len(copies) == 0
