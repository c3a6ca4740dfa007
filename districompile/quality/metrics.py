# SPDX-License-Identifier: Apache-2.0
"""Compare pictures, (B, 3, H, W) in 0 to 1. Every function gives one number a picture."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IDENTICAL = 100.0  # dB: the value of equal pictures, so that means stay finite


def psnr(actual: Tensor, expected: Tensor, peak: float = 1.0) -> list[float]:
    """Compute the peak signal-to-noise ratio in dB, at most ``IDENTICAL``. It is NaN where a picture holds NaN."""
    error = (actual.double() - expected.double()).square().flatten(1).mean(1)
    found = [math.inf if e == 0 else 10 * math.log10(peak * peak / e) for e in error.tolist()]
    return [v if math.isnan(v) else min(IDENTICAL, v) for v in found]


def ssim(actual: Tensor, expected: Tensor) -> list[float] | None:
    """Compute the structural similarity (Wang et al. 2004), 1 for equal pictures. None without torchmetrics."""
    try:
        image = importlib.import_module("torchmetrics.functional.image")
    except ImportError:
        return None
    found: Any = image.structural_similarity_index_measure
    return [float(v) for v in found(actual.float(), expected.float(), data_range=1.0, reduction="none").reshape(-1)]


def lpips(actual: Tensor, expected: Tensor) -> list[float] | None:
    """Compute the learned perceptual distance (Zhang et al. 2018), 0 for equal pictures.

    None where the network or its weights are not on this machine: nothing is downloaded.
    """
    if not any(Path(torch.hub.get_dir(), "checkpoints").glob("alexnet-owt-*.pth")):
        return None
    try:
        importlib.import_module("torchvision")
        image = importlib.import_module("torchmetrics.functional.image")
        found: Any = image.learned_perceptual_image_patch_similarity
        pairs = zip(actual.clamp(0, 1), expected.clamp(0, 1), strict=True)
        return [float(found(a[None], b[None], net_type="alex", normalize=True)) for a, b in pairs]
    except (ImportError, RuntimeError, OSError):
        return None


def seams(actual: Tensor, expected: Tensor, borders: Sequence[int]) -> list[float]:
    """Compute the seam score: 1 where no seam shows at the ``borders`` of patches (rows of pixels).

    The vertical gradient across the borders is divided by that of all other rows. The score is this quotient of
    ``actual``, divided by that of ``expected``.
    """
    height = actual.shape[-2]
    across = sorted({b for b in borders if 0 < b < height})
    if not across:
        return [1.0] * actual.shape[0]
    others = [b for b in range(1, height) if b not in across]

    def share(x: Tensor) -> Tensor:
        steps = (x.double()[..., 1:, :] - x.double()[..., :-1, :]).abs().mean((1, 3))  # (B, H - 1)
        at = steps[:, [b - 1 for b in across]].mean(1)
        return at / steps[:, [b - 1 for b in others]].mean(1).clamp(min=1e-9)

    return [float(v) for v in share(actual) / share(expected).clamp(min=1e-9)]


def drift(actual: Tensor, expected: Tensor) -> list[list[float]]:
    """Compute the relative error (root mean square) of latents (steps, B, ...): for each picture a list by step."""
    error = (actual.double() - expected.double()).flatten(2).norm(dim=2)
    found: list[list[float]] = (error / expected.double().flatten(2).norm(dim=2).clamp(min=1e-20)).T.tolist()
    return found
