# SPDX-License-Identifier: Apache-2.0
"""Compare predicted steps with measured ones, and fit the coefficients of ``districompile.cost.predict``.

    python tools/fit_cost.py docs/measurements/four-h100.jsonl --gpu h100 [--fit] [--kernels FOLDER]

The measured file is that of ``bench_gpu.py``. One JSON line a step: measured and predicted ms, and the difference as a
share. With ``--fit``, coefficients are searched first, from the ones in use; those of kernels by the steps with
transfers free and the steps of one GPU, and the last line prints them. Counting the kernels converts each network
(SDXL: about a minute a case); ``--kernels`` keeps them for another run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where it is not installed

import bench_convert
import gpu_parts

import districompile as dc
from districompile.cost.gpus import Efficiency, Gpu, find_gpu
from districompile.cost.predict import EFFICIENCY, compute_ms, estimate_step
from districompile.cost.work import KernelWork, kernels_of
from districompile.frontend.capture import capture
from districompile.ir.spec import Phase

OF_KERNELS = ("matmul", "conv", "attention", "memory", "kernel_us")
OF_TRANSFERS = ("wait_us", "link", "overlap")


@dataclasses.dataclass
class Step:
    """A measured step, with what the prediction needs: the kernels of one rank, bytes and waits."""

    name: str
    figure: str
    measured_ms: float
    phase: Phase
    ranks: int
    kernels: Mapping[KernelWork, int]
    sent: int
    waits: int

    def predict(self, gpu: Gpu, share: Efficiency) -> float:
        """Return the predicted ms."""
        ms = sum(n * compute_ms([k], gpu, share) for k, n in self.kernels.items())
        computed = [ms] * self.ranks
        if "free" in self.figure:
            return computed[0]
        return estimate_step(computed, [self.sent], self.waits, self.phase, gpu, share).ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON lines of bench_gpu.py")
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--kernels", type=Path, help="folder in which counted kernels are kept")
    args = parser.parse_args()
    gpu, share = find_gpu(args.gpu), EFFICIENCY
    steps = list(read(args.file, args.kernels))
    if args.fit:
        share = fit([s for s in steps if s.ranks == 1 or "free" in s.figure], gpu, share, OF_KERNELS)
        share = fit([s for s in steps if s.ranks > 1 and "free" not in s.figure], gpu, share, OF_TRANSFERS)
    for step in steps:
        predicted = step.predict(gpu, share)
        print(json.dumps({
            "case": step.name, "figure": step.figure, "measured_ms": round(step.measured_ms, 2),
            "predicted_ms": round(predicted, 2), "difference": round(predicted / step.measured_ms - 1, 3),
        }))  # fmt: skip
    if args.fit:
        print(json.dumps({"efficiency": {k: round(v, 3) for k, v in dataclasses.asdict(share).items()}}))


def read(file: Path, kept: Path | None) -> Iterator[Step]:
    """Yield the steps of one GPU (the quickest of each case) and those of ours, with their kernels."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    alone: dict[tuple[Any, ...], float] = {}
    for line in lines:
        job = line["job"]
        case = (job["model"], job["latent"], job["ranks"], job.get("guidance", "none"))
        if job["part"] == "single" and "ms" in line:
            alone[case] = min(line["ms"], alone.get(case, math.inf))
        elif job["part"] == "ours" and "ms" in line and " step" in line["figure"]:
            phase = cast(Phase, line["figure"].split()[0])
            kernels, *rest = counted(*case, kept)[phase]
            yield Step(name(case), line["figure"], line["ms"], phase, job["ranks"], Counter(kernels), *rest)
    for case, ms in alone.items():
        yield Step(name(case), "one GPU", ms, "exact", 1, Counter(counted(*case, kept)["exact"][0]), 0, 0)


def name(case: tuple[Any, ...]) -> str:
    """Return the text of a case."""
    model, latent, ranks, guidance = case
    return f"{model} {latent} on {ranks}" + ("" if guidance == "none" else f", guidance {guidance}")


Counted = dict[str, tuple[list[KernelWork], int, int]]  # by phase: kernels of one rank, bytes sent, waits


def counted(model: str, latent: str, ranks: int, guidance: str, kept: Path | None) -> Counted:
    """Count kernels, bytes and waits of a case, or read them from the folder ``kept``."""
    halves = 2 if guidance == "split" else 1
    file = None if kept is None else kept / f"{model}-{latent}-{ranks // halves}-{guidance == 'batch'}.json"
    if file is not None and file.exists():
        data = json.loads(file.read_text())
        return {phase: ([KernelWork(*k) for k in kernels], *rest) for phase, (kernels, *rest) in data.items()}
    print(f"{model} {latent} on {ranks} ...", file=sys.stderr, flush=True)
    module = bench_convert.network(gpu_parts.MODELS[model])
    height, _, width = latent.partition("x")
    batch = 2 if guidance == "batch" else 1
    kwargs = gpu_parts.example(module, torch.device("cpu"), int(height), int(width or height), batch)
    found: Counted = {}
    if ranks == 1:
        found["exact"] = kernels_of(capture(module, (), kwargs).graph.nodes), 0, 0
    else:
        program = dc.convert(
            module, kwargs=kwargs, ranks=ranks // halves, rows={"sample": 2}, segments=8, optimise="all"
        )
        report, phases = program.report(), cast("tuple[Phase, ...]", ("exact", "displaced"))
        for phase in phases:
            kernels = kernels_of(program.graph(phase).nodes, 0, epilogues=True)
            found[phase] = kernels, max(report.sent(phase)), report.waits(phase)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({p: [[dataclasses.astuple(w) for w in k], *r] for p, (k, *r) in found.items()}))
    return found


def fit(steps: list[Step], gpu: Gpu, share: Efficiency, names: tuple[str, ...]) -> Efficiency:
    """Search coefficients by coordinate descent: the least sum of squared logarithms of predicted over measured."""

    def loss(tried: Efficiency) -> float:
        return sum(math.log(s.predict(gpu, tried) / s.measured_ms) ** 2 for s in steps)

    best = loss(share)
    for scale in (1.2, 1.1, 1.05, 1.02, 1.01):
        improved = True
        while improved:
            improved = False
            for coefficient in names:
                for factor in (scale, 1 / scale):
                    value = getattr(share, coefficient) * factor
                    if coefficient not in ("kernel_us", "wait_us") and value > 1:
                        continue
                    tried = dataclasses.replace(share, **{coefficient: value})
                    if (found := loss(tried)) < best:
                        share, best, improved = tried, found, True
    return share


if __name__ == "__main__":
    main()
