# SPDX-License-Identifier: Apache-2.0
"""Time one GPU, the reference implementation and districompile, with random fp16 weights: one JSON line for a figure.

    python tools/bench_gpu.py --out FILE [--only single,free,...] [--latents 128,256,480] [--ranks 2]

Each part runs in processes of its own:

  single      one GPU: eager, and torch.compile (default and max-autotune), as CUDA graphs
  free        the engines of one rank without transfers, in both phases (upper bound), compared with eager PyTorch
  passes      the displaced step of free with no optimisation, with each alone, and with all
  predict     free for ``--predict-ranks`` (4 and 8): the compute of a rank with a quarter and an eighth of the rows,
              and the time of the transfers at ``--bandwidth``
  convert     make the bundle and compare it with eager PyTorch, without timing
  ours        the bundle on ``--ranks`` GPUs: exact and displaced step (``districompile bench``)
  steps       ours, and a run of ``--steps`` calls, of which the first ``--warmup-steps`` are exact
  distrifuser the reference implementation on ``--ranks`` GPUs; needs --distrifuser CHECKOUT, and diffusers 0.27.2 in
              the folder --distrifuser-site

A part whose figures are in FILE is not run again. No part starts after ``--budget`` seconds: call again to continue.
With ``--together`` the parts of one size compile at the same time; they are still timed one at a time.
Latents are squares (128) or HEIGHTxWIDTH (104x152). All figures of one file must come from one machine.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
sys.path.insert(0, str(TOOLS.parent))  # where it is not installed

from districompile.ir.unit import DRIFT_LIMIT  # noqa: E402
from districompile.plan.defaults import OPTIMISE, SEGMENTS  # noqa: E402

ONE_GPU = ("single", "free", "predict", "passes")
PARTS = (*ONE_GPU, "convert", "ours", "steps", "distrifuser")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are added to this file")
    parser.add_argument("--only", default="single,free,ours,distrifuser", help=f"parts, of {','.join(PARTS)}")
    parser.add_argument("--models", default="sdxl", help="of sdxl, sd15, or one JSON configuration of a diffusers UNet")
    parser.add_argument("--latents", default="128,256,480")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--guidance", default="none", choices=("none", "batch", "split"),
        help="none: one image; batch: both halves of a guided step in one call; split: each on half of the ranks",
    )  # fmt: skip
    parser.add_argument("--predict-ranks", default="4,8")
    parser.add_argument("--bandwidth", type=float, default=379.0, help="GB/s from one GPU to another, for predict")
    parser.add_argument("--phases", default="displaced,exact")
    parser.add_argument(
        "--modes", default="eager,default,max-autotune-no-cudagraphs", help="of single; default+fp8 is torchao's"
    )
    parser.add_argument("--max-autotune", action="store_true", help="for our engines")
    parser.add_argument("--attention", default="auto", help="of our engines: auto, torch or flash3")
    parser.add_argument(
        "--autotune", default="linear,conv,custom-kernels", help="what our engines choose by timing, or none"
    )
    parser.add_argument("--inductor", default="{}", help="further Inductor options for our engines, as JSON")
    parser.add_argument("--optimise", default=OPTIMISE, help="exact passes for speed, or all, or none")
    parser.add_argument("--segments", type=int, default=SEGMENTS)
    parser.add_argument("--workers", type=int, help="processes that compile our engines")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--warmup-steps", type=int, default=4)
    parser.add_argument("--groupnorm", default="forecast", help="of our displaced phase")
    parser.add_argument("--drift-limit", type=float, help="of ours; 0 measures no drift (else the default)")
    parser.add_argument("--reuse", default="none", help="of ours, as deep=2")
    parser.add_argument("--transfer-bits", type=int, help="of ours: 8 sends differences")
    parser.add_argument("--quantise", default="none", help="of ours, as fp8")
    parser.add_argument("--work", type=Path, default=Path("bench-work"), help="bundles and packages, kept")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one part")
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--no-check", action="store_true", help="leave out the comparison with the eager oracle")
    parser.add_argument("--profile", type=Path, help="kernel tables (and traces of ours) are written to FILE-...")
    parser.add_argument("--distrifuser", type=Path)
    parser.add_argument("--distrifuser-site", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.one:
        run_one(json.loads(args.one), args)
    else:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        drive(args)


def jobs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """List the jobs in order: by model and size, so that figures to be compared are measured close together."""
    from districompile.ir.unit import OPTIMISATIONS

    found: list[dict[str, Any]] = []
    models = [args.models] if args.models.startswith("{") else args.models.split(",")
    for model in models:
        for latent in args.latents.split(","):
            for part in args.only.split(","):
                base = {"part": part, "model": model, "latent": latent, "optimise": args.optimise,
                        "inductor": args.inductor, "max_autotune": args.max_autotune,
                        "attention": args.attention, "autotune": args.autotune, "guidance": args.guidance,
                        "groupnorm": args.groupnorm, "drift_limit": args.drift_limit}  # fmt: skip
                if args.reuse != "none" or args.transfer_bits is not None:  # else jobs are those of earlier files
                    base |= {"reuse": args.reuse, "transfer_bits": args.transfer_bits}
                if args.quantise != "none":
                    base |= {"quantise": args.quantise}
                if part == "passes":
                    found += [{**base, "ranks": args.ranks, "optimise": o} for o in ("none", *OPTIMISATIONS, "all")]
                elif part == "predict":
                    found += [{**base, "ranks": int(n)} for n in args.predict_ranks.split(",")]
                else:
                    found.append({**base, "ranks": 1 if part == "single" else args.ranks})
    return found


def drive(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    unknown = [p for p in args.only.split(",") if p not in PARTS]
    if unknown:
        raise SystemExit(f"no part named {unknown[0]!r}; there are: {', '.join(PARTS)}")
    if args.guidance == "split" and {"free", "passes", "predict"} & set(args.only.split(",")):
        raise SystemExit("one rank of a guidance half is what --guidance none measures, on half as many --ranks")
    done = [json.loads(line)["job"] for line in args.out.read_text().splitlines()] if args.out.exists() else []
    waiting = [job for job in jobs(args) if not any(d == {**job, "done": True} for d in done)]
    while waiting:
        if time.perf_counter() - started > args.budget:
            print(f"out of time; call again for: {', '.join(j['part'] for j in waiting)}", file=sys.stderr)
            return
        first = waiting.pop(0)
        group = [first]
        while args.together and waiting and "distrifuser" not in (first["part"], waiting[0]["part"]):
            if any(waiting[0][k] != first[k] for k in ("model", "latent")):
                break
            group.append(waiting.pop(0))
        processes = [(job, start(job)) for job in group]
        try:
            for job, process in processes:
                left = max(1.0, min(args.timeout, args.budget - (time.perf_counter() - started)))
                try:
                    code = process.wait(left)
                except subprocess.TimeoutExpired:
                    code = end(process)
                if code == 0:
                    record(args.out, {**job, "done": True}, {"figure": "done"})
                else:
                    record(args.out, job, {"figure": "failed", "code": code})
        finally:
            for _, process in processes:
                end(process)


def start(job: dict[str, Any]) -> subprocess.Popen[bytes]:
    print(f"{job['part']} {job['model'][:20]} {job['latent']} on {job['ranks']} ...", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--one", json.dumps(job)]
    if job["part"] not in ONE_GPU:
        return subprocess.Popen(command, start_new_session=True)
    # On the last GPU, as other parts compile on the first
    shown = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus())))
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": shown.rpartition(",")[2]}
    return subprocess.Popen(command, env=env, start_new_session=True)


def end(process: subprocess.Popen[bytes]) -> int:
    """Kill the process and its children, which would otherwise go on and hold the lock of other parts."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


