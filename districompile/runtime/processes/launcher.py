# SPDX-License-Identifier: Apache-2.0
"""Start one process per rank on this machine, and end all of them when one fails.

The launcher does not import PyTorch, so that the ranks, which do, start at once. They meet at a store on the loopback
interface, which rank 0 opens at a socket from here. A failure ends the run within seconds, with one line that names the
rank which failed *first*.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from districompile.errors import LaunchError
from districompile.runtime.processes.logs import Logs
from districompile.runtime.processes.loopback import LOOPBACK, bind, loopback_interface
from districompile.runtime.processes.rank import Failure, Place, Result, fail_process, is_reported, run_rank

__all__ = ["fail_process", "is_reported", "launch", "threads_per_rank"]

_SHUTDOWN = 2.0  # seconds until processes that do not end are killed: a stopped one does not end
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # besides SIGINT, for which Python has a handler


def launch(
    worker: Callable[..., Any],
    args: Sequence[Any] = (),
    nproc: int = 1,
    *,
    log_dir: str | os.PathLike[str] | None = None,
) -> dict[int, Any]:
    """Run ``worker(*args)`` in ``nproc`` processes on this machine. Return the result of each, by rank.

    ``worker`` must be importable (a function of a module), and its arguments and results small and picklable. Each
    process has RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set for torch.distributed. With ``log_dir``,
    each rank's output also goes to files in a new folder there, and its lines are marked with the rank.

    Under an outer launcher (RANK and WORLD_SIZE are set, as by torchrun) the worker runs in this process.

    Raises :class:`LaunchError` that names the first rank that failed, and its error. The other ranks are ended. Ctrl-C
    ends all processes and raises ``KeyboardInterrupt``.
    """
    if nproc < 1:
        raise LaunchError(f"cannot start {nproc} processes: at least 1 is needed")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _join(worker, args, nproc)
    try:
        pickle.dumps((worker, tuple(args)))
    except (pickle.PicklingError, AttributeError, TypeError) as e:
        raise LaunchError(f"cannot send the work to processes ({e}): use a function at the top of a module") from e
    with _environment(nproc), _signals():
        try:
            return _run(worker, tuple(args), nproc, None if log_dir is None else Path(log_dir))
        except _Ended as e:
            raise LaunchError(f"ended by {signal.Signals(e.number).name}") from None
        except OSError as e:
            raise LaunchError(f"cannot start {nproc} processes: {e.strerror or e}") from e


def _run(worker: Callable[..., Any], args: tuple[Any, ...], nproc: int, log_dir: Path | None) -> dict[int, Any]:
    """Start the processes, and wait until all are done or one has failed. No process is left afterwards."""
    logs = None if log_dir is None else Logs(log_dir, nproc)
    processes = _Processes()
    try:
        with bind(LOOPBACK, 0) as listener:
            port = int(listener.getsockname()[1])
            for rank in range(nproc):
                place = Place(
                    _rank_environment(rank, nproc, port), os.getpid(), None if logs is None else logs.files(rank)
                )
                processes.start(worker, args, place, listener if rank == 0 else None)
        with contextlib.nullcontext() if logs is None else logs:
            failed = processes.wait()
        if failed is None:
            return {rank: result.value for rank, result in processes.results.items()}
    finally:
        with _undisturbed():
            processes.close()
    where = "" if logs is None else f"; logs are in {log_dir}"
    raise LaunchError(_error_line(*failed) + where)


class _Processes:
    """The processes of all ranks, and what they have reported."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._connections: list[multiprocessing.connection.Connection] = []
        self.results: dict[int, Result] = {}
        self._failures: dict[int, Failure] = {}

    def start(self, worker: Callable[..., Any], args: tuple[Any, ...], place: Place, listener: Any) -> None:
        """Start the process of the next rank. Ctrl-C is not delivered to it before it can end quietly."""
        own, other = self._context.Pipe()
        self._connections.append(own)
        process = self._context.Process(target=run_rank, args=(worker, args, place, other, listener))
        self._processes.append(process)
        with other, _held(signal.SIGINT):
            process.start()

    def wait(self) -> tuple[int, Failure | None, int] | None:
        """Wait until all ranks are done, or one has failed: return its number, its report if any, and its exit code."""
        running = dict(enumerate(self._processes))
        while running:
            open_ones = [self._connections[r] for r in running if not self._connections[r].closed]
            multiprocessing.connection.wait([*open_ones, *(p.sentinel for p in running.values())])
            ended = {r for r, p in running.items() if p.exitcode is not None}
            for rank in running:
                self._read(rank)
            if wrong := {r: running[r].exitcode or 0 for r in ended if running[r].exitcode}:
                rank = min(wrong, key=lambda r: self._time_of_failure(r, wrong[r]))
                return rank, self._failures.get(rank), wrong[rank]
            for rank in ended:
                self.results.setdefault(rank, Result(None))
                del running[rank]
            if len(self.results) == len(self._processes) and 0 in running:
                self._release()
        self.results = dict(sorted(self.results.items()))
        return None

    def _read(self, rank: int) -> None:
        connection = self._connections[rank]
        try:
            while not connection.closed and connection.poll():
                message = connection.recv()
                if isinstance(message, Result):
                    self.results[rank] = message
                else:
                    self._failures.setdefault(rank, message)
        except (EOFError, OSError):
            connection.close()

    def _release(self) -> None:
        """Let rank 0 end: the others need its store no more."""
        with contextlib.suppress(OSError):
            if not self._connections[0].closed:
                self._connections[0].send(None)

    def _time_of_failure(self, rank: int, code: int) -> float:
        """Return when a rank failed. One that was killed could not say so, and others follow it."""
        failure = self._failures.get(rank)
        if failure is not None:
            return failure.time
        return time.time() if code == -signal.SIGABRT else 0.0

    def close(self) -> None:
        """End the processes that still run."""
        alive = [p for p in self._processes if p.is_alive() and p.pid is not None]
        for process in alive:
            process.terminate()
            with contextlib.suppress(ProcessLookupError):  # a stopped one ends when it continues
                os.kill(process.pid or 0, signal.SIGCONT)
        deadline = time.monotonic() + _SHUTDOWN
        for process in alive:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
        for process in self._processes:
            if process.pid is not None:
                process.join()
            process.close()
        for connection in self._connections:
            connection.close()


