# SPDX-License-Identifier: Apache-2.0
"""Compile packages in worker processes. Compilation is mostly single-threaded Python and a C++ compiler.

A worker is ``python -m districompile.backends.inductor.workers``. It reads one JSON line for each job on standard input
and answers with one line each. A worker is not a fork or spawn of the caller, so that a script without a main guard is
not run again in it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import IO

import torch

from districompile.backends.inductor.package import CompileJob, compile_package
from districompile.backends.inductor.pytorch_private import set_compile_threads
from districompile.errors import BackendError

_GPU_MEMORY = 2 * 2**30
"""Bytes on a GPU for each worker: a CUDA context, and the tensors with which Triton times a kernel."""


def default_workers(kind: str, max_autotune: bool) -> int:
    """Choose the number of workers: one for each core on a CPU; on GPUs fewer, as each takes GPU memory.

    With ``max_autotune`` there are at most two on a GPU, as measurements disturb each other.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if kind != "cuda":
        return cores
    if max_autotune:
        return max(1, min(cores // 2, 2))
    # A worker takes half a minute of a core to start, and compiles kernels in threads: more of them are no faster
    count = max(1, len(spare_gpus(kind)))
    free = torch.cuda.mem_get_info()[0] * count if torch.cuda.is_available() else 8 * _GPU_MEMORY
    return max(1, min(cores // 2, free // _GPU_MEMORY, 8))


def equal_gpus() -> list[int]:
    """Return the GPUs of the kind of the present one, which compile the same: the present one first."""
    present = torch.cuda.current_device()
    name = torch.cuda.get_device_name(present)
    others = [i for i in range(torch.cuda.device_count()) if i != present and torch.cuda.get_device_name(i) == name]
    return [present, *others]


def spare_gpus(kind: str) -> list[int]:
    """Return the GPUs on which workers time kernels while this process times some on the present one."""
    return equal_gpus()[1:] if kind == "cuda" and torch.cuda.is_available() else []


def seen_by(worker: int) -> dict[str, str]:
    """Return the environment that gives each worker one GPU, another than the present one if there is another."""
    if not torch.cuda.is_available():
        return {}
    gpus = equal_gpus()
    gpus = gpus[1:] or gpus
    gpu = gpus[worker % len(gpus)]
    visible = [v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v.strip()]
    return {"CUDA_VISIBLE_DEVICES": visible[gpu] if gpu < len(visible) else str(gpu)}


class WorkerPool:
    """A pool of up to ``workers`` processes that start when there is work.

    Results are files. Errors are :class:`BackendError`.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._jobs: queue.Queue[tuple[CompileJob, Path, Future[None]] | None] = queue.Queue()
        self._threads: list[threading.Thread] = []
        self._processes: list[subprocess.Popen[str]] = []
        self._closed = False

    def submit(self, jobs: Iterable[tuple[CompileJob, Path]]) -> list[Future[None]]:
        """Queue the compilation of each job into its path. A future holds None, or the error."""
        futures = []
        for job, path in jobs:
            future: Future[None] = Future()
            self._jobs.put((job, path, future))
            futures.append(future)
            if len(self._threads) < self._workers:
                thread = threading.Thread(target=self._serve, args=(len(self._threads),), daemon=True)
                self._threads.append(thread)
                thread.start()
        return futures

    def close(self) -> None:
        """End the workers. Jobs that are not done fail."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for process in self._processes:
            process.kill()
        for thread in self._threads:
            thread.join(10)

    def _serve(self, number: int) -> None:
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            process: subprocess.Popen[str] | None = None
            while (item := self._jobs.get()) is not None:
                job, path, future = item
                if self._closed:
                    future.set_exception(BackendError("the compilation was stopped"))
                    continue
                try:
                    if process is None or process.poll() is not None:
                        process = self._start(log, number)
                    _ask(process, job, path, log)
                    future.set_result(None)
                except Exception as e:
                    future.set_exception(e)
            if process is not None:
                process.kill()
                process.wait()

    def _start(self, log: IO[str], number: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", __name__, str(max(1, (os.cpu_count() or 1) // self._workers))]
        # The worker must find this very copy of districompile, installed or not
        paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **seen_by(number)}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
        self._processes.append(process)
        return process


def _ask(process: subprocess.Popen[str], job: CompileJob, path: Path, log: IO[str]) -> None:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps([job.to_json(), str(path)]) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except OSError:
        answer = ""
    if not answer:
        process.wait()
        log.seek(0)
        lines = [line.strip() for line in log.read().splitlines() if line.strip()]
        raise BackendError(f"a compiler process died with {process.returncode}: {lines[-1] if lines else 'no output'}")
    reason = json.loads(answer)
    if reason is not None:
        raise BackendError(reason)


def compile_here(job: CompileJob, path: Path) -> None:
    """Compile ``job`` in this process. Raises :class:`BackendError`."""
    reason = _attempt(job, str(path))
    if reason is not None:
        raise BackendError(reason)


def _attempt(job: CompileJob, path: str) -> str | None:
    """Compile ``job`` into ``path``; return the reason if that fails, else None."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            compile_package(job, path)
    except Exception as e:  # PyTorch raises whatever the lowering of an operator or the C++ compiler raised
        while e.__cause__ is not None and isinstance(e.__cause__, Exception):
            e = e.__cause__
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        # The first error of a C++ compiler, which follows its command line
        first = next((i for i, line in enumerate(lines) if " error: " in line), 0)
        return f"{type(e).__name__}: {' '.join(lines[first:])[:400]}"
    return None


def _worker() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the output of compilers must not mix with the answers
    set_compile_threads(int(sys.argv[1]))
    torch.set_num_threads(1)
    for line in sys.stdin:
        job, path = json.loads(line)
        answers.write(json.dumps(_attempt(CompileJob.from_json(job), path)) + "\n")
        answers.flush()


if __name__ == "__main__":
    _worker()
