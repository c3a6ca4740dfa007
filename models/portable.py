# SPDX-License-Identifier: Apache-2.0
"""Functions of libraries in the operators that every backend has, while a model is captured.

FreeU (arXiv 2309.11497) scales the lowest frequencies of a map by a Fourier transform, and most compilers have no
complex numbers. The map plus a multiple of its low frequencies is the same: a few products with constant matrices.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_HOME = "diffusers.utils.torch_utils"


def fourier_filter(x_in: Tensor, threshold: int, scale: int) -> Tensor:
    """Scale the frequencies from ``-threshold`` to ``threshold - 1`` of both dims of ``x_in`` (B, C, H, W).

    Computes in float32, and returns the dtype of ``x_in``. The frequencies of this range are no pairs, so the result
    has an imaginary part, which diffusers drops: with the matrices C of cosines and D of sines of k * (i - j), summed
    over the frequencies k, the real part of the low frequencies is C x C' - D x D'.
    """
    x = x_in.to(torch.float32)
    height, width = int(x.shape[-2]), int(x.shape[-1])
    (rows_cos, rows_sin), (columns_cos, columns_sin) = (_waves(n, threshold, x.device) for n in (height, width))
    low = rows_cos @ x @ columns_cos.T - rows_sin @ x @ columns_sin.T
    return (x + (scale - 1.0) * low).to(x_in.dtype)


def _waves(size: int, threshold: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the sums over the frequencies of cos and sin of the angle between two positions, divided by ``size``."""
    centre = size // 2
    kept = range(size)[centre - threshold : centre + threshold]  # as diffusers slices, also where it starts below 0
    angles = [[[2 * math.pi * (k - centre) * (i - j) / size for k in kept] for j in range(size)] for i in range(size)]
    cos = [[sum(map(math.cos, a)) / size for a in row] for row in angles]
    sin = [[sum(map(math.sin, a)) / size for a in row] for row in angles]
    return torch.tensor(cos, device=device), torch.tensor(sin, device=device)


@contextlib.contextmanager
def portable_functions() -> Iterator[None]:
    """Put these functions in the place of the library's, inside, if the library is loaded."""
    home: Any = sys.modules.get(_HOME)
    if home is None or not hasattr(home, "fourier_filter"):
        yield
        return
    held = home.fourier_filter
    home.fourier_filter = fourier_filter
    try:
        yield
    finally:
        home.fourier_filter = held
