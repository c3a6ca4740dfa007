"""Times on GPUs, one JSON line a figure: one GPU, the reference implementation, districompile. Random weights, fp16.

    python tools/bench_gpu.py --out FILE [--only single,free,...] [--latents 128,256,480] [--ranks 2]

Parts, each in processes of its own:

  single      one GPU: eager, and torch.compile (default and max-autotune), as CUDA graphs
  free        one rank's engines of both phases, transfers free (upper bound), checked against the eager oracle
  passes      the displaced step of free with no optimisation, with each alone, and with all
  predict     as free for ``--predict-ranks`` (4 and 8): a rank's compute at a quarter and an eighth of the rows, and
              the transfers at ``--bandwidth``
  convert     the bundle of ours, compared with the eager oracle and not timed: to time it later, nothing beside
  ours        the bundle on ``--ranks`` GPUs: exact and displaced step (``districompile bench``)
  steps       as ours, and ``--steps`` calls, the first ``--warmup-steps`` exact
  distrifuser the reference implementation on ``--ranks`` GPUs; needs --distrifuser CHECKOUT, and diffusers 0.27.2 in
              the folder --distrifuser-site

A part that is in FILE already is not run again, and none is started after ``--budget`` seconds: call again to go on.
With ``--together`` the parts of one size compile at the same time; figures are still taken one at a time.
Latents are squares (128) or HEIGHTxWIDTH (104x152). All figures of one file belong to one machine.
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
    parser.add_argument("--phases", default="steady,warmup")
    parser.add_argument("--modes", default="eager,default,max-autotune-no-cudagraphs", help="of single")
    parser.add_argument("--max-autotune", action="store_true", help="for our engines")
    parser.add_argument("--attention", default="auto", help="of our engines: auto, torch or flash3")
    parser.add_argument(
        "--timed", default="products,convolutions,kernels", help="what our engines decide by timing, or none"
    )
    parser.add_argument("--inductor", default="{}", help="further Inductor options for our engines, as JSON")
    parser.add_argument("--optimise", default="all", help="exact passes for speed, or all, or none")
    parser.add_argument("--segments", type=int, default=4)
    parser.add_argument("--workers", type=int, help="processes that compile our engines")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--warmup-steps", type=int, default=4)
    parser.add_argument("--groupnorm", default="forecast", help="of our displaced phase")
    parser.add_argument("--drift-limit", type=float, help="of ours; 0 measures no drift (else the default)")
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
    """What is to be run, in order: by model and size, so that figures to be compared are taken close together."""
    from districompile.unit import OPTIMISATIONS

    found: list[dict[str, Any]] = []
    models = [args.models] if args.models.startswith("{") else args.models.split(",")
    for model in models:
        for latent in args.latents.split(","):
            for part in args.only.split(","):
                base = {"part": part, "model": model, "latent": latent, "optimise": args.optimise,
                        "inductor": args.inductor, "max_autotune": args.max_autotune,
                        "attention": args.attention, "timed": args.timed, "guidance": args.guidance,
                        "groupnorm": args.groupnorm, "drift_limit": args.drift_limit}  # fmt: skip
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
    # On the last GPU, as others compile on the first
    shown = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus())))
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": shown.rpartition(",")[2]}
    return subprocess.Popen(command, env=env, start_new_session=True)


def end(process: subprocess.Popen[bytes]) -> int:
    """With what it started: that would go on, and have others wait for their turn."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


def record(out: Path, job: dict[str, Any], figure: dict[str, Any]) -> None:
    """One line to the file and to standard output."""
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
            exact = figure["figure"].startswith("warmup")
            figure["predicted_ms"] = figure["ms"] + transfer if exact else max(figure["ms"], transfer)
        say(**figure)

    predict = job["part"] == "predict"
    gpu_parts.free(
        predicting if predict else say, turn, job["model"], height, width, job["ranks"], job["ranks"] // 2,
        ("steady",) if job["part"] == "passes" else tuple(args.phases.split(",")),
        _backend_options(args),
        args.work / f"free-{os.getpid()}", job["part"] == "free" and not args.no_check, args.profile,
        _optimise(job), args.segments, images(job), job["groupnorm"],
    )  # fmt: skip


def images(job: dict[str, Any]) -> int:
    """The batch of a call: guidance takes two, whether or not each half has ranks of its own."""
    return 1 if job["guidance"] == "none" else 2


def _backend_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"max_autotune": args.max_autotune, "attention": args.attention,
            "timed": args.timed, "options": json.loads(args.inductor),
            "workers": args.workers}  # fmt: skip


def _optimise(job: dict[str, Any]) -> str:
    return "" if job["optimise"] == "none" else str(job["optimise"])


def bundle(job: dict[str, Any], args: argparse.Namespace, height: int, width: int) -> None:
    """Convert, if the bundle is not there, and let ``districompile bench`` time it on all ranks."""
    import gpu_check
    import gpu_parts
    import torch

    import districompile as dc
    from districompile.backends.inductor import InductorBackend
    from districompile.unit import DRIFT_LIMIT

    turn = gpu_parts.Turn(args.work / "turn")
    name = f"{job['model'] if len(job['model']) < 9 else 'custom'}-{height}x{width}-{job['ranks']}-{args.warmup_steps}"
    name += "" if job["guidance"] == "none" else f"-{job['guidance']}"
    name += f"-{job['groupnorm']}" + ("" if job["drift_limit"] is None else f"-{job['drift_limit']:g}")
    folder = args.work / (
        name + ("-autotuned" if args.max_autotune else "") + f"-{args.attention}-{args.timed.replace(',', '+')}"
    )
    if not (folder / "manifest.json").exists():
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        module = gpu_parts.network(job["model"], device)
        began = time.perf_counter()
        program = dc.convert(
            module, kwargs=gpu_parts.example(module, device, height, width, images(job)), ranks=job["ranks"],
            cfg="split" if job["guidance"] == "split" else "none",
            groupnorm=job["groupnorm"], warmup_steps=args.warmup_steps,
            drift_limit=DRIFT_LIMIT if job["drift_limit"] is None else job["drift_limit"],
            optimise=_optimise(job), segments=args.segments,
        )  # fmt: skip
        converted = time.perf_counter()
        program.save(folder, backend=InductorBackend(device.type, **_backend_options(args)))
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
    command = [sys.executable, "-m", "districompile", "bench", str(folder)]
    if job["part"] == "steps":
        command += ["--steps", str(args.steps)]
    if args.profile is not None:
        command += ["--kernels", f"{args.profile}-{folder.name}.txt", "--trace", f"{args.profile}-{folder.name}.json"]
    with turn.alone():
        timed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    for line in timed.stdout.splitlines():
        record(args.out, job, json.loads(line))


def reference(job: dict[str, Any], args: argparse.Namespace, latent: int) -> None:
    """distrifuser on the same GPUs, from a checkout of the user's; patch parallelism, CUDA graphs, no guidance."""
    if args.distrifuser is None:
        raise SystemExit("distrifuser is not part of this repository: give --distrifuser CHECKOUT")
    script = TOOLS / "bench_distrifuser.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job["ranks"]),
               str(script), str(args.distrifuser), str(latent), job["guidance"]]  # fmt: skip
    site = [str(args.distrifuser_site)] if args.distrifuser_site else []
    path = os.pathsep.join([*site, *filter(None, [os.environ.get("PYTHONPATH")])])
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
