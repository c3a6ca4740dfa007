# SPDX-License-Identifier: Apache-2.0
"""Compute what each rank of a partition needs, without a GPU: rows, work, bytes sent, memory. One JSON line a case.

    python tools/scaling.py [--models sdxl,sd15] [--latents 128,256,480] [--ranks 2,4,8] [--cfg none,split]

- ``work``: operations of the busiest rank in the displaced step, times the ranks, over those of a single rank. 1.00 is
  an even division.
- ``sent_mb``: bytes that the busiest rank sends a step. ``transfer_ms``: their time at ``--bandwidth``.
- ``receive_mb``: receive buffers. ``arena_mb``: values between engines. ``weights_mb``: weights, on every rank.
- ``exchanges``: collectives that the exact step waits for, one after another.

Memory that engines allocate themselves is not counted. All figures come from the plan. ``bench_gpu.py --only predict``
measures the times of engines.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where it is not installed

import bench_convert
import gpu_parts

import districompile as dc
from districompile.backends.inductor.package import aliased_outputs
from districompile.ir.spec import Phase
from districompile.plan.plan import ExecutionPlan
from districompile.runtime.executor.memory import plan_memory

MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="sdxl", help=f"of {','.join(gpu_parts.MODELS)}, or one JSON configuration")
    parser.add_argument("--latents", default="128,256,480", help="squares (128) or HEIGHTxWIDTH (104x152)")
    parser.add_argument("--ranks", default="2,4,8")
    parser.add_argument("--cfg", default="none", help="of none, split (each guidance half on half of the ranks)")
    parser.add_argument("--optimise", default="all", help="exact passes for speed, or all, or none")
    parser.add_argument("--segments", type=int, default=8)
    parser.add_argument("--bandwidth", type=float, default=300.0, help="GB/s that one GPU sends to all others together")
    args = parser.parse_args()
    models = [args.models] if args.models.startswith("{") else args.models.split(",")
    for model in models:
        module = bench_convert.network(gpu_parts.MODELS[model] if model in gpu_parts.MODELS else json.loads(model))
        for latent, cfg in itertools.product(args.latents.split(","), args.cfg.split(",")):
            whole = None
            for ranks in (1, *map(int, args.ranks.split(","))):
                print(f"{model[:20]} {latent} cfg {cfg} on {ranks} ...", file=sys.stderr, flush=True)
                line, work = case(module, latent, ranks, cfg, args)
                whole = whole or work
                if ranks > 1:
                    halves = 2 if cfg == "split" else 1
                    found = {"model": model, "latent": latent, "ranks": ranks, "cfg": cfg}
                    print(json.dumps({**found, "work": round(work * ranks / halves / whole, 3), **line}), flush=True)


def case(
    module: torch.nn.Module, latent: str, ranks: int, cfg: str, args: argparse.Namespace
) -> tuple[dict[str, Any], float]:
    """Return the figures of a case and the operations of the busiest rank.

    The case is one image; with guidance split, the two halves of a batch.
    """
    height, _, width = latent.partition("x")
    kwargs = gpu_parts.example(module, torch.device("cpu"), int(height), int(width or height))
    if cfg == "split" and ranks > 1:
        kwargs = doubled(kwargs)
    began = time.perf_counter()
    program = dc.convert(
        module, kwargs=kwargs, ranks=ranks, rows={"sample": 2}, cfg=cfg if ranks > 1 else "none",
        segments=args.segments, optimise="" if args.optimise == "none" else args.optimise,
    )  # fmt: skip
    plan: ExecutionPlan = program.plan
    elsewhere = {
        phase: {name for _, segment in program.segments(cast(Phase, phase)) for name in aliased_outputs(segment)}
        for phase in plan.phases
    }
    memories = [plan_memory(plan, r, elsewhere) for r in range(plan.ranks)]
    work = max(program.work("displaced"))
    report = program.report()
    sent = max(report.sent("displaced"))
    return {
        "tflop": round(work / 1e12, 3),
        "rows": {size: [b - a for a, b in itertools.pairwise(bounds)] for size, bounds in plan.bounds.items()},
        "sent_mb": round(sent / MB, 1), "transfer_ms": round(sent / args.bandwidth / MB, 3),
        "receive_mb": round(max(m.received_bytes(r) for r, m in enumerate(memories)) / MB, 1),
        "arena_mb": round(max(m.arena_bytes for m in memories) / MB, 1),
        "kept_mb": round(max(2 * m.kept_stride for m in memories) / MB, 1),
        "weights_mb": round(sum(s.nbytes for s in plan.weights.values()) / MB, 1),
        "exchanges": report.waits("exact"), "waits_displaced": report.waits("displaced"),
        "convert_s": round(time.perf_counter() - began, 1),
    }, work  # fmt: skip


def doubled(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: doubled(v) if isinstance(v, dict) else torch.cat([v, v]) if v.ndim else v for k, v in kwargs.items()}


if __name__ == "__main__":
    main()
