# SPDX-License-Identifier: Apache-2.0
"""Time matrix products at the sizes of a rank, and the cost of a bias, in float16: one JSON line for a shape and form.

    python tools/bench_products.py [--rows 512,2048,7200] [--copies 16]

Each figure is the time of one product within a CUDA graph of many. Each product has a weight and an input of its own,
so that weights come from memory as in a UNet, and launches are not counted.

Forms: ``linear`` (with a bias), ``matmul`` (without), ``split`` (two halves of the inner dim as a batch, not yet
added). Shapes are those of SDXL, with 640 channels from 2048 rows on, and 1280 below and from 7200 rows on: the
projections of attention, the gated feed-forward and its second half.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where it is not installed

from districompile.cost.timing import captured, median_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="512,2048,7200", help="numbers of rows (default: 512,2048,7200)")
    parser.add_argument("--copies", type=int, default=16, help="products in one CUDA graph (default: 16)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here, and matrix products are timed on one")
    for rows in map(int, args.rows.split(",")):
        channels = 640 if 2048 <= rows < 7200 else 1280
        for out, inner in ((1, 1), (3, 1), (8, 1), (1, 4)):
            shape(rows, out * channels, inner * channels, args.copies)


@torch.no_grad()
def shape(m: int, n: int, k: int, copies: int) -> None:
    """Time all forms of (m, k) by (k, n)."""

    def normal(*size: int) -> list[torch.Tensor]:
        return [torch.randn(*size, device="cuda", dtype=torch.float16) for _ in range(copies)]

    xs, weights, biases = normal(m, k), normal(n, k), normal(n)
    forms: dict[str, list[Callable[[], Any]]] = {
        "linear": [partial(torch.nn.functional.linear, *a) for a in zip(xs, weights, biases, strict=True)],
        "matmul": [partial(torch.mm, x, w.t()) for x, w in zip(xs, weights, strict=True)],
        "split": [
            partial(torch.bmm, x.view(m, 2, k // 2).transpose(0, 1), w.view(n, 2, k // 2).permute(1, 2, 0))
            for x, w in zip(xs, weights, strict=True)
        ],
    }
    for form, products in forms.items():

        def once(products: list[Callable[[], Any]] = products) -> None:
            for product in products:
                product()

        us = median_ms(captured(once)) / copies * 1e3
        print(json.dumps({
            "rows": m, "out": n, "in": k, "form": form, "us": round(us, 2), "tflops": round(2e-6 * m * n * k / us),
            "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
