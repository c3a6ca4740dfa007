# SPDX-License-Identifier: Apache-2.0
"""Compile many networks by the inductor backend, run them on a device, and write ``docs/gpu-coverage.md``.

Every family of ``tools/coverage.py`` is converted for two and three ranks in float32 and float16, compiled, and run
with all ranks in one process. As many processes run one network after the other as there are cores. One that a network
ends, or in which one fails, is replaced by another.

    python tools/gpu_coverage.py                             all that is not done yet, on the GPUs of this machine
    python tools/gpu_coverage.py --device cpu --only sdxl,vae_kl
    python tools/gpu_coverage.py --docs                      write the page of what is in the file, and run nothing
    python tools/gpu_coverage.py --again                     run what failed once more

Results are lines of JSON in ``--file``. What is there for this device and this PyTorch is not run again, so that a run
can be stopped at any time. The exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from gpu_coverage_page import page  # noqa: E402

from tests.families.measure import load_families  # noqa: E402

PAGE = ROOT / "docs" / "gpu-coverage.md"
_JOBS = 12  # of one process, whose memory grows
Key = tuple[str, int, str, str, str]  # family, ranks, dtype, device, PyTorch


def main() -> int:
    """Run what is asked for and not done; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=kind, help="[default: cuda if there is a GPU]")
    parser.add_argument("--ranks", default="2,3", help="numbers of ranks [default: %(default)s]")
    parser.add_argument("--dtypes", default="float32,float16", help="[default: %(default)s]")
    parser.add_argument("--only", default="", help="names of families, separated by commas [default: all]")
    parser.add_argument("--jobs", type=int, default=_cores(), help="families at once [default: one a core]")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one family [default: %(default)s]")
    parser.add_argument("--file", type=Path, default=Path("gpu-coverage.jsonl"), help="[default: %(default)s]")
    parser.add_argument("--again", action="store_true", help="run what failed once more")
    parser.add_argument("--docs", action="store_true", help=f"write {PAGE.relative_to(ROOT)}, and run nothing")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page [default: %(default)s]")
    options = parser.parse_args()
    if options.docs:
        _write(options.out, page(read(options.file), list(load_families())))
        return 0
    known = load_families()
    chosen = options.only.split(",") if options.only else list(known)
    if unknown := set(chosen) - set(known):
        parser.error(f"there is no family {min(unknown)!r}, or its package is not installed")
    wanted = [(int(r), d) for r in options.ranks.split(",") for d in options.dtypes.split(",")]
    device, release = device_name(options.device), torch.__version__
    done = {key_of(line) for line in read(options.file) if line["error"] is None or not options.again}
    left = {name: [w for w in wanted if (name, *w, device, release) not in done] for name in chosen}
    return _run({name: runs for name, runs in left.items() if runs}, options)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(kind: str) -> str:
    """Name the device that results are of: a GPU, or the vector instructions of a CPU."""
    return torch.cuda.get_device_name() if kind == "cuda" else f"CPU with {torch.backends.cpu.get_cpu_capability()}"


def key_of(line: Mapping[str, Any]) -> Key:
    """Return what a result is of. A later line of the same key replaces an earlier one."""
    return str(line["family"]), int(line["ranks"]), str(line["dtype"]), str(line["device"]), str(line["torch"])


def read(file: Path) -> list[dict[str, Any]]:
    """Read results, of which the last of each key counts. A line that was cut off by a stop is left out."""
    found: dict[Key, dict[str, Any]] = {}
    for text in file.read_text().splitlines() if file.exists() else []:
        try:
            line = json.loads(text)
            found[key_of(line)] = line
        except (ValueError, KeyError, TypeError):
            continue
    return list(found.values())


def _run(left: Mapping[str, Sequence[tuple[int, str]]], options: argparse.Namespace) -> int:
    waiting: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
    for number, name in enumerate(left):
        waiting.put((number, name))
    failed: list[str] = []
    writing = threading.Lock()
    count = torch.cuda.device_count() if options.device == "cuda" else 0

    def serve() -> None:
        with tempfile.TemporaryFile("w+", errors="replace") as log, contextlib.closing(Worker(log)) as worker:
            while True:
                try:
                    number, name = waiting.get_nowait()
                except queue.Empty:
                    return
                run(number, name, worker)

    def run(number: int, name: str, worker: Worker) -> None:
        started = time.perf_counter()
        where = f"cuda:{number % count}" if count else "cpu"
        lines = []
        for line in _family(name, left[name], where, options, worker):
            lines.append(line)
            with writing, options.file.open("a") as file:
                file.write(json.dumps(line) + "\n")
        wrong = [line for line in lines if line["error"] is not None]
        with writing:
            failed.extend([name] * bool(wrong))
            print(_summary(name, lines, wrong, time.perf_counter() - started), flush=True)

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(min(options.jobs, len(left)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{len(left)} families, {len(failed)} with a failure; the page: python tools/gpu_coverage.py --docs")
    return 1 if failed else 0


def _summary(name: str, lines: Sequence[Mapping[str, Any]], wrong: Sequence[Mapping[str, Any]], seconds: float) -> str:
    if wrong:
        return f"{name}: FAILED on {wrong[0]['ranks']} ranks in {wrong[0]['dtype']}: {wrong[0]['error']}"
    worst = {key: max((line[key] for line in lines), default=0.0) for key in ("exact", "displaced")}
    return f"{name}: {len(lines)} runs, exact {worst['exact']:.1e}, displaced {worst['displaced']:.1e}, {seconds:.0f} s"


def _family(
    name: str, runs: Sequence[tuple[int, str]], where: str, options: argparse.Namespace, worker: Worker
) -> Iterable[dict[str, Any]]:
    """Run one family. Yield a result for each run, also where the process dies."""
    common = {"family": name, "device": device_name(options.device), "torch": torch.__version__}
    for ranks, dtype in runs:
        try:
            found = worker.ask({"family": name, "ranks": ranks, "dtype": dtype, "where": where}, options.timeout)
        except Died as e:
            found = {"group": "", "size": [], "error": str(e)}
        yield {**common, "ranks": ranks, "dtype": dtype, **found}


class Died(Exception):
    """A process gave no answer."""


class Worker:
    """A process that runs jobs one after the other, as its imports take long.

    It is started anew behind a job that failed: an error of a GPU stays with its process. ``log``: what processes say.
    """

    def __init__(self, log: IO[str]) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._log = log
        self._jobs = 0

    def ask(self, job: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Return the result of a job. Raises :class:`Died` if the process ends, or takes more than ``timeout`` s."""
        if self._process is None:
            command = [sys.executable, str(ROOT / "tools" / "gpu_coverage_run.py")]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log, text=True)
            self._jobs = 0
        process, late = self._process, threading.Event()
        assert process.stdin is not None and process.stdout is not None

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(timeout, end)
        timer.start()
        try:
            with contextlib.suppress(OSError):  # of a process that has died: there is no answer then
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
            said = process.stdout.readline()
        finally:
            timer.cancel()
        self._jobs += 1
        found: dict[str, Any] | None = json.loads(said) if said else None
        if found is None or found["error"] is not None or self._jobs == _JOBS:
            self.close()
        if found is not None:
            return found
        self._log.seek(0)
        last = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        code = f"more than {timeout:.0f} s" if late.is_set() else process.returncode
        raise Died(f"the process ended with {code}: {last[-1][:200] if last else 'no output'}")

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
