# SPDX-License-Identifier: Apache-2.0
"""Jobs in processes of their own: results, errors, and processes that die."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from districompile.backends.worker_pool import WorkerPool
from districompile.errors import BackendError

WORKER = """
import os, sys, time
from districompile.backends.worker_pool import answer_jobs
from districompile.errors import BackendError

def do(job):
    print("noise on standard output")
    if job == "refuse":
        raise BackendError("no such thing")
    if job == "die":
        print("the last words", file=sys.stderr, flush=True)
        os._exit(3)
    if job == "sleep":
        time.sleep(60)
    return [job, os.environ.get("NUMBER"), sys.argv[1]]

answer_jobs(do)
"""


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerPool]:
    (tmp_path / "a_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    made = WorkerPool("a_worker", 1, ["argument"], lambda number: {"NUMBER": str(number)})
    yield made
    made.close()


def test_jobs_give_results_and_errors(pool: WorkerPool) -> None:
    first, refused, last = pool.submit(["one", "refuse", {"two": 2}])
    assert first.result(60) == ["one", "0", "argument"]
    with pytest.raises(BackendError, match="^no such thing$"):
        refused.result(60)
    assert last.result(60) == [{"two": 2}, "0", "argument"]


def test_a_process_that_dies_is_replaced(pool: WorkerPool) -> None:
    dead, after = pool.submit(["die", "one"])
    with pytest.raises(BackendError, match="a compiler process died with 3: the last words"):
        dead.result(60)
    assert after.result(60)[0] == "one"


def test_what_is_not_done_fails_at_the_end(pool: WorkerPool) -> None:
    running, waiting = pool.submit(["sleep", "one"])
    while not pool._processes:
        time.sleep(0.01)
    pool.close()
    for future in (running, waiting):
        with pytest.raises(BackendError):
            future.result(10)
