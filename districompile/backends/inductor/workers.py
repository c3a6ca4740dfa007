# SPDX-License-Identifier: Apache-2.0
"""Compile packages in this process, or in workers. Compilation is mostly single-threaded Python and a C++ compiler."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from pathlib import Path

import torch

from districompile.backends.inductor.package import CompileJob, ConfigValue, Operand, compile_package
from districompile.backends.inductor.pytorch_private import set_compile_threads
from districompile.backends.worker_pool import WorkerPool, answer_jobs
from districompile.cuda.equal_gpus import equal_gpus, seen_alone
from districompile.errors import BackendError
from districompile.ir.serialize import graph_to_json
from districompile.ir.spec import TensorSpec

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
    # A worker takes long to start, and compiles kernels in threads: with 24 of them nothing was faster on 32 cores
    count = max(1, len(spare_gpus(kind)))
    free = torch.cuda.mem_get_info()[0] * count if torch.cuda.is_available() else 8 * _GPU_MEMORY
    return max(1, min(cores // 2, free // _GPU_MEMORY, 8))


def spare_gpus(kind: str) -> list[int]:
    """Return the GPUs on which workers time kernels while this process times some on the present one."""
    return equal_gpus()[1:] if kind == "cuda" and torch.cuda.is_available() else []


def worker_pool(workers: int) -> WorkerPool:
    """Return a pool whose jobs are a :class:`CompileJob` as text, and the path of its package.

    Each worker sees one GPU, another than the present one if there is another.
    """
    gpus = equal_gpus() if torch.cuda.is_available() else []
    gpus = gpus[1:] or gpus
    threads = max(1, (os.cpu_count() or 1) // workers)
    return WorkerPool(__name__, workers, [str(threads)], lambda i: seen_alone(gpus[i % len(gpus)]) if gpus else {})


def first_job(device: str, options: tuple[tuple[str, ConfigValue], ...], worker: int = 0) -> CompileJob:
    """Return a job that is soon done. With it a worker imports Inductor, and makes what it keeps for all packages.

    Each ``worker`` has another size: Inductor locks what it compiles, and equal programs would wait for each other.
    """
    size = 16 * (worker + 1)
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    positive = graph.call_function(torch.ops.aten.relu.default, (x,))
    x.meta["val"] = positive.meta["val"] = torch.empty(size, device="meta")
    graph.output((positive,))
    one = (Operand(TensorSpec((size,), torch.float32), "contiguous"),)
    return CompileJob(graph_to_json(torch.fx.GraphModule({}, graph)), one, one, device, options)


def compile_here(job: CompileJob, path: Path) -> None:
    """Compile ``job`` in this process. Raises :class:`BackendError`."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            compile_package(job, str(path))
    except Exception as e:  # PyTorch raises whatever the lowering of an operator or the C++ compiler raised
        raise BackendError(_reason(e)) from e


def _reason(error: Exception) -> str:
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The first error of a C++ compiler, which follows its command line
    first = next((i for i, line in enumerate(lines) if " error: " in line), 0)
    return f"{type(error).__name__}: {' '.join(lines[first:])[:400]}"


def _worker() -> None:
    set_compile_threads(int(sys.argv[1]))
    torch.set_num_threads(1)
    answer_jobs(lambda given: compile_here(CompileJob.from_json(given[0]), Path(given[1])))


if __name__ == "__main__":
    _worker()
