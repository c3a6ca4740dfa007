# SPDX-License-Identifier: Apache-2.0
"""Measure a bundle of many shapes: its size beside the weights, the time to add a shape, and the time to switch.

    python tools/bench_shapes.py MODEL --gpus 2 --size 64x64 --size 96x64 --size 64x96 [--out lines.jsonl]
        [--backend onnxruntime] [--dtype float16] [--work FOLDER]

The first size is converted, and each other one is added. Then all ranks are loaded into this process, and images of the
sizes follow each other. A switch is the first call of an image after one of another size, less the median of the calls
that follow in the same phase. The first image of each size is timed apart: it makes buffers, and on a GPU records
graphs. Prints one JSON line a figure.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where it is not installed

import districompile as dc
from districompile.bundle.bundle import Bundle
from districompile.cli.common import quiet_libraries
from districompile.cli.shapes import Shape
from districompile.models.sources import load_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as for convert")
    parser.add_argument("--size", action="append", required=True, metavar="WIDTHxHEIGHT", help="two or more")
    parser.add_argument("--gpus", default="2")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5, help="images of each size")
    parser.add_argument("--calls", type=int, default=4, help="of an image")
    parser.add_argument("--work", type=Path, help="where the bundle is made, and kept")
    parser.add_argument("--out", type=Path, help="JSON lines are added to this file, too")
    args = parser.parse_args()
    quiet_libraries()
    work = args.work or Path(tempfile.mkdtemp(prefix="districompile-"))
    try:
        measure(args, work)
    finally:
        if args.work is None:
            shutil.rmtree(work)


def measure(args: argparse.Namespace, work: Path) -> None:
    """Convert, add, load, and switch."""

    def say(**figure: Any) -> None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
        line = json.dumps({**figure, "model": args.model, "gpus": int(args.gpus), "backend": args.backend,
                           "dtype": args.dtype, "device": device, "torch": torch.__version__})  # fmt: skip
        print(line, flush=True)
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(line + "\n")

    bundle = work / "bundle"
    options = ["--gpus", args.gpus, "--backend", args.backend, "--dtype", args.dtype, "--cfg", "none"]
    first, *others = args.size
    seconds = command("convert", args.model, *options, "--size", first, "--out", str(bundle))
    say(figure="convert", size=first, seconds=seconds)
    weights = (bundle / "weights.safetensors").stat().st_size
    for count, size in enumerate(["", *others], 1):
        if size:
            say(figure="add", size=size, seconds=command("convert", "--add", str(bundle), "--size", size))
        total = sum(f.stat().st_size for f in bundle.rglob("*") if f.is_file())
        say(figure="size", shapes=count, bytes=total, weights_bytes=weights, ratio=round(total / weights, 4))
    began = time.perf_counter()
    unet = dc.load(bundle, lockstep=True)
    say(figure="load", shapes=len(Bundle.open(bundle).plans), seconds=round(time.perf_counter() - began, 2))
    switches(args, unet, say)


def command(*words: str) -> float:
    """Run a command of districompile, and return its seconds."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "districompile", *words], check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - began, 1)


@torch.no_grad()
def switches(args: argparse.Namespace, unet: Any, say: Any) -> None:
    """Time images of all sizes in turns."""
    loaded = load_source(args.model, getattr(torch, args.dtype))
    sizes = [tuple(map(int, size.split("x"))) for size in args.size]
    examples = [Shape(height=height, width=width).example(loaded, "none") for width, height in sizes]

    def image(example: Any) -> list[float]:
        found = []
        with dc.image(unet), unet.exact():
            for step in range(args.calls):
                began = time.perf_counter()
                unet(example.args[0], torch.tensor(900 - step), *example.args[2:], **example.kwargs)
                if unet.device.type == "cuda":
                    torch.cuda.synchronize()
                found.append((time.perf_counter() - began) * 1e3)
        return found

    firsts = [image(example)[0] for example in examples]
    found = [image(example) for _, example in itertools.product(range(args.rounds), examples)]
    costs = [ms[0] - statistics.median(ms[1:]) for ms in found]
    say(figure="switch", median_ms=round(statistics.median(costs), 2), worst_ms=round(max(costs), 2),
        call_ms=round(statistics.median(m for ms in found for m in ms[1:]), 2), images=len(found),
        first_call_ms=[round(ms, 1) for ms in firsts])  # fmt: skip


if __name__ == "__main__":
    main()
