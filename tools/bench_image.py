#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Time whole pictures in one run, from the prompt to a PNG in memory: one device, distrifuser, and our bundles.

    python tools/bench_image.py MODEL --bundle BUNDLE --bundle BUNDLE --steps 50 --out lines.jsonl
    python tools/bench_image.py --plot lines.jsonl --out docs/images/whole_pictures.svg

MODEL is a pipeline folder of diffusers, or ``demo``. Each way runs in processes of its own, one after the other:

  eager        the unmodified pipeline on one device
  compiled     the same, with its network in channels-last memory, compiled by ``torch.compile`` with CUDA graphs
  ours         each ``--bundle``, by ``districompile bench --image``; ``warm`` says whether it was warmed up at load,
               ``vae`` what ``--vae`` was
  distrifuser  its pipeline on ``--distrifuser-gpus`` GPUs, from a checkout (``--distrifuser``); SDXL alone

One JSON line a way and bundle: ``seconds`` of each picture, ``first_s``, ``median_s`` of the others, ``load_s``, the
machine. A way that cannot run has ``skipped`` with the reason. Size and guidance are those of the first bundle.
``--plot`` draws lines that were written; it needs matplotlib.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PROMPT = "a red circle above a blue square"
WAYS = ("eager", "compiled", "ours", "distrifuser")
_LIMIT = 3600.0  # seconds of one way


def main() -> int:
    """Run every way, or plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", help="folder of a diffusers pipeline, or demo")
    parser.add_argument(
        "--bundle", type=Path, action="append", default=[], help="a bundle of the model; may be repeated"
    )
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of {','.join(WAYS)}")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--pictures", type=int, default=4, help="the first counts by itself")
    parser.add_argument("--vae", help="for ours: a bundle of the VAE, or none: rank 0 decodes [default: the bundle's]")
    parser.add_argument("--distrifuser", type=Path, help="a checkout of distrifuser")
    parser.add_argument("--distrifuser-gpus", type=int, default=2)
    parser.add_argument("--out", type=Path, help="file of the lines, or of the plot")
    parser.add_argument("--plot", type=Path, metavar="LINES", help="plot these lines into --out")
    parser.add_argument("--worker", choices=("eager", "compiled", "distrifuser"), help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(args.worker, json.loads(args.job))), flush=True)
        return 0
    if args.plot is not None:
        if args.out is None:
            parser.error("--plot draws into --out FILE")
        plot([json.loads(line) for line in args.plot.read_text().splitlines()], args.out)
        return 0
    ways = args.ways.split(",")
    if args.model is None or not set(ways) <= set(WAYS):
        parser.error("give MODEL, and ways of " + ", ".join(WAYS))
    if not args.bundle:
        parser.error("give a --bundle: size and guidance are those of the first one")
    out = sys.stdout if args.out is None else args.out.open("w")
    for line in measured(args, ways):
        print(json.dumps({**machine(), **line}), file=out, flush=True)
    return 0


def measured(args: argparse.Namespace, ways: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Run the ways one after the other, and yield a line of each."""
    options = json.loads((args.bundle[0] / "plan.json").read_text())["options"]
    job = {
        "model": args.model, "steps": args.steps, "pictures": args.pictures,
        **{name: options.get(name) for name in ("width", "height", "guidance", "dtype")},
        "checkout": None if args.distrifuser is None else str(args.distrifuser.resolve()),
    }  # fmt: skip
    common = {"model": Path(args.model).name, "steps": args.steps, "width": job["width"], "height": job["height"],
              "guidance": job["guidance"]}  # fmt: skip
    for way in ways:
        if way == "ours":
            for bundle in args.bundle:
                for warm in (False, True):
                    yield {
                        "way": way, "bundle": bundle.name, **common, "warm": warm, "vae": args.vae,
                        **ours(args, bundle, warm),
                    }  # fmt: skip
            continue
        processes = args.distrifuser_gpus if way == "distrifuser" else 1
        reason = skipped(way, args)
        found = {"skipped": reason} if reason else run_worker(way, job, processes)
        yield {"way": way, **common, "processes": processes, **found}


def skipped(way: str, args: argparse.Namespace) -> str | None:
    """Return why a way cannot run here."""
    if way != "distrifuser":
        return None
    if args.distrifuser is None:
        return "no checkout is given (--distrifuser)"
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return None if count >= args.distrifuser_gpus else f"it needs {args.distrifuser_gpus} GPUs, and there are {count}"


def ours(args: argparse.Namespace, bundle: Path, warm: bool) -> dict[str, Any]:
    """Time pictures of one bundle."""
    command = [
        sys.executable, "-m", "districompile", "bench", str(bundle), "--image", "--steps", str(args.steps),
        "--pictures", str(args.pictures), "--json", *(["--warm-up"] if warm else []),
        *(["--model", args.model] if args.model != "demo" else []),
        *(["--vae", args.vae] if args.vae is not None else []),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT)
    if done.returncode:
        return {"skipped": done.stderr.strip().splitlines()[-1]}
    found = json.loads(done.stdout)["image"]
    manifest = json.loads((bundle / "manifest.json").read_text())
    return {
        "backend": manifest["backend"], "processes": found["processes"], "first_s": found["first_s"],
        "median_s": found["seconds"], "load_s": found["load_s"], "parts_ms": found["parts_ms"],
    }  # fmt: skip


