"""Kernels of our own beside what they stand for: microseconds on the first GPU, one JSON line a size.

    python tools/bench_kernels.py [--only attention,gated,apart] [--dtype float16]

  attention  by PyTorch's choice, and by ours with few keys, and with many in blocks: two, four and eight ranks' share
             of SDXL's layers of 20 heads at the latent 128, and attention to a text at 128, 256 and 480
  gated      a product and what multiplies one half with the GELU of the other, and both in one
  apart      a product and a copy of two thirds of it, two products, and one that writes to two places

The last two are of the rows of two ranks at the latents 128, 256 and 480. What one size has is timed in turns.
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

from districompile.backends import attention, flash_attention, inductor_direct, timing
from districompile.backends.gpu import gated
from districompile.backends.gpu.launch import unusable

ATTENTION = ((512, 1024, 20), (256, 1024, 20), (128, 1024, 20), (512, 77, 20), (2048, 77, 10), (2048, 77, 20),
             (8192, 77, 10), (7200, 77, 20), (28800, 77, 10))  # fmt: skip
ROWS = ((512, 1280), (2048, 640), (2048, 1280), (8192, 640), (7200, 1280), (28800, 640))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="attention,gated,apart")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    args = parser.parse_args()
    if (reason := unusable()) is not None:
        raise SystemExit(f"kernels of our own cannot be used here: {reason}")
    dtype = getattr(torch, args.dtype)
    parts: dict[str, Callable[[torch.dtype], None]] = {"attention": attend, "gated": gate, "apart": apart}
    for name in args.only.split(","):
        if name not in parts:
            raise SystemExit(f"no part named {name!r}; there are: {', '.join(parts)}")
        parts[name](dtype)


def attend(dtype: torch.dtype) -> None:
    for queries, keys, heads in ATTENTION:
        choose = partial(attention.choose, 1, heads, queries, 64, keys, dtype, flash_attention.unusable("cuda") is None)
        row("attention", {"queries": queries, "keys": keys, "heads": heads}, partial(choose, True))


def gate(dtype: torch.dtype) -> None:
    for rows, inner in ROWS:
        row("gated", {"rows": rows, "inner": inner}, partial(gated.pays, rows, inner, 8 * inner, True, dtype))


def apart(dtype: torch.dtype) -> None:
    for rows, inner in ROWS:
        size = rows, inner, 2 * inner, inner
        row("apart", {"rows": rows, "inner": inner}, partial(inductor_direct.split_pays, *size, dtype, True))


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
