"""Attention by FlashAttention-3 (Shah et al., arXiv 2407.08608), where that library is installed and faster.

PyTorch chooses among kernels of its own for ``scaled_dot_product_attention``, on Hopper GPUs cuDNN's; which are faster
is measured (:mod:`districompile.backends.attention`). Nothing of the library is in a bundle: an engine that calls it
needs it where it runs.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

import districompile.ir.ops  # noqa: F401  (defines the library that this adds to)
from districompile.errors import BackendError

PACKAGE = "flash_attn_3"
KERNELS = ("auto", "torch", "flash3")
_INSTALL = "install FlashAttention-3 (the folder hopper of github.com/Dao-AILab/flash-attention), or give torch"

LIB: Any = torch.library.Library("districompile", "FRAGMENT")  # type: ignore[no-untyped-call]
LIB.define("flash_attention(Tensor q, Tensor k, Tensor v, float scale, int splits) -> Tensor")


def on_gpu(q: Tensor, k: Tensor, v: Tensor, scale: float, splits: int) -> Tensor:
    load(q.device)
    operands = [_for_copies(x) for x in (q, k, v)]
    result: Tensor = torch.ops.flash_attn_3.fwd(*operands, softmax_scale=scale, num_splits=splits)[0]
    return result


def _for_copies(x: Tensor) -> Tensor:
    """``x`` as the GPU's tensor copies read it: elements of a head together, all else at multiples of 16 bytes."""
    fits = x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in x.stride()[:3])
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def elsewhere(q: Tensor, k: Tensor, v: Tensor, scale: float, splits: int) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float, splits: int) -> Tensor:
    return q.new_empty(q.shape)


LIB.impl("flash_attention", on_gpu, "CUDA")
LIB.impl("flash_attention", elsewhere, "CPU")
torch.library.register_fake("districompile::flash_attention", _fake, lib=LIB)
FLASH = torch.ops.districompile.flash_attention.default


def load(device: torch.device) -> None:
    """Make the library's operators known; raises :class:`BackendError` where it is not installed, or does not load."""
    if device.type != "cuda" or hasattr(torch.ops.flash_attn_3, "fwd"):
        return
    try:
        importlib.import_module(f"{PACKAGE}._C")
    except (ImportError, OSError) as e:
        raise BackendError(
            f"FlashAttention-3 is called here, and {PACKAGE} cannot be imported ({e}): install it, or convert again "
            "with --attention torch"
        ) from e


def choose(asked: str, kind: str) -> str:
    """What was asked of :data:`KERNELS`, or "torch" for "auto" where the library cannot be used, on a kind of device of
    this machine ("cuda", "cpu").

    Raises :class:`BackendError` for another word, and where the library cannot be used though it was asked for.
    """
    if asked not in KERNELS:
        raise BackendError(f"there is no attention {asked!r}: {', '.join(KERNELS)}")
    if asked == "torch":
        return asked
    reason = unusable(kind)
    if asked == "flash3" and reason is not None:
        raise BackendError(f"attention flash3 {reason}")
    return asked if reason is None else "torch"


def unusable(kind: str) -> str | None:
    """Why the library cannot be used on such a device, and the way out; None if it can."""
    if kind != "cuda" or not torch.cuda.is_available():
        return "needs a GPU: give torch"
    if torch.cuda.get_device_capability()[0] != 9:
        return f"is for Hopper GPUs, and this is an {torch.cuda.get_device_name()}: give torch"
    if importlib.util.find_spec(PACKAGE) is None:
        return f"needs {PACKAGE}, which is not installed: {_INSTALL}"
    return None