def record(out: Path, job: dict[str, Any], figure: dict[str, Any]) -> None:
    """Write one line to the file and to standard output."""
    line = json.dumps({**figure, "job": job})
    with out.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def run_one(job: dict[str, Any], args: argparse.Namespace) -> None:
    height, _, width = job["latent"].partition("x")
    size = int(height), int(width or height)
    if job["part"] in ONE_GPU:
        one_gpu(job, args, *size)
    elif job["part"] == "distrifuser":
        reference(job, args, size[0])
    else:
        bundle(job, args, *size)


def one_gpu(job: dict[str, Any], args: argparse.Namespace, height: int, width: int) -> None:
    import gpu_parts
    import torch

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"

    def say(**figure: Any) -> None:
        record(args.out, job, {**figure, "device": where, "torch": torch.__version__})

    turn = gpu_parts.Turn(args.work / "turn")
    if job["part"] == "single":
        gpu_parts.single(say, turn, job["model"], height, width, tuple(args.modes.split(",")), images(job))
        return

    def predicting(**figure: Any) -> None:
        if "sent_mb" in figure and "ms" in figure:
            transfer = figure["sent_mb"] / args.bandwidth
            figure["transfer_ms"] = round(transfer, 3)
            exact = figure["figure"].startswith("exact")
            figure["predicted_ms"] = figure["ms"] + transfer if exact else max(figure["ms"], transfer)
        say(**figure)

    predict = job["part"] == "predict"
    gpu_parts.free(
        predicting if predict else say, turn, job["model"], height, width, job["ranks"], job["ranks"] // 2,
        ("displaced",) if job["part"] == "passes" else tuple(args.phases.split(",")),
        _backend_options(args),
        args.work / f"free-{os.getpid()}", job["part"] == "free" and not args.no_check, args.profile,
        _optimise(job), args.segments, images(job), job["groupnorm"], **_numbers(job),
    )  # fmt: skip


