# SPDX-License-Identifier: Apache-2.0
"""Sizes of attention that networks have, and what computes them: PyTorch's choices, libraries, and the custom kernel.

``bench_kernels.py --only attention`` times them. Sizes are those of one of two ranks, unless a name says otherwise: its
queries, and the keys of all ranks.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from districompile.backends.inductor import attention, autotune, flash_attention

TEXT = 77
PYTORCH = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention-2": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclasses.dataclass(frozen=True)
class Size:
    """One size of attention: ``groups`` heads of keys and values, and a mask of all queries and keys if any.

    ``mask`` is "none", "padding" (a bool for each key, as of a text) or "bias" (a number for each query and key).
    """

    name: str
    queries: int
    keys: int
    heads: int
    width: int = 64
    mask: str = "none"
    groups: int = 0
    batch: int = 1


SIZES = (
    Size("SDXL 128, outer", 2048, 4096, 10),
    Size("SDXL 128, inner", 512, 1024, 20),
    Size("SDXL 128, inner, 4 ranks", 256, 1024, 20),
    Size("SDXL 128, inner, 8 ranks", 128, 1024, 20),
    Size("SDXL 256, outer", 8192, 16384, 10),
    Size("SDXL 256, inner", 2048, 4096, 20),
    Size("SDXL 480, outer", 28800, 57600, 10),
    Size("SDXL 480, inner", 7200, 14400, 20),
    Size("SDXL 128, text, outer", 2048, TEXT, 10),
    Size("SDXL 128, text, inner", 512, TEXT, 20),
    Size("SDXL 256, text, outer", 8192, TEXT, 10),
    Size("SDXL 256, text, inner", 2048, TEXT, 20),
    Size("SDXL 480, text, outer", 28800, TEXT, 10),
    Size("SDXL 480, text, inner", 7200, TEXT, 20),
    Size("SD 1.5 64, level 0", 2048, 4096, 8, 40, batch=2),
    Size("SD 1.5 64, level 1", 512, 1024, 8, 80, batch=2),
    Size("SD 1.5 64, level 2", 128, 256, 8, 160, batch=2),
    Size("SD 1.5 64, text", 2048, TEXT, 8, 40, batch=2),
    Size("SD 1.5 96, level 0", 4608, 9216, 8, 40, batch=2),
    Size("PixArt 1024 px", 2048, 4096, 16, 72),
    Size("PixArt 1024 px, text", 2048, 300, 16, 72, "padding"),
    Size("SD 3.5 1024 px", 2125, 4250, 38, 64),
    Size("Lumina 2 1024 px", 2176, 4352, 24, 96, groups=8),
    Size("FLUX 1024 px", 2304, 4608, 24, 128),
    Size("FLUX 2048 px", 8448, 16896, 24, 128),
    Size("Wan 1.3B 480p, 81 frames", 16380, 32760, 12, 128),
    Size("Qwen-Image 1328 px, padded text", 3700, 7400, 24, 128, "padding"),
    Size("KL decoder 1024 px", 8192, 16384, 1, 512),
    Size("positions as a bias", 2048, 4096, 16, 64, "bias"),
    Size("Stable Audio, grouped heads", 1024, 2048, 24, 64, groups=12),
)


def calls(size: Size, dtype: torch.dtype, versions: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield what computes a size, by name. PyTorch's default, "default", is the first."""
    torch.manual_seed(0)
    groups, scale = size.groups or size.heads, 1 / math.sqrt(size.width)

    def draw(length: int, heads: int) -> Tensor:
        return torch.randn(size.batch, length, heads, size.width, dtype=dtype, device="cuda")

    long = draw(size.queries, size.heads), draw(size.keys, groups), draw(size.keys, groups)
    q, k, v = (x.transpose(1, 2) for x in long)
    mask = mask_of(size, dtype)
    grouped = groups != size.heads

    def pytorch() -> Tensor:
        return rows(scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped))

    yield "default", pytorch
    for name, backend in PYTORCH.items():

        def by_backend(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return pytorch()

        yield name, by_backend
    yield "flex", partial(flex(size, mask, scale, grouped), q, k, v)
    if mask is None and size.width <= attention.MAX_WIDTH:
        for version in versions:
            yield f"FlashAttention-{version}", partial(flash_attention.by_library, *long, scale, version, 1)
    if mask is None and not grouped:
        for config in attention.configs_of(size.width, size.keys):
            from districompile.backends.inductor.kernels import operators

            yield f"custom {config}", partial(operators.attention, *long, scale, list(config))


def rows(x: Tensor) -> Tensor:
    """Return (batch, heads, length, width) as (batch, length, heads, width)."""
    return x.transpose(1, 2).contiguous()


def mask_of(size: Size, dtype: torch.dtype) -> Tensor | None:
    """Make the mask: the last tenth of the keys is padding, or positions add to the scores."""
    if size.mask == "none":
        return None
    if size.mask == "padding":
        return (torch.arange(size.keys, device="cuda") < size.keys * 9 // 10).expand(size.batch, 1, 1, -1)
    return torch.randn(size.batch, size.heads, size.queries, size.keys, dtype=dtype, device="cuda")


def flex(size: Size, mask: Tensor | None, scale: float, grouped: bool) -> Callable[..., Tensor]:
    """Return FlexAttention for a size, compiled at its first call."""
    from torch.nn.attention import flex_attention as library

    def padded(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert mask is not None
        return torch.where(mask[b, 0, 0, j], score, -math.inf)

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert mask is not None
        return score + mask[b, h, i, j]

    change = {"none": None, "padding": padded, "bias": biased}[size.mask]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = library.flex_attention(q, k, v, score_mod=change, scale=scale, enable_gqa=grouped)
        assert isinstance(result, Tensor)
        return rows(result)

    torch._dynamo.reset()  # the number of variants of one function is limited
    compiled: Callable[..., Tensor] = torch.compile(attend, dynamic=False)
    return compiled


def attend(dtype: torch.dtype, row: Callable[..., None]) -> None:
    """Time all sizes, each by everything that computes it, in turns."""
    versions = flash_attention.select_libraries("auto", "cuda")
    for size in SIZES:
        reasons: list[str] = []
        row("attention", dataclasses.asdict(size), partial(select, size, dtype, versions, reasons), notes=reasons)


def select(size: Size, dtype: torch.dtype, versions: tuple[int, ...], reasons: list[str]) -> str | None:
    """Return the fastest, or None for PyTorch's default. Why others were left out is added to ``reasons``."""
    (_, baseline), *others = calls(size, dtype, versions)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        best = autotune.best_config("attention by", baseline, dict(others))
    reasons += [str(w.message) for w in caught]
    return best