def run_worker(way: str, job: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """Time pictures of a pipeline in processes of its own."""
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, __file__, "--worker", way, "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"skipped": (done.stderr.strip() or "it printed nothing").splitlines()[-1]}
    found: dict[str, Any] = json.loads(lines[0])
    return found


def work(way: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """Load a pipeline and draw, in this process."""
    import torch

    from districompile.cli.generate import as_bytes, as_pictures
    from districompile.cli.pictures import PNG_LEVEL

    began = time.perf_counter()
    pipe = distrifuser(job) if way == "distrifuser" else one_device(way, job)
    load_s = time.perf_counter() - began
    guided = job["guidance"] in ("batch", "split")
    scale = {} if guided else {"guidance_scale": 1.0}
    sizes = {} if way == "distrifuser" else {n: job[n] for n in ("width", "height") if job[n] is not None}
    seconds = []
    for number in range(job["pictures"]):
        start = time.perf_counter()
        with torch.no_grad():
            pixels = pipe(
                prompt=PROMPT, num_inference_steps=job["steps"], output_type="pt",
                generator=torch.Generator("cpu").manual_seed(number), **scale, **sizes,
            ).images  # fmt: skip
        for made in as_pictures(as_bytes(pixels.float())):  # as `bench --image` does
            made.save(io.BytesIO(), format="PNG", compress_level=PNG_LEVEL)
        seconds.append(time.perf_counter() - start)
    first, *later = seconds
    return {
        "first_s": round(first, 4), "median_s": round(statistics.median(later or [first]), 4),
        "load_s": round(load_s, 3), "seconds": [round(s, 4) for s in seconds],
    }  # fmt: skip


def one_device(way: str, job: Mapping[str, Any]) -> Any:
    """Return the unmodified pipeline on one device."""
    import torch
    from diffusers import DiffusionPipeline

    from districompile.models.sources import DEMO, network_name

    folder = DEMO if job["model"] == "demo" else job["model"]
    pipe: Any = DiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, job["dtype"] or "float32"))
    pipe.set_progress_bar_config(disable=True)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    if way == "compiled":
        network = network_name(pipe)
        module = getattr(pipe, network).to(memory_format=torch.channels_last)
        # as diffusers recommends: the default mode leaves a GPU waiting for the host
        setattr(pipe, network, torch.compile(module, mode="reduce-overhead"))
    return pipe


def distrifuser(job: Mapping[str, Any]) -> Any:
    """Return distrifuser's pipeline for SDXL, in one rank's process."""
    import torch

    sys.path.insert(0, job["checkout"])
    if importlib.util.find_spec("distrifuser") is None:
        raise SystemExit(f"{job['checkout']} is no checkout of distrifuser")
    from distrifuser.pipelines import DistriSDXLPipeline  # type: ignore[import-not-found]
    from distrifuser.utils import DistriConfig  # type: ignore[import-not-found]

    guided = job["guidance"] in ("batch", "split")
    config = DistriConfig(
        height=job["height"], width=job["width"], warmup_steps=4, mode="corrected_async_gn",
        do_classifier_free_guidance=guided, split_batch=job["guidance"] == "split",
    )  # fmt: skip
    pipe = DistriSDXLPipeline.from_pretrained(
        distri_config=config, pretrained_model_name_or_path=job["model"], torch_dtype=getattr(torch, job["dtype"])
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def machine() -> dict[str, Any]:
    """Return what the pictures are drawn on."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.cuda.get_device_name(0) if count else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return {"device": device, "gpus": count, "torch": torch.__version__}


def label(line: Mapping[str, Any]) -> str:
    """Return the name of a line in the plot."""
    if line["way"] != "ours":
        return {"eager": "one device, PyTorch", "compiled": "one device, torch.compile"}.get(
            line["way"], f"distrifuser, {line['processes']} GPUs"
        )
    return f"districompile, {line['processes']} ranks, {line['backend']}" + (", warmed up" if line["warm"] else "")


def plot(lines: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Draw the first picture and the others of each line, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "districompile"  # the same file for the same lines
    import matplotlib.pyplot as plt

    shown = [line for line in lines if "median_s" in line]
    if not shown:
        raise SystemExit("no line has a picture")
    figure, axes = plt.subplots(figsize=(7.5, 1.4 + 0.45 * len(shown)))
    places = range(len(shown))
    axes.barh([p - 0.2 for p in places], [x["first_s"] for x in shown], 0.36, color="0.75", label="first picture")
    axes.barh([p + 0.2 for p in places], [x["median_s"] for x in shown], 0.36, color="tab:blue", label="the others")
    axes.set_yticks(list(places), [label(x) for x in shown])
    axes.invert_yaxis()
    one = shown[0]
    axes.set_xlabel("seconds a picture, from prompt to pixels")
    axes.set_title(
        f"{one['model']}, {one['width']}x{one['height']}, {one['steps']} steps; {one['device']}", fontsize=10
    )
    figure.legend(loc="lower right", ncols=2)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


if __name__ == "__main__":
    sys.exit(main())