def _numbers(job: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a conversion that change numbers."""
    return {
        "drift_limit": DRIFT_LIMIT if job["drift_limit"] is None else job["drift_limit"],
        "reuse": job.get("reuse", "none"), "quantise": job.get("quantise", "none"),
        "transfer_bits": job.get("transfer_bits"),
    }  # fmt: skip


def images(job: dict[str, Any]) -> int:
    """Return the batch of a call: two with guidance, whether or not each half has ranks of its own."""
    return 1 if job["guidance"] == "none" else 2


def _backend_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"max_autotune": args.max_autotune, "attention": args.attention,
            "autotune": tuple(args.autotune.split(",")), "inductor_config": json.loads(args.inductor),
            "workers": args.workers}  # fmt: skip


def _optimise(job: dict[str, Any]) -> str:
    return "" if job["optimise"] == "none" else str(job["optimise"])


def bundle(job: dict[str, Any], args: argparse.Namespace, height: int, width: int) -> None:
    """Convert unless the bundle exists, and time it on all ranks by ``districompile bench``."""
    import gpu_check
    import gpu_parts
    import torch

    import districompile as dc
    from districompile.backends.inductor.backend import InductorBackend

    turn = gpu_parts.Turn(args.work / "turn")
    name = f"{job['model'] if len(job['model']) < 9 else 'custom'}-{height}x{width}-{job['ranks']}-{args.warmup_steps}"
    name += "" if job["guidance"] == "none" else f"-{job['guidance']}"
    name += f"-{job['groupnorm']}" + ("" if job["drift_limit"] is None else f"-{job['drift_limit']:g}")
    reuse, bits = job.get("reuse", "none"), job.get("transfer_bits")
    name += ("" if reuse == "none" else f"-{reuse.replace(':', '-')}") + ("" if bits is None else f"-{bits}bit")
    name += f"-{job['quantise'].replace(':', '-')}" if "quantise" in job else ""
    folder = args.work / (
        name + ("-autotuned" if args.max_autotune else "") + f"-{args.attention}-{args.autotune.replace(',', '+')}"
    )
    if not (folder / "manifest.json").exists():
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        module = gpu_parts.network(job["model"], device)
        began = time.perf_counter()
        program = dc.convert(
            module, kwargs=gpu_parts.example(module, device, height, width, images(job)), ranks=job["ranks"],
            cfg="split" if job["guidance"] == "split" else "none",
            groupnorm=job["groupnorm"], warmup_steps=args.warmup_steps,
            optimise=_optimise(job), segments=args.segments,
            faster=InductorBackend(**_backend_options(args)).faster_in_8_bits, **_numbers(job),
        )  # fmt: skip
        converted = time.perf_counter()
        program.save(folder, backend=InductorBackend(**_backend_options(args)))
        figure = {"figure": "convert", "cut_s": round(converted - began, 1),
                  "build_s": round(time.perf_counter() - converted, 1),
                  "packages": len(list((folder / "engines").glob("*.pt2")))}  # fmt: skip
        record(args.out, job, figure)
        if not args.no_check:
            eager = folder.with_name(folder.name + "-eager")
            program.save(eager, backend="eager")
            with turn.alone():
                found = gpu_check.compare(folder, eager, job["ranks"], module, args.work)
            record(args.out, job, {"figure": "relative errors", **found})
            shutil.rmtree(eager)
        del module, program
        gc.collect()
        torch.cuda.empty_cache() if device.type == "cuda" else None
    if job["part"] == "convert":
        return
    command = [sys.executable, "-m", "districompile", "bench", str(folder), "--json"]
    if job["part"] == "steps":
        command += ["--steps", str(args.steps)]
    if args.profile is not None:
        command += ["--kernels", f"{args.profile}-{folder.name}.txt", "--trace", f"{args.profile}-{folder.name}.json"]
    with turn.alone():
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    for figure in json.loads(finished.stdout)["figures"]:
        record(args.out, job, figure)


def reference(job: dict[str, Any], args: argparse.Namespace, latent: int) -> None:
    """distrifuser on the same GPUs, from a checkout of the user's; patch parallelism, CUDA graphs, no guidance."""
    if args.distrifuser is None:
        raise SystemExit("distrifuser is not part of this repository: give --distrifuser CHECKOUT")
    script = TOOLS / "bench_distrifuser.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job["ranks"]),
               str(script), str(args.distrifuser), str(latent), job["guidance"]]  # fmt: skip
    module_path = [str(args.distrifuser_site)] if args.distrifuser_site else []
    path = os.pathsep.join([*module_path, *filter(None, [os.environ.get("PYTHONPATH")])])
    import gpu_parts

    with gpu_parts.Turn(args.work / "turn").alone():
        found = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
        )
    for line in found.stdout.splitlines():
        if line.startswith("{"):
            record(args.out, job, json.loads(line))


if __name__ == "__main__":
    main()
