# SPDX-License-Identifier: Apache-2.0
"""Find tensors that engines cannot read, and values that are not finite."""

from __future__ import annotations

import torch
from torch import Tensor


def unusual(tensor: Tensor) -> str | None:
    """Return the kind of a tensor that is not dense and strided, such as ``"sparse"``; None for an ordinary tensor."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout is not torch.strided:
        return f"sparse ({str(tensor.layout).removeprefix('torch.')})" if "sparse" in str(tensor.layout) else "packed"
    return "quantised" if tensor.is_quantized else None


def not_finite(tensor: Tensor) -> str | None:
    """Return ``"NaN"`` or ``"infinite values"`` if a tensor contains some, else None.

    For a mask (one finite value and minus infinity) the result is None.
    """
    if not (tensor.is_floating_point() and tensor.numel()) or tensor.device.type == "meta":
        return None
    if tensor.element_size() < 2:  # float8, which does not support this reduction
        tensor = tensor.float()
    low, high = (float(x) for x in torch.aminmax(tensor.detach()))
    if low != low or high != high:
        return "NaN"
    if high == float("inf"):
        return "infinite values"
    if low == float("-inf"):
        finite = tensor[tensor != low]
        return "infinite values" if finite.numel() and bool((finite != finite[0]).any()) else None
    return None
