# SPDX-License-Identifier: Apache-2.0
"""The GPUs of this machine for which the same programs are compiled."""

from __future__ import annotations

import os

import torch


def equal_gpus() -> list[int]:
    """Return the GPUs of the kind of the present one, the present one first. Raises without a GPU."""
    present = torch.cuda.current_device()
    name = torch.cuda.get_device_name(present)
    others = [i for i in range(torch.cuda.device_count()) if i != present and torch.cuda.get_device_name(i) == name]
    return [present, *others]


def seen_alone(gpu: int) -> dict[str, str]:
    """Return the environment in which a process sees one GPU alone, by its number in this process."""
    visible = [v.strip() for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v.strip()]
    return {"CUDA_VISIBLE_DEVICES": visible[gpu] if gpu < len(visible) else str(gpu)}
