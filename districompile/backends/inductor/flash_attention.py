# SPDX-License-Identifier: Apache-2.0
"""Attention by FlashAttention-3 (Shah et al., arXiv 2407.08608), where that library is installed and faster.

PyTorch has kernels of its own for ``scaled_dot_product_attention``; on Hopper GPUs it uses cuDNN's. Autotuning decides
which are used (:mod:`districompile.backends.inductor.attention`). A bundle contains no part of the library: an engine
that calls it needs the library where it runs.
"""

from __future__ import annotations

import importlib.util
from typing import Literal, get_args

import torch
from torch import Tensor

from districompile.backends.inductor.fragment import library_fragment, register_fake
from districompile.errors import BackendError

PACKAGE = "flash_attn_3"
Implementation = Literal["auto", "torch", "flash3"]
_OTHERWISE = "give attention=torch or attention=auto"
_INSTALL = f"install FlashAttention-3 (the folder hopper of github.com/Dao-AILab/flash-attention), or {_OTHERWISE}"

LIB = library_fragment()
LIB.define("flash_attention(Tensor q, Tensor k, Tensor v, float scale, int splits) -> Tensor")


def flash3(q: Tensor, k: Tensor, v: Tensor, scale: float, splits: int) -> Tensor:
    """Compute attention of (batch, length, heads, width) by the library, with the keys in ``splits`` parts."""
    load(q.device)
    operands = [_aligned(x) for x in (q, k, v)]
    result: Tensor = torch.ops.flash_attn_3.fwd(*operands, softmax_scale=scale, num_splits=splits)[0]
    return result


def _aligned(x: Tensor) -> Tensor:
    """Return ``x`` as the tensor memory accelerator reads it: heads contiguous, all else at multiples of 16 bytes."""
    fits = x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in x.stride()[:3])
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def sdpa_fallback(q: Tensor, k: Tensor, v: Tensor, scale: float, splits: int) -> Tensor:
    """Compute the same as :func:`flash3` by PyTorch, on any device."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float, splits: int) -> Tensor:
    return q.new_empty(q.shape)


LIB.impl("flash_attention", flash3, "CUDA")
LIB.impl("flash_attention", sdpa_fallback, "CPU")
register_fake("flash_attention", _fake, LIB)
FLASH = torch.ops.districompile.flash_attention.default


def load(device: torch.device) -> None:
    """Register the operators of the library. Raises :class:`BackendError` if it is missing or does not load."""
    if device.type != "cuda" or hasattr(torch.ops.flash_attn_3, "fwd"):
        return
    try:
        importlib.import_module(f"{PACKAGE}._C")
    except (ImportError, OSError) as e:
        raise BackendError(
            f"this bundle calls FlashAttention-3, and {PACKAGE} cannot be imported ({e}): install it, or convert again "
            "with attention=torch"
        ) from e


def select_implementation(requested: Implementation, kind: str) -> Implementation:
    """Resolve the option ``attention`` for a kind of device of this machine ("cuda" or "cpu").

    Returns ``requested``, but "torch" in place of "auto" if the library is unavailable. Raises :class:`BackendError`
    for another word, and for "flash3" if the library is unavailable.
    """
    if requested not in get_args(Implementation):
        raise BackendError(f"attention={requested}: give one of {', '.join(get_args(Implementation))}")
    if requested == "torch":
        return requested
    reason = unavailable_reason(kind)
    if requested == "flash3" and reason is not None:
        raise BackendError(f"attention=flash3 {reason}")
    return requested if reason is None else "torch"


def unavailable_reason(kind: str) -> str | None:
    """Say why the library cannot be used on such a device and what to do, or None if it can."""
    if kind != "cuda" or not torch.cuda.is_available():
        return f"needs a GPU: {_OTHERWISE}"
    if torch.cuda.get_device_capability()[0] != 9:
        return f"is for Hopper GPUs, and this is an {torch.cuda.get_device_name()}: {_OTHERWISE}"
    if importlib.util.find_spec(PACKAGE) is None:
        return f"needs {PACKAGE}, which is not installed: {_INSTALL}"
    return None
