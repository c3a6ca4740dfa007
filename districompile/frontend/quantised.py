# SPDX-License-Identifier: Apache-2.0
"""Decompose the operators of quantised models that ``torch.export`` and PT2E make (``quantized_decomposed``).

They become plain operators, which have rules: roundings are local, and the extremes of a whole tensor are reduced over
the ranks. PyTorch has functions for most of them. Those that read the values of a tensor in Python are written here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "quantized_decomposed"


def decomposition_of_quantised(op: torch._ops.OpOverload) -> Callable[..., Any] | None:
    """Return a function over plain operators for an operator of :data:`NAMESPACE`, or None."""
    from torch.ao.quantization.fx import _decomposed as functions

    name = op._schema.name.partition("::")[2]
    if op._overloadname not in ("", "default"):
        name = f"{name}_{op._overloadname}"
    found = _HERE.get(name) or getattr(functions, name, None)
    return found if callable(found) else None


def _quantise(x: Tensor, scale: Tensor, zero_point: Tensor, low: Any, high: Any, dtype: torch.dtype) -> Tensor:
    inverse = (1.0 / scale.to(torch.float64)).to(torch.float32)  # as PyTorch divides Python's numbers
    rounded = torch.round(x.to(torch.float32) * inverse) + zero_point.to(torch.float32)
    return torch.clamp(rounded, _number(low), _number(high)).to(dtype)


def _dequantise(
    x: Tensor, scale: Tensor, zero_point: Tensor, low: Any, high: Any, dtype: torch.dtype, *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    wide = out_dtype or torch.float32
    return (x.to(wide) - zero_point.to(wide)) * scale.to(wide)


def _number(limit: Any) -> Any:
    return limit.to(torch.float32) if isinstance(limit, Tensor) else limit


def _choose(x: Tensor, low: int, high: int, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Choose scale and zero point from the extremes of ``x``, as ``torch.ao.quantization`` does."""
    least, largest = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = ((largest - least) / float(high - low)).clamp(min=eps)
    zero_point = (low - torch.round(least / scale)).clamp(low, high)
    return scale.reshape(1).to(torch.float64), zero_point.reshape(1).to(torch.int64)


def _choose_symmetric(x: Tensor, low: int, high: int, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    largest = torch.maximum(-x.amin().clamp(max=0), x.amax().clamp(min=0))
    scale = (largest / (float(high - low) / 2)).clamp(min=eps)
    middle = 128 if dtype == torch.uint8 else 0
    return scale.reshape(1).to(torch.float64), torch.full_like(scale.reshape(1), middle, dtype=torch.int64)


_HERE: dict[str, Callable[..., Any]] = {
    "quantize_per_tensor_tensor": _quantise,
    "quantize_per_tensor_tensor2": _quantise,
    "dequantize_per_tensor_tensor": _dequantise,
    "dequantize_per_tensor_tensor2": _dequantise,
    "choose_qparams_tensor": _choose,
    "choose_qparams_symmetric_tensor": _choose_symmetric,
}
