"""Attention by FlashAttention-3 (Shah et al., arXiv 2407.08608), where that library is installed and faster.

PyTorch chooses among kernels of its own for ``scaled_dot_product_attention``, on Hopper GPUs cuDNN's. Which are faster
depends on how the rows of queries fill the GPU, so both are measured, once for each size. Nothing of the library is in
a bundle: an engine that calls it needs it where it runs.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from typing import Any

import torch
from torch import Tensor, fx

import districompile.ir.ops  # noqa: F401  (defines the library that this adds to)
from districompile.backends.timing import milliseconds
from districompile.errors import BackendError

PACKAGE = "flash_attn_3"
KERNELS = ("auto", "torch", "flash3")
_INSTALL = "install FlashAttention-3 (the folder hopper of github.com/Dao-AILab/flash-attention), or give torch"
_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_TRANSPOSE = torch.ops.aten.transpose.int
_WIDEST = 256  # of a head, in elements
_SPLITS = (1, 2, 3)  # parts of the keys that are worked on at once, where queries alone leave the GPU idle
_GAIN = 0.98  # of PyTorch's time: less is no difference

_LIB: Any = torch.library.Library("districompile", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIB.define("flash_attention(Tensor q, Tensor k, Tensor v, float scale, int splits) -> Tensor")


def _on_gpu(q: Tensor, k: Tensor, v: Tensor, scale: float, splits: int) -> Tensor:
    load(q.device)
    operands = [_for_copies(x) for x in (q, k, v)]
    result: Tensor = torch.ops.flash_attn_3.fwd(*operands, softmax_scale=scale, num_splits=splits)[0]
    return result


def _for_copies(x: Tensor) -> Tensor:
    """``x`` as the GPU's tensor copies read it: elements of a head together, all else at multiples of 16 bytes."""
    fits = x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in x.stride()[:3])
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _elsewhere(q: Tensor, k: Tensor, v: Tensor, scale: float, splits: int) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float, splits: int) -> Tensor:
    return q.new_empty(q.shape)


_LIB.impl("flash_attention", _on_gpu, "CUDA")
_LIB.impl("flash_attention", _elsewhere, "CPU")
torch.library.register_fake("districompile::flash_attention", _fake, lib=_LIB)
_FLASH = torch.ops.districompile.flash_attention.default


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


def use_flash(graph: fx.Graph, always: bool = False) -> bool:
    """Replace attention in ``graph`` by the library's, where that is faster here or ``always``; whether any was.

    What it can do is plain attention (no mask, not causal) of 16-bit heads of up to 256 elements, a multiple of 8. Its
    operands are (batch, length, heads, elements), with elements next to each other.
    """
    found = False
    for node in list(graph.nodes):
        scale = _scale(node) if node.target is _SDPA else None
        if scale is None:
            continue
        q, k = (x.meta["val"] for x in node.args[:2])
        splits = 1 if always else fastest(*q.shape, k.shape[2], q.dtype)
        if splits == 0:
            continue
        with graph.inserting_before(node):
            swapped = [graph.call_function(_TRANSPOSE, (x, 1, 2)) for x in node.args[:3]]
            call = graph.call_function(_FLASH, (*swapped, scale, splits))
            result = graph.call_function(_TRANSPOSE, (call, 1, 2))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        found = True
    return found


@functools.cache
def fastest(batch: int, heads: int, queries: int, width: int, keys: int, dtype: torch.dtype) -> int:
    """In how many parts the library takes the keys where it is fastest; 0 if PyTorch's kernels are, on this GPU, or if
    the library, as it was built, cannot do this."""
    q, k, v = (torch.randn(batch, n, heads, width, dtype=dtype, device="cuda") for n in (queries, keys, keys))
    scale = 1 / math.sqrt(width)
    usual = milliseconds(functools.partial(_elsewhere, q, k, v, scale, 1))
    try:
        times = {n: milliseconds(functools.partial(_on_gpu, q, k, v, scale, n)) for n in _SPLITS}
    except (BackendError, RuntimeError) as e:  # it has no errors of its own
        reason = str(e).splitlines()[0]
        warnings.warn(f"FlashAttention-3 is not used for heads of {width} {dtype}: {reason}", stacklevel=2)
        return 0
    best = min(_SPLITS, key=times.__getitem__)
    return best if times[best] < _GAIN * usual else 0


def _scale(node: fx.Node) -> float | None:
    """What scores are multiplied with, of attention that the library can do."""
    names = ("q", "k", "v", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if (
        given.get("attn_mask") is not None
        or given.get("dropout_p")
        or given.get("is_causal")
        or given.get("enable_gqa")
    ):
        return None
    values: list[Any] = [x.meta.get("val") for x in node.args[:3] if isinstance(x, fx.Node)]
    if len(values) != 3 or not all(isinstance(x, Tensor) and x.ndim == 4 for x in values):
        return None
    q, k, v = values
    width = q.shape[-1]
    same = k.shape == v.shape and k.shape[:2] == q.shape[:2] and k.shape[-1] == width
    fits = width <= _WIDEST and width % 8 == 0
    if not same or not fits or q.dtype not in (torch.float16, torch.bfloat16):
        return None
    scale = given.get("scale")
    return 1 / math.sqrt(width) if scale is None else float(scale)