def _rank_environment(rank: int, nproc: int, port: int) -> dict[str, str]:
    """Return the environment variables that torch.distributed expects in a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
    }


def _join(worker: Callable[..., Any], args: Sequence[Any], nproc: int) -> dict[int, Any]:
    """Run as one rank of an outer launcher."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world != nproc:
        raise LaunchError(
            f"{nproc} processes are needed, but the outer launcher started {world}: "
            f"use `torchrun --nproc-per-node {nproc}`, or leave it out"
        )
    return {rank: worker(*args)}


def _error_line(rank: int, failure: Failure | None, code: int) -> str:
    """Return one line with the rank that failed first, and its error."""
    if failure is not None:
        message = " ".join(failure.message.split())
        return message if failure.names_ranks else f"rank {rank} failed: {message}"
    if code < 0:
        hint = ": out of memory?" if code == -signal.SIGKILL else ""
        return f"rank {rank} failed: it was ended by {signal.Signals(-code).name}{hint}"
    return f"rank {rank} failed: it exited with code {code} and without a message"


@contextlib.contextmanager
def _environment(nproc: int) -> Iterator[None]:
    """Set variables for the children: their share of the cores, and the loopback interface, as all run here."""
    wanted: Mapping[str, str] = {"OMP_NUM_THREADS": str(threads_per_rank(nproc)), **loopback_interface()}
    added = [name for name in wanted if name not in os.environ]
    os.environ.update({name: wanted[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def threads_per_rank(nproc: int) -> int:
    """Divide the cores that this process may use among ``nproc`` ranks. The result is at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // nproc)


class _Ended(BaseException):
    """A signal asks this process to end. No handler of errors on the way may stop it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def _held(number: signal.Signals) -> Iterator[None]:
    """Deliver a signal only after the block. A process that is started inside starts with it held."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore signals inside."""
    with _handled(_SIGNALS, signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Raise :class:`_Ended` inside for a signal that ends this process, unless it is ignored."""

    def end(number: int, frame: Any) -> None:
        raise _Ended(number)

    with _handled([n for n in _ENDING if signal.getsignal(n) is not signal.SIG_IGN], end):
        yield


@contextlib.contextmanager
def _handled(numbers: Sequence[signal.Signals], handler: Any) -> Iterator[None]:
    """Handle signals by ``handler`` inside. In threads other than the main one, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in earlier.items():
            if before is not None:
                signal.signal(number, before)
