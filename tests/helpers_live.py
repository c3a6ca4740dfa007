"""The work of a rank with an enabled pipeline, in a module of its own, so that a starting process imports little."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))


def worker(cache: str) -> dict[str, Any]:
    """Draw on two ranks, with a LoRA by name, and with a LoRA that rank 1 alone has. Return what rank 0 compares."""
    import torch
    from pipeline_attached import lora_of
    from pipeline_kinds import KINDS

    import districompile as dc

    torch.set_num_threads(1)
    pipe, draw = KINDS["text_to_image"].make()
    plain = draw(3)
    given = lora_of(pipe.unet)
    pipe.load_lora_weights(given, adapter_name="one")
    want = draw(3)
    pipe.delete_adapters("one")
    enabled = dc.enable(pipe, 2, components=["unet"], backend="eager", cache=cache)
    enabled.phase = "exact"
    found = {"plain": _error(draw(3), plain)}
    pipe.load_lora_weights(given, adapter_name="two")
    picture = draw(3)
    found |= {"lora": _error(picture, want), "differ": _error(picture, plain)}
    found["hash"] = hashlib.sha256(picture.numpy().tobytes()).hexdigest()
    if os.environ["RANK"] == "1":
        pipe.set_adapters("two", 0.5)
    try:
        draw(3)
    except dc.RanksDifferError as e:
        found["said"] = str(e)
    enabled.close()
    return found


def _error(got: Any, want: Any) -> float:
    return float((got - want).abs().max() / want.abs().max())
