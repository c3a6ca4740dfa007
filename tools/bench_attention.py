"""Attention by the kernels that PyTorch chooses, and by FlashAttention-3 with the keys in 1, 2 and 3 parts.

Microseconds on the first GPU, one JSON line a size.

    python tools/bench_attention.py [--sizes QUERIES,KEYS,HEADS ...] [--width 64]

By default two ranks' share of SDXL at the latents 480, 256 and 128, Stable Diffusion 1.5's at 64 (with heads of 64
elements for its 40), and attention to a text.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where it is not installed

from districompile.backends.flash_attention import unusable
from districompile.backends.timing import milliseconds

SIZES = ("28800,57600,10", "7200,14400,20", "8192,16384,10", "2048,4096,20", "2048,4096,10", "512,1024,20",
         "2048,4096,8", "2048,77,10")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="QUERIES,KEYS,HEADS")
    parser.add_argument("--width", type=int, default=64, help="of a head, in elements")
    args = parser.parse_args()
    if (reason := unusable("cuda")) is not None:
        raise SystemExit(f"FlashAttention-3 {reason}")
    flash = torch.ops.districompile.flash_attention
    for size in args.sizes:
        queries, keys, heads = map(int, size.split(","))
        draw = partial(torch.randn, dtype=torch.float16, device="cuda")
        q, k, v = (draw(1, n, heads, args.width) for n in (queries, keys, keys))
        turned = [x.transpose(1, 2) for x in (q, k, v)]
        usual = partial(torch.ops.aten.scaled_dot_product_attention.default, *turned)
        times = {"torch": milliseconds(usual)}
        times |= {f"flash3, {n}": milliseconds(partial(flash, q, k, v, args.width**-0.5, n)) for n in (1, 2, 3)}
        times["torch again"] = milliseconds(usual)
        row = {name: round(1e3 * ms, 1) for name, ms in times.items()}
        print(
            json.dumps({"queries": queries, "keys": keys, "heads": heads, "width": args.width, "us": row}), flush=True
        )


if __name__ == "__main__":
    main()
