"""Tensors that engines cannot compute with, and values that are no numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def unusual(tensor: Tensor) -> str | None:
    """What sets a tensor apart from strided numbers in memory, as ``"sparse"``; None for an ordinary one."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout is not torch.strided:
        return f"sparse ({str(tensor.layout).removeprefix('torch.')})" if "sparse" in str(tensor.layout) else "packed"
    return "quantised" if tensor.is_quantized else None


def not_finite(tensor: Tensor) -> str | None:
    """``"NaN"`` or ``"infinite values"`` where a tensor holds some. None for a mask: one value and minus infinity."""
    if not (tensor.is_floating_point() and tensor.numel()) or tensor.device.type == "meta":
        return None
    if tensor.element_size() < 2:  # float8, which has no such reduction
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
