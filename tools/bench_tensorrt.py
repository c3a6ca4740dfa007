# SPDX-License-Identifier: Apache-2.0
"""Run TensorRT engines on GPUs, beside inductor: errors against eager PyTorch and times, one JSON line for a figure.

    python tools/bench_tensorrt.py --out FILE [--networks demo,sd15,sdxl,vae,large,full] [--ranks 1,2]
    python tools/bench_tensorrt.py --out FILE --docs      write the table of docs/tensorrt.md from the lines of FILE

For each network, dtype, number of ranks and backend, in a process of its own:

  errors   convert, then an exact and two displaced calls, all ranks in this process on one GPU, against the network
           itself (exact) and against the same program of the backend eager (displaced)
  step     the engines of one rank without transfers, as one CUDA graph, in both phases
  gpus     ``districompile bench`` on as many GPUs as there are ranks, once for each of ``--transports``; left out where
           there are fewer GPUs

``full`` is SDXL's UNet at its real size and 1024x1024 pixels, the displaced phase alone: its exact phase has over a
hundred engines. The networks ``sd15``, ``sdxl`` and ``vae`` are the small ones of the tests. Weights are random, but
for the demo's. What is in FILE is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
sys.path.insert(0, str(ROOT))  # where it is not installed
NETWORKS = {"demo": "demo UNet", "sd15": "small SD 1.5", "sdxl": "small SDXL", "vae": "small VAE decoder",
            "large": "small SD 1.5, large values", "full": "SDXL, 1024 px"}  # fmt: skip
LIMITS = {"float32": 1e-4, "float16": 5e-3}  # of errors against eager PyTorch
PARTS = ("errors", "step", "gpus")
BEGIN, END = "<!-- begin: tools/bench_tensorrt.py -->", "<!-- end: tools/bench_tensorrt.py -->"
Line = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are added to this file")
    parser.add_argument("--docs", action="store_true", help="write the table, and run nothing")
    parser.add_argument("--networks", default="demo,sd15,sdxl,vae,large,full")
    parser.add_argument("--dtypes", default="float32,float16")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--backends", default="tensorrt,inductor")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the backend tensorrt")
    parser.add_argument("--transports", default="peer,nccl")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, default=Path("bench-work"), help="bundles, kept")
    parser.add_argument("--after", type=Path, help="time no step before this file is there: others may still compile")
    parser.add_argument("--profile", type=Path, help="tables of the kernels of steps are written to FILE-...")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one job")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.docs:
        write_table(ROOT / "docs" / "tensorrt.md", read_lines(args.out))
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    if args.one:
        run_job(json.loads(args.one), args)
        return 0
    return drive(args)


def jobs(args: argparse.Namespace) -> list[Line]:
    """List the jobs; figures to be compared follow each other."""
    found: list[Line] = []
    for name in args.networks.split(","):
        for dtype in ("float16",) if name == "full" else args.dtypes.split(","):
            for ranks in (2,) if name == "full" else map(int, args.ranks.split(",")):
                for part in ("step",) if name == "full" else args.parts.split(","):
                    for backend in args.backends.split(","):
                        job = {"network": name, "dtype": dtype, "ranks": ranks, "part": part, "backend": backend}
                        if part != "gpus":
                            found.append(job)
                        elif ranks > 1:
                            found += [{**job, "transport": t} for t in args.transports.split(",")]
    return found


def drive(args: argparse.Namespace) -> int:
    """Run each job that has no line yet. Return 1 if one failed or an error is above its limit."""
    done = {json.dumps(line["job"], sort_keys=True) for line in read_lines(args.out) if line["figure"] == "done"}
    bad = 0
    for job in jobs(args):
        if json.dumps(job, sort_keys=True) in done:
            continue
        print(" ".join(str(v) for v in job.values()), "...", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--one", json.dumps(job)]
        log = args.work / ("-".join(str(v) for v in job.values()) + ".log")
        try:
            with log.open("w") as file:
                finished = subprocess.run(command, timeout=args.timeout, stderr=file)
            reason = "" if finished.returncode == 0 else (log.read_text().strip().splitlines() or ["no reason"])[-1]
        except subprocess.TimeoutExpired:
            reason = f"took over {args.timeout:.0f} s"
        record(args.out, job, {"figure": "failed", "reason": reason} if reason else {"figure": "done"})
        bad += bool(reason)
    wrong = [line for line in read_lines(args.out) if line["figure"] == "errors" and not within(line)]
    for line in wrong:
        print("above the limit:", json.dumps(line), file=sys.stderr)
    return int(bad + len(wrong) > 0)


def within(line: Line) -> bool:
    """Say whether the errors of a line are below the limit of its dtype; a NaN is not."""
    limit = LIMITS[line["job"]["dtype"]]
    return all(line[k] <= limit for k in ("exact", "displaced") if line.get(k) is not None)


def record(out: Path, job: Line, figure: Line) -> None:
    """Write one line to the file and to standard output."""
    line = json.dumps({**figure, "job": job})
    with out.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def read_lines(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_job(job: Line, args: argparse.Namespace) -> None:
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # PyTorch's convolutions have it
    device = torch.device(args.device)
    options = args.option if job["backend"] == "tensorrt" else []
    made = backend_of(job["backend"], options)
    described = dict(made.describe() or {}) if job["backend"] == "tensorrt" else {"version": torch.__version__}
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    common = {"device": where, "flavour": described.get("flavour"), "version": described["version"]}
    common |= {"options": options} if options else {}

    def say(**figure: Any) -> None:
        record(args.out, job, {**figure, **common})

    {"errors": errors, "step": step, "gpus": gpus}[job["part"]](job, args, device, made, say)


def backend_of(name: str, options: Sequence[str] = ()) -> Any:
    from districompile.backends.registry import get_backend

    return get_backend(name, **{k: int(v) if v.isdigit() else v for k, v in (o.split("=", 1) for o in options)})


def network_of(job: Line, device: Any) -> tuple[Any, dict[str, Any]]:
    """Make the network and the arguments of one call, in the dtype of the job."""
    import torch

    dtype, name = getattr(torch, job["dtype"]), job["network"]
    sys.path.insert(0, str(TOOLS))
    import gpu_parts

    if name == "full":
        module = gpu_parts.network("sdxl", device, dtype)
        return module, gpu_parts.example(module, device, 128, 128)
    if name == "demo":
        from diffusers import UNet2DConditionModel

        from districompile.models.sources import DEMO

        module = UNet2DConditionModel.from_pretrained(DEMO / "unet").to(device, dtype).eval()
        return module, gpu_parts.example(module, device, 64, 64)
    from tests.small_models import MODELS

    small = {"vae": "vae_decoder", "large": "sd15"}
    module, kwargs = MODELS[small.get(name, str(name))](1, 16, 16)
    if name == "large":
        with torch.no_grad():
            module.get_parameter("conv_in.weight").mul_(3000.0)

    def cast(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: cast(v) for k, v in value.items()}
        return value.to(device, dtype if value.is_floating_point() and value.ndim else None)

    return module.to(device, dtype), {k: cast(v) for k, v in kwargs.items()}


def folder_of(job: Line, args: argparse.Namespace, backend: str) -> Path:
    return Path(args.work, f"{job['network']}-{job['dtype']}-{job['ranks']}-{backend}")


def converted(job: Line, args: argparse.Namespace, device: Any) -> tuple[Any, Any, dict[str, Any], float]:
    import districompile as dc

    module, kwargs = network_of(job, device)
    rows = {"z" if job["network"] == "vae" else "sample": 2}
    began = time.perf_counter()
    program = dc.convert(module, kwargs=kwargs, ranks=job["ranks"], rows=rows, drift_limit=0.0)
    return program, module, kwargs, time.perf_counter() - began


def saved(job: Line, args: argparse.Namespace, program: Any, made: Any) -> tuple[Path, Line]:
    """Write the bundle of a program unless it is there, and return its folder with the facts of the build."""
    folder = folder_of(job, args, made.name)
    if (folder / "manifest.json").exists():
        return folder, {}
    began = time.perf_counter()
    program.save(folder, backend=made)
    engines = list((folder / "engines").glob(f"*{made.suffix}"))
    size = round(sum(e.stat().st_size for e in engines) / 1e6, 1)
    return folder, {"build_s": round(time.perf_counter() - began, 1), "engines": len(engines), "engines_mb": size}


def errors(job: Line, args: argparse.Namespace, device: Any, made: Any, say: Any) -> None:
    """Compare a bundle, all of whose ranks are in this process, with the network and with the backend eager."""
    import torch

    import districompile as dc
    from districompile.sharding.compare import relative_error

    program, module, kwargs, seconds = converted(job, args, device)
    folder, built = saved(job, args, program, made)
    eager, _ = saved(job, args, program, backend_of("eager"))
    moving = "timestep" in kwargs
    phases = ("exact", "displaced", "displaced") if moving else ("exact",)
    with torch.no_grad():
        want = _tensor(module(**kwargs)).cpu()
    outputs: dict[str, list[Any]] = {}
    for which, path, chosen in (("ours", folder, made), ("eager", eager, None)):
        unet = dc.load(path, lockstep=True, device=device.type, backend=chosen)
        outputs[which] = []
        for i, phase in enumerate(phases):
            unet.phase = phase  # type: ignore[assignment]
            moved = dict(kwargs)
            if moving and i:  # the timestep as well: another call with the same one would begin an image
                moved |= {"sample": kwargs["sample"] * (1 + 0.05 * i), "timestep": kwargs["timestep"] - i}
            outputs[which].append(_tensor(unet(**moved)).cpu())
        del unet
    pairs = list(zip(outputs["ours"], outputs["eager"], strict=True))
    displaced = max((relative_error(a, b) for a, b in pairs[1:]), default=None)
    say(figure="errors", exact=relative_error(pairs[0][0], want), displaced=displaced, convert_s=round(seconds, 1),
        limit=LIMITS[job["dtype"]], **built)  # fmt: skip


def _tensor(output: Any) -> Any:
    import torch

    return output if isinstance(output, torch.Tensor) else output[0]


def step(job: Line, args: argparse.Namespace, device: Any, made: Any, say: Any) -> None:
    """Time the engines of the middle rank without transfers, as one CUDA graph."""
    import functools

    import gpu_parts

    from districompile.bundle.weights import WeightFile
    from districompile.cost.one_rank import OneRank
    from districompile.cost.timing import captured, median_ms

    program, _, kwargs, _ = converted(job, args, device)
    leaves = {k: v for k, v in kwargs.items() if not isinstance(v, dict)}
    leaves |= {f"added_cond_kwargs.{k}": v for k, v in kwargs.get("added_cond_kwargs", {}).items()}
    inputs = {i.value: leaves[i.path] for i in program.plan.inputs}
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        path = Path(scratch, "weights.safetensors")
        WeightFile.write(path, [(n, s, functools.partial(program.weight, n)) for n, s in program.plan.weights.items()])
        weights = WeightFile.open(path)
        for phase in ("displaced",) if job["network"] == "full" else ("displaced", "exact"):
            began = time.perf_counter()
            folder = Path(scratch, phase)
            one = OneRank(program, phase, job["ranks"] // 2, made, device, folder, weights)
            built = round(time.perf_counter() - began, 1)
            worst = max(one.errors(inputs).values())
            while args.after is not None and not args.after.exists():
                time.sleep(0.2)
            ms = median_ms(captured(functools.partial(one.step, inputs)))
            say(figure=f"{phase} step, transfers free", ms=round(ms, 4), segments=len(one.engines), build_s=built,
                segment_error=worst, peak_gib=gpu_parts.peak_gib())  # fmt: skip
            if args.profile is not None:
                name = f"{args.profile.name}-{job['network']}-{job['dtype']}-{job['ranks']}-{phase}-{made.name}.txt"
                gpu_parts.write_kernels(functools.partial(one.step, inputs), args.profile.with_name(name))
            del one


def gpus(job: Line, args: argparse.Namespace, device: Any, made: Any, say: Any) -> None:
    """Time the bundle on as many GPUs as it has ranks, by ``districompile bench``."""
    import torch

    if device.type == "cuda" and torch.cuda.device_count() < job["ranks"]:
        say(figure="left out", reason=f"{job['ranks']} GPUs are needed, {torch.cuda.device_count()} are here")
        return
    folder = folder_of(job, args, made.name)
    if not (folder / "manifest.json").exists():
        program, *_ = converted(job, args, device)
        saved(job, args, program, made)
    command = [sys.executable, "-m", "districompile", "bench", str(folder), "--transport", job["transport"], "--json"]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    for figure in json.loads(finished.stdout)["figures"]:
        say(**{k: v for k, v in figure.items() if k != "device"})


# The table


def write_table(page: Path, lines: Sequence[Line]) -> None:
    """Put the table of ``lines`` between the marks of ``page``."""
    text = page.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n\n{table(lines)}\n\n{END}{after}")


def table(lines: Sequence[Line]) -> str:
    """Return the table: errors of tensorrt, and its displaced step beside that of inductor on the same machine."""
    found = {
        (line["job"]["network"], line["job"]["dtype"], line["job"]["ranks"])
        for line in lines if line["job"]["backend"] == "tensorrt" and line["figure"] not in ("done", "failed")
    }  # fmt: skip
    keys = sorted(found, key=lambda key: (list(NETWORKS).index(key[0]), key[1:]))
    if not keys:
        return "No engine was executed so far."
    rows = ["| network | dtype | ranks | executed on | error, exact | error, displaced | displaced step | inductor |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for network, dtype, ranks in keys:
        own = [line for line in lines
               if [line["job"][k] for k in ("network", "dtype", "ranks")] == [network, dtype, ranks]]  # fmt: skip
        ours = [line for line in own if line["job"]["backend"] == "tensorrt"]
        other = [line for line in own if line["job"]["backend"] == "inductor"]
        first = next(line for line in ours if "version" in line)
        known = next((line for line in ours if line["figure"] == "errors"), {})
        segments = [line["segment_error"] for line in ours if "segment_error" in line]
        exact, displaced = known.get("exact"), known.get("displaced")
        if not known and segments:
            displaced = max(segments)
        rows.append(
            f"| {NETWORKS[network]} | {dtype} | {ranks} | {first['device']}, {first['flavour']} {first['version']} | "
            f"{_error(exact)} | {_error(displaced)} | {_times(ours)} | {_times(other)} |"
        )
    return "\n".join(rows)


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _times(lines: Iterable[Line]) -> str:
    """Return the times of displaced steps: without transfers, and with each transport."""
    found = {}
    for line in lines:
        if line["figure"] == "displaced step, transfers free" and "transport" not in line["job"]:
            found["no transfers"] = line["ms"]
        elif line["figure"] == "displaced step":
            found[line["job"]["transport"]] = line["ms"]
    return ", ".join(f"{ms:.2f} ms ({how})" for how, ms in found.items())


if __name__ == "__main__":
    sys.exit(main())
