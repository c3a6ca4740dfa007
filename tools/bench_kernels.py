# SPDX-License-Identifier: Apache-2.0
"""Time the custom kernels against those of PyTorch's libraries on the first GPU.

Prints one JSON line for each size, with microseconds by configuration; "baseline" is PyTorch's.

    python tools/bench_kernels.py [--only attention,projection,gated,split,convolutions,fp8] [--dtype float16]

  attention     PyTorch's choice, each of its kernels, FlexAttention, FlashAttention-3 and -4 where installed, and the
                custom kernel by sizes of blocks, at the sizes of bench_attention.py
  projection    the projection of queries and attention to a text, as two kernels and as one
  gated         a gated linear layer, as a linear layer and a pointwise kernel, and as one kernel
  split         a linear layer and a copy of two thirds of its result, two linear layers, and one with two results
  convolutions  3 x 3, by cuDNN, by im2col (with the time to write the matrix), and by tiles of the custom kernel
  fp8           layers in 8 bits: linear layers, gated ones and convolutions, by the libraries (cuDNN convolves in 16
                bits) and by tiles of the custom kernel. "sixteen" is the fastest that 16 bits have for that size

The last four have the rows of two ranks at the latents 128, 256 and 480. All configurations of a size are timed in
turns.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where it is not installed

from bench_attention import TEXT, attend

from districompile.backends.inductor import attention, autotune, convolution, flash_attention, fp8, gated, split_linear
from districompile.backends.inductor.kernels import hopper
from districompile.backends.inductor.kernels.launch import unavailable_reason

PROJECTED = ((512, 20), (2048, 10), (2048, 20), (8192, 10), (7200, 20), (28800, 10))  # queries, heads; keys of a text
PARTS = ("attention", "projection", "gated", "split", "convolutions", "fp8")
ROWS = ((512, 1280), (2048, 640), (2048, 1280), (8192, 640), (7200, 1280), (28800, 640))


# Input and output channels, and the pixels of one of two ranks
CONVOLUTIONS = (
    (320, 320, 64, 128), (960, 320, 64, 128), (640, 640, 32, 64), (1280, 1280, 16, 32), (320, 320, 128, 256),
    (640, 640, 64, 128), (1280, 1280, 32, 64), (320, 320, 240, 480), (640, 640, 120, 240), (1280, 1280, 60, 120),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas (default: all)")
    parser.add_argument(
        "--dtype", default="float16", choices=("float16", "bfloat16"), help="dtype of all tensors (default: float16)"
    )
    args = parser.parse_args()
    if (reason := unavailable_reason()) is not None:
        raise SystemExit(f"the custom kernels cannot be used here: {reason}")
    dtype = getattr(torch, args.dtype)
    parts: dict[str, Callable[[torch.dtype], None]] = dict(
        zip(PARTS, (partial(attend, row=row), project, gate, split, convolve, eight_bits), strict=True)
    )
    for name in args.only.split(","):
        if name not in parts:
            raise SystemExit(f"no part named {name!r}; there are: {', '.join(parts)}")
        if name in ("gated", "convolutions", "fp8") and (reason := hopper.unavailable_reason()) is not None:
            raise SystemExit(f"{name} cannot be measured here: {reason}")
        parts[name](dtype)


def project(dtype: torch.dtype) -> None:
    flash = flash_attention.select_libraries("auto", "cuda")
    for queries, heads in PROJECTED:
        separate = attention.best_attention(1, heads, queries, 64, TEXT, dtype, flash, True)
        select = partial(attention.best_projection_config, 1, heads, queries, 64, TEXT, 64 * heads, dtype, separate)
        row("projection", {"queries": queries, "keys": TEXT, "heads": heads}, select)


def gate(dtype: torch.dtype) -> None:
    for rows, inner in ROWS:
        row("gated", {"rows": rows, "inner": inner}, partial(gated.best_tile, rows, inner, 8 * inner, True, dtype))


def split(dtype: torch.dtype) -> None:
    for rows, inner in ROWS:
        size = rows, inner, 2 * inner, inner
        row("split", {"rows": rows, "inner": inner}, partial(split_linear.best_split_config, *size, dtype, True))


def convolve(dtype: torch.dtype) -> None:
    """Time convolutions of the rows of a rank, with one row of each neighbour above and below."""
    for inner, outer, height, width in CONVOLUTIONS:
        size = (1, inner, height + 2, width), (outer, inner, 3, 3), (1, 1), (0, 1)
        select = partial(convolution.best_convolution, *size, dtype, True, True)
        row("convolutions", {"in": inner, "out": outer, "height": height, "width": width}, select)


def eight_bits(dtype: torch.dtype) -> None:
    """Time layers in 8 bits, and the best that 16 bits have for the same sizes."""
    for rows, inner in ROWS:
        for columns, gating in ((inner, False), (3 * inner, False), (8 * inner, True)):
            size = {"rows": rows, "inner": inner, "columns": columns, "gated": gating}
            sixteen = shortest(partial(gated.best_tile, rows, inner, columns, True, dtype)) if gating else None
            select = partial(fp8.best_linear, rows, inner, columns, True, gating, dtype)
            row("fp8", size, select, sixteen or product_time(rows, inner, columns, dtype))
    for inner, outer, height, width in CONVOLUTIONS:
        image, filters = (1, inner, height + 2, width), (outer, inner, 3, 3)
        sixteen = shortest(partial(convolution.best_convolution, image, filters, (1, 1), (0, 1), dtype, True, True))
        select = partial(fp8.best_convolution, image, filters, (0, 1), True, dtype)
        row("fp8", {"in": inner, "out": outer, "height": height, "width": width}, select, sixteen)


def shortest(select: Callable[[], object]) -> float:
    """Return the ms of the fastest configuration that a selection compares."""
    with autotune.recorded_timings() as times:
        select()
    return min(times.values())


def product_time(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
    """Return the ms of a matrix product by the library."""
    x, weight = (torch.randn(n, inner, dtype=dtype, device="cuda") for n in (rows, columns))
    with autotune.recorded_timings() as times:
        autotune.best_config("a product", partial(torch.mm, x, weight.t()), {})
    return times[None]


def row(
    part: str, size: Mapping[str, object], select: Callable[[], object], sixteen: float | None = None,
    notes: Sequence[str] = (),
) -> None:  # fmt: skip
    """Print one line: the configuration that a conversion would select, and all timings that it compares."""
    with autotune.recorded_timings() as times:
        selected = select()
    us = {"baseline" if key is None else str(key): round(1e3 * ms, 2) for key, ms in times.items()}
    us |= {} if sixteen is None else {"sixteen": round(1e3 * sixteen, 2)}
    where = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    line = {"part": part, **size, "selected": selected, "us": us, **where, **({"notes": list(notes)} if notes else {})}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
