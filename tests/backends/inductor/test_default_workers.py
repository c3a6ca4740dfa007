# SPDX-License-Identifier: Apache-2.0
"""How many processes compile, and on which GPUs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from districompile.backends.inductor import InductorBackend, backend, workers
from districompile.backends.inductor.compiler import way_out
from districompile.backends.inductor.package import CompileJob
from districompile.cuda.equal_gpus import equal_gpus, seen_alone

GIB = 2**30


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pretend that there are GPUs of these names, the second of which is in use."""
    names = ["H200", "H200", "T4", "H200"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i=1: names[i])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (16 * GIB, 24 * GIB))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(32)), raising=False)
    return names


def test_workers_follow_cores_and_memory(gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert workers.default_workers("cuda", max_autotune=False) == 8
    assert workers.default_workers("cuda", max_autotune=True) == 2
    assert workers.default_workers("cpu", max_autotune=False) == 32
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5 * GIB, 24 * GIB))
    assert workers.default_workers("cuda", max_autotune=False) == 5  # on two other GPUs
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (GIB, 24 * GIB))
    gpus.clear()
    gpus += ["T4", "T4"]
    assert workers.default_workers("cuda", max_autotune=False) == 1


def test_workers_share_equal_gpus(gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert equal_gpus() == [1, 0, 3] and workers.spare_gpus("cuda") == [0, 3]
    assert [seen_alone(i) for i in (0, 3)] == [{"CUDA_VISIBLE_DEVICES": n} for n in ("0", "3")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c,GPU-d")
    seen = workers.worker_pool(2)._environment
    assert seen is not None
    assert [seen(i) for i in range(3)] == [{"CUDA_VISIBLE_DEVICES": f"GPU-{n}"} for n in "ada"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i=1: f"kind {i}")
    alone = workers.worker_pool(2)._environment
    assert alone is not None
    assert alone(1) == {"CUDA_VISIBLE_DEVICES": "GPU-b"} and workers.spare_gpus("cuda") == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    none = workers.worker_pool(2)._environment
    assert none is not None and none(0) == {}


def test_workers_begin_before_there_are_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where cores are to spare, each gets a job that is soon done, and is kept for the packages."""
    given: list[object] = []

    class Pool:
        def submit(self, jobs: Iterable[object]) -> None:
            given.extend(jobs)

        def close(self) -> None:
            pass

    monkeypatch.setattr(backend, "worker_pool", lambda count: Pool())
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for count, jobs in ((2, 2), (4, 0), (1, 0)):  # as many as cores, and none at all
        given.clear()
        made = InductorBackend("cpu", workers=count, cache="none")
        made.begin()
        made.begin()
        assert len(given) == jobs == len({job for job, _ in given})  # equal ones would wait for each other
    job = workers.first_job("cpu", (("max_autotune", False),))
    assert CompileJob.from_json(job.to_json()) == job


@pytest.mark.slow
def test_the_first_job_of_a_worker(tmp_path: Path) -> None:
    workers.compile_here(workers.first_job("cpu", ()), tmp_path / "first.pt2")
    assert (tmp_path / "first.pt2").stat().st_size > 1000


def test_a_failed_compilation_has_a_way_out() -> None:
    assert "-o workers=2" in way_out("InductorError: CUDA out of memory. Tried to allocate 20 MiB", True)
    assert "autotune=linear,conv" in way_out("no kernel", True)
    assert way_out("no kernel", False) == ""
