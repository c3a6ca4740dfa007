"""Kernels of our own beside what they stand for: microseconds on the first GPU, one JSON line a size.

    python tools/bench_kernels.py [--only attention,queries,gated,apart,convolutions] [--dtype float16]

  attention  by PyTorch's choice, by FlashAttention-3 with the keys in 1, 2 and 3 parts where it is installed, and by
             ours in blocks: two ranks' share of SDXL's layers at the latents 480, 256 and 128, four and eight ranks' of
             those of 20 heads at 128, Stable Diffusion 1.5's at 64 (8 heads, here of 64 elements), and attention to a
             text at 128, 256 and 480
  queries    a product and attention to a text, and both in one
  gated      a product and what multiplies one half with the GELU of the other, and both in one
  apart      a product and a copy of two thirds of it, two products, and one that writes to two places
  convolutions  3 x 3, by cuDNN, as a product (with the time to write what it reads), and in tiles of ours

The last three are of the rows of two ranks at the latents 128, 256 and 480. What one size has is timed in turns.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where it is not installed

from districompile.backends import attention, flash_attention, inductor_direct, inductor_unfold, timing
from districompile.backends.gpu import gated, hopper
from districompile.backends.gpu.launch import unusable

TEXT = 77
ATTENTION = (
    (28800, 57600, 10), (7200, 14400, 20), (8192, 16384, 10), (2048, 4096, 20), (2048, 4096, 10), (512, 1024, 20),
    (256, 1024, 20), (128, 1024, 20), (2048, 4096, 8), (512, TEXT, 20), (2048, TEXT, 10), (2048, TEXT, 20),
    (8192, TEXT, 10), (7200, TEXT, 20), (28800, TEXT, 10),
)  # fmt: skip
ROWS = ((512, 1280), (2048, 640), (2048, 1280), (8192, 640), (7200, 1280), (28800, 640))


# Channels, and the pixels of two ranks
CONVOLUTIONS = (
    (320, 320, 64, 128), (960, 320, 64, 128), (640, 640, 32, 64), (1280, 1280, 16, 32), (320, 320, 128, 256),
    (640, 640, 64, 128), (1280, 1280, 32, 64), (320, 320, 240, 480), (640, 640, 120, 240), (1280, 1280, 60, 120),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="attention,queries,gated,apart,convolutions")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    args = parser.parse_args()
    if (reason := unusable()) is not None:
        raise SystemExit(f"kernels of our own cannot be used here: {reason}")
    dtype = getattr(torch, args.dtype)
    parts: dict[str, Callable[[torch.dtype], None]] = {
        "attention": attend, "queries": ask, "gated": gate, "apart": apart,
        "convolutions": convolve,
    }  # fmt: skip
    for name in args.only.split(","):
        if name not in parts:
            raise SystemExit(f"no part named {name!r}; there are: {', '.join(parts)}")
        if name in ("gated", "convolutions") and (reason := hopper.unusable()) is not None:
            raise SystemExit(f"{name} cannot be measured here: {reason}")
        parts[name](dtype)


def attend(dtype: torch.dtype) -> None:
    for queries, keys, heads in ATTENTION:
        choose = partial(attention.choose, 1, heads, queries, 64, keys, dtype, flash_attention.unusable("cuda") is None)
        row("attention", {"queries": queries, "keys": keys, "heads": heads}, partial(choose, True))


def ask(dtype: torch.dtype) -> None:
    for queries, keys, heads in (size for size in ATTENTION if size[1] <= TEXT):
        flash = flash_attention.unusable("cuda") is None
        own = attention.choose(1, heads, queries, 64, keys, dtype, flash, True)
        choose = partial(attention.product_pays, 1, heads, queries, 64, keys, 64 * heads, dtype, own)
        row("queries", {"queries": queries, "keys": keys, "heads": heads}, choose)


def gate(dtype: torch.dtype) -> None:
    for rows, inner in ROWS:
        row("gated", {"rows": rows, "inner": inner}, partial(gated.pays, rows, inner, 8 * inner, True, dtype))


def apart(dtype: torch.dtype) -> None:
    for rows, inner in ROWS:
        size = rows, inner, 2 * inner, inner
        row("apart", {"rows": rows, "inner": inner}, partial(inductor_direct.split_pays, *size, dtype, True))


def convolve(dtype: torch.dtype) -> None:
    """As a rank has them: a row of each neighbour's above and below."""
    for inner, outer, height, width in CONVOLUTIONS:
        size = (1, inner, height + 2, width), (outer, inner, 3, 3), (1, 1), (0, 1)
        choose = partial(inductor_unfold.choose, *size, dtype, True, True)
        row("convolutions", {"in": inner, "out": outer, "height": height, "width": width}, choose)


def row(part: str, size: dict[str, int], choose: Callable[[], Any]) -> None:
    """One line: what a conversion would choose, and all the times it chooses by."""
    with timing.told() as times:
        chosen = choose()
    us = {"usual" if way is None else str(way): round(1e3 * ms, 2) for way, ms in times.items()}
    print(
        json.dumps({"part": part, **size, "chosen": chosen, "us": us, "gpu": torch.cuda.get_device_name()}), flush=True
    )


if __name__ == "__main__":
    main()
