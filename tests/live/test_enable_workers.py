"""``enable`` in a plain script: this process is no rank, and workers compute UNet and VAE of a pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pipeline_attached import lora_of
from pipeline_kinds import KINDS

import districompile as dc
from districompile.errors import InputError


@pytest.mark.slow
@pytest.mark.multiprocess
def test_workers_draw_what_one_device_draws(tmp_path: Path) -> None:
    pipe, draw = KINDS["text_to_image"].make()
    plain = draw(3)
    given = lora_of(pipe.unet)
    pipe.load_lora_weights(given, adapter_name="one")
    want = draw(3)
    pipe.delete_adapters("one")

    def error(got: torch.Tensor, other: torch.Tensor) -> float:
        return float((got - other).abs().max() / other.abs().max())

    with dc.enable(pipe, workers=2, backend="eager", cache=tmp_path) as enabled:
        enabled.phase = "exact"
        assert error(draw(3), plain) <= 1e-4
        modules = [m for live in enabled.components.values() for m in live.modules]
        assert len(modules) >= 2 and all(m.plan.world_size == 2 and m.transport == "gloo" for m in modules)
        pipe.load_lora_weights(given, adapter_name="two")
        drawn = draw(3)
        assert error(drawn, want) <= 1e-4 < error(drawn, plain)
        workers = enabled._workers
        assert workers is not None and workers.alive
    assert not workers.alive and "forward" not in pipe.unet.__dict__


def test_workers_are_the_ranks() -> None:
    with pytest.raises(InputError, match="leave lockstep and gpus out"):
        dc.enable(torch.nn.Linear(1, 1), 3, workers=2)
