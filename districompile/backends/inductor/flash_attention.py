# SPDX-License-Identifier: Apache-2.0
"""Attention by FlashAttention-3 or -4, where such a library is installed and faster.

FlashAttention-3 (Shah et al., arXiv 2407.08608) is built from its source. FlashAttention-4 is a package on the package
index, written in NVIDIA's CuTe DSL: it compiles its kernels at their first call. PyTorch has kernels of its own for
``scaled_dot_product_attention``; on Hopper GPUs it uses cuDNN's. Autotuning decides which are used
(:mod:`districompile.backends.inductor.attention`). A bundle contains no part of a library: an engine that calls one
needs it where it runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from districompile.backends.inductor.cache import default_folder, private_folder
from districompile.backends.inductor.fragment import library_fragment, register_fake
from districompile.errors import BackendError

Implementation = Literal["auto", "torch", "flash3", "flash4"]
_OTHERWISE = "give attention=torch or attention=auto"


@dataclasses.dataclass(frozen=True)
class Library:
    """A library of attention: the module to import, and how to install it.

    It is for GPUs whose compute capability has a major number in ``gpus``. ``splits`` are the numbers of parts of the
    keys that it computes at once on these, where the queries alone do not fill the GPU; of others it computes one.
    """

    module: str
    package: str
    install: str
    gpus: range
    splits: range

    def offered_splits(self) -> tuple[int, ...]:
        """Return the numbers of parts to try on the present GPU."""
        return (1, 2, 3) if torch.cuda.get_device_capability()[0] in self.splits else (1,)


LIBRARIES = {
    3: Library("flash_attn_3._C", "flash_attn_3", "the folder hopper of github.com/Dao-AILab/flash-attention",
               range(9, 10), range(9, 10)),
    4: Library("flash_attn.cute", "flash-attn-4", 'pip install "districompile[attention]"', range(8, 13),
               range(10, 12)),
}  # fmt: skip
"""The libraries by the version of FlashAttention."""

LIB = library_fragment()
LIB.define("flash_attention(Tensor q, Tensor k, Tensor v, float scale, int version, int splits) -> Tensor")


def by_library(q: Tensor, k: Tensor, v: Tensor, scale: float, version: int, splits: int) -> Tensor:
    """Compute attention of (batch, length, heads, width) by a library, with the keys in ``splits`` parts."""
    load(version, q.device)
    operands = [_aligned(x) for x in (q, k, v)]
    if version == 3:
        result = torch.ops.flash_attn_3.fwd(*operands, softmax_scale=scale, num_splits=splits)
    else:
        attend = importlib.import_module(LIBRARIES[version].module).flash_attn_func
        result = attend(*operands, softmax_scale=scale, num_splits=splits)
    found: Tensor = result[0] if isinstance(result, tuple | list) else result
    return found


def _aligned(x: Tensor) -> Tensor:
    """Return ``x`` as the tensor memory accelerator reads it: heads contiguous, all else at multiples of 16 bytes."""
    fits = x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in x.stride()[:3])
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def sdpa_fallback(q: Tensor, k: Tensor, v: Tensor, scale: float, version: int = 0, splits: int = 1) -> Tensor:
    """Compute the same as :func:`by_library` by PyTorch, on any device."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float, version: int, splits: int) -> Tensor:
    return q.new_empty(q.shape)


LIB.impl("flash_attention", by_library, "CUDA")
LIB.impl("flash_attention", sdpa_fallback, "CPU")
register_fake("flash_attention", _fake, LIB)
FLASH = torch.ops.districompile.flash_attention.default


def load(version: int, device: torch.device) -> None:
    """Import a library. Raises :class:`BackendError` if it is missing or does not load."""
    if device.type != "cuda" or (version == 3 and hasattr(torch.ops.flash_attn_3, "fwd")):
        return
    library = LIBRARIES[version]
    try:
        with _kernels_are_kept():
            importlib.import_module(library.module)
    except Exception as e:  # of an ImportError to whatever a compiler that is not there raises
        raise BackendError(
            f"this bundle calls FlashAttention-{version}, and {library.package} cannot be imported ({e}): install it "
            f"({library.install}), or convert again with attention=torch"
        ) from e


_SWITCH = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
_FOLDER = "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"


@contextlib.contextmanager
def _kernels_are_kept() -> Iterator[None]:
    """Let FlashAttention-4, which is imported inside, keep the kernels that it compiles in the user's cache.

    It compiles each at its first call, which takes seconds, and keeps them only if asked by these variables of the
    environment, which it reads as it is imported. What the user has set stays.
    """
    base = default_folder()
    folder = None if base is None or _SWITCH in os.environ else private_folder(base.with_name("flash-attention-4"))
    if folder is None:
        yield
        return
    added = {_SWITCH: "1", **({} if _FOLDER in os.environ else {_FOLDER: str(folder)})}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def load_packages(names: list[str], device: torch.device) -> None:
    """Import the libraries of these packages. Raises :class:`BackendError` for one that is missing or unknown."""
    versions = {library.package: version for version, library in LIBRARIES.items()}
    for name in names:
        if name not in versions:
            raise BackendError(f"the bundle calls {name}, which this version does not know: convert again")
        load(versions[name], device)


def select_libraries(requested: Implementation, kind: str) -> tuple[int, ...]:
    """Resolve the option ``attention`` for a kind of device of this machine ("cuda" or "cpu").

    Returns the versions of the libraries that may be used. Raises :class:`BackendError` for another word, and for a
    library that was asked for and is unavailable.
    """
    if requested not in get_args(Implementation):
        raise BackendError(f"attention={requested}: give one of {', '.join(get_args(Implementation))}")
    if requested == "auto":
        return tuple(v for v in LIBRARIES if unavailable_reason(v, kind) is None)
    if requested == "torch":
        return ()
    version = int(requested.removeprefix("flash"))
    if (reason := unavailable_reason(version, kind)) is not None:
        raise BackendError(f"attention={requested} {reason}")
    return (version,)


def unavailable_reason(version: int, kind: str) -> str | None:
    """Say why a library cannot be used on such a device and what to do, or None if it can."""
    if kind != "cuda" or not torch.cuda.is_available():
        return f"needs a GPU: {_OTHERWISE}"
    library = LIBRARIES[version]
    if torch.cuda.get_device_capability()[0] not in library.gpus:
        which = "Hopper GPUs" if len(library.gpus) == 1 else f"compute capability {library.gpus[0]}.0 and above"
        return f"is for {which}, and this is an {torch.cuda.get_device_name()}: {_OTHERWISE}"
    if not _installed(library.module):
        return (
            f"needs {library.package}, which is not installed: install FlashAttention-{version} ({library.install}), "
            f"or {_OTHERWISE}"
        )
    return None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError, OSError):  # of the package around it
        return False
