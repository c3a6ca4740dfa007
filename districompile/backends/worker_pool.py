# SPDX-License-Identifier: Apache-2.0
"""Run jobs of backends in processes of their own, which compile beside each other.

A worker is ``python -m MODULE``, where ``MODULE`` calls :func:`answer_jobs`. It reads one JSON line for each job on
standard input and answers with one line each. It is not a fork or spawn of the caller, so that a script without a main
guard is not run again in it.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any

from districompile.errors import BackendError

Environment = Callable[[int], Mapping[str, str]]
"""What a worker has in its environment besides that of the caller, by its number."""


class WorkerPool:
    """A pool of up to ``workers`` processes of the module ``module``, which start when there is work.

    Jobs and results are values of JSON. Errors are :class:`BackendError`.
    """

    def __init__(
        self, module: str, workers: int, arguments: Sequence[str] = (), environment: Environment | None = None
    ) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._workers, self._environment = workers, environment
        self._jobs: queue.Queue[tuple[Any, Future[Any]] | None] = queue.Queue()
        self._threads: list[threading.Thread] = []
        self._processes: list[subprocess.Popen[str]] = []
        self._closed = False

    def submit(self, jobs: Iterable[Any]) -> list[Future[Any]]:
        """Queue jobs, and return a future for each."""
        futures = []
        for job in jobs:
            future: Future[Any] = Future()
            self._jobs.put((job, future))
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
                job, future = item
                if self._closed:
                    future.set_exception(BackendError("the compilation was stopped"))
                    continue
                try:
                    if process is None or process.poll() is not None:
                        process = self._start(log, number)
                    future.set_result(_ask(process, job, log))
                except Exception as e:
                    future.set_exception(e)
            if process is not None:
                process.kill()
                process.wait()

    def _start(self, log: IO[str], number: int) -> subprocess.Popen[str]:
        # The worker must find this very copy of districompile, installed or not
        paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        own = {} if self._environment is None else self._environment(number)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **own}
        process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
        self._processes.append(process)
        return process


def _ask(process: subprocess.Popen[str], job: Any, log: IO[str]) -> Any:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except OSError:
        answer = ""
    if not answer:
        process.wait()
        log.seek(0)
        lines = [line.strip() for line in log.read().splitlines() if line.strip()]
        raise BackendError(f"a compiler process died with {process.returncode}: {lines[-1] if lines else 'no output'}")
    result, reason = json.loads(answer)
    if reason is not None:
        raise BackendError(reason)
    return result


def answer_jobs(do: Callable[[Any], Any]) -> None:
    """Do the jobs of standard input, as a worker. ``do`` raises :class:`BackendError` if a job fails."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the output of compilers must not mix with the answers
    for line in sys.stdin:
        answer: tuple[Any, str | None]
        try:
            answer = do(json.loads(line)), None
        except BackendError as e:
            answer = None, str(e)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
