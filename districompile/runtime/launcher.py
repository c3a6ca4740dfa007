"""Starts one process per rank on this machine, and ends all of them when one fails.

Processes, logs and error files are those of torch.distributed's elastic launcher. Its rendezvous is left out: that
listens on all interfaces and unpickles what it is sent. The ranks meet at a store on the loopback interface instead.
Failures end the run within seconds, in one line that names the rank which failed *first*.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    MultiprocessContext,
    RunProcsResult,
    SignalException,
    Std,
)
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure, get_error_handler

from districompile import errors
from districompile.errors import Error, LaunchError
from districompile.runtime.loopback import LOOPBACK, bind_store, loopback_interface
from districompile.runtime.transport import TransportError

_SHUTDOWN = 2  # seconds that processes have to end by themselves before they are killed: one that is stopped does not
_FOLLOWER_WAITS = 3.0  # seconds
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def launch(
    worker: Callable[..., Any],
    args: Sequence[Any] = (),
    nproc: int = 1,
    *,
    log_dir: str | os.PathLike[str] | None = None,
    start_timeout: int = 60,
) -> dict[int, Any]:
    """Run ``worker(*args)`` in ``nproc`` processes on this machine; returns what each returned, by rank.

    ``worker`` must be importable (a function of a module) and its arguments and results small and picklable. In each
    process RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set as torch.distributed expects them. With
    ``log_dir`` each rank's output goes to files in it, too, and its lines are marked with the rank.

    Under an outer launcher (RANK and WORLD_SIZE are set, as by torchrun) the worker runs in this process.

    Raises :class:`LaunchError` that names the first rank that failed, and its error; the others are ended. Ctrl-C ends
    all processes and raises ``KeyboardInterrupt``.
    """
    if nproc < 1:
        raise LaunchError(f"cannot start {nproc} processes: at least 1 is needed")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _join(worker, args, nproc)
    try:
        pickle.dumps((worker, tuple(args)))
    except (pickle.PicklingError, AttributeError, TypeError) as e:
        raise LaunchError(f"cannot send the work to processes ({e}): use a function at the top of a module") from e
    with tempfile.TemporaryDirectory(prefix="districompile-") as scratch, _environment(nproc), _quiet(), _signals():
        logs = Path(log_dir) if log_dir is not None else Path(scratch)
        where = f"; logs are in {logs}" if log_dir is not None else ""
        try:
            logs.mkdir(parents=True, exist_ok=True)
            result = _run(_Worker(worker), tuple(args), nproc, logs, log_dir is not None, start_timeout)
        except SignalException as e:
            if e.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise LaunchError(f"ended by {signal.Signals(e.sigval).name}") from None
        except OSError as e:
            raise LaunchError(f"cannot start {nproc} processes: {e.strerror or e}") from e
        if result.is_failed():
            raise LaunchError(_tell(min(result.failures.values(), key=lambda failure: failure.timestamp)) + where)
        return dict(result.return_values)


def _run(
    worker: _Worker, args: tuple[Any, ...], nproc: int, logs: Path, tee: bool, start_timeout: float
) -> RunProcsResult:
    """Start the processes and wait until all are done, or one has failed; none of them is left."""
    store, port = bind_store(LOOPBACK, 0, timeout=start_timeout)
    earlier = set(multiprocessing.active_children())
    processes = _Processes(
        name="rank",
        entrypoint=worker,
        args=dict.fromkeys(range(nproc), args),
        envs={rank: _rank_environment(rank, nproc, port) for rank in range(nproc)},
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(str(logs), tee=Std.ALL if tee else Std.NONE),
        log_line_prefixes={rank: f"[rank {rank}] " for rank in range(nproc)} if tee else None,
    )
    try:
        processes.start()
        result = processes.wait(period=0.1)
        assert result is not None  # there is no time limit
        return result
    finally:
        with _undisturbed():
            processes.close()
            for process in set(multiprocessing.active_children()) - earlier:  # interrupted while they were started
                process.kill()
                process.join(_SHUTDOWN)
        del store  # the ranks' meeting point; not before they have ended


class _Processes(MultiprocessContext):
    """The processes of all ranks; they have :data:`_SHUTDOWN` seconds to end."""

    def _poll(self) -> RunProcsResult | None:
        if self._pc is not None and any(p.exitcode for p in self._pc.processes):
            for process in self._pc.processes:  # one that is stopped gets no signal to end before it goes on
                if process.is_alive() and process.pid is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGCONT)
        return super()._poll()

    def _close(self, death_sig: signal.Signals, timeout: int = 30) -> None:
        super()._close(death_sig, min(timeout, _SHUTDOWN))


def _rank_environment(rank: int, nproc: int, port: int) -> dict[str, str]:
    """What torch.distributed expects in the environment of a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 opens no store: this process has it
    }


class _Worker:
    """Runs the worker in a rank's process, and makes sure that the process ends when the worker fails, and well when it
    does not."""

    def __init__(self, worker: Callable[..., Any]) -> None:
        self._worker = worker
        self._done = False
        # The launcher names what it runs.
        self.__name__ = getattr(worker, "__name__", type(worker).__name__)
        self.__qualname__ = getattr(worker, "__qualname__", self.__name__)

    def __call__(self, *args: Any) -> Any:
        # A rank that waits inside gloo never gets to Python's handlers: let signals end it there and then.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        atexit.register(self._leave)  # before the worker's own, which are called first
        try:
            result = self._worker(*args)
            self._done = True
            return result
        except SystemExit as e:
            if e.code in (None, 0):
                self._done = True
                return None
            fail_process(LaunchError(f"the worker exited with {e.code!r}"))
        except Exception as e:
            fail_process(e)

    def _leave(self) -> None:
        """End without tearing down libraries: their threads may still run, and a process that was done has been seen to
        abort in the destructor of one."""
        if self._done:
            _flush()
            os._exit(0)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def fail_process(error: Exception) -> None:
    """Record ``error`` and end this process at once, whatever threads and transfers are still alive in it."""
    get_error_handler().record_exception(error)
    if not isinstance(error, Error):
        traceback.print_exception(error)
    _flush()
    followed = _followed(error)
    if followed is not None and not followed.silent:
        # A follower: the rank that failed first must be the one that is found. This one is ended meanwhile.
        time.sleep(_FOLLOWER_WAITS)
    os._exit(1)


def _followed(error: BaseException | None) -> TransportError | None:
    """What ``error`` came of, if that was another rank's end; also where the worker's own code wrapped it."""
    while error is not None:
        if isinstance(error, TransportError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _join(worker: Callable[..., Any], args: Sequence[Any], nproc: int) -> dict[int, Any]:
    """Run as one rank of an outer launcher."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world != nproc:
        raise LaunchError(
            f"{nproc} processes are needed, but the outer launcher started {world}: "
            f"use `torchrun --nproc-per-node {nproc}`, or leave it out"
        )
    return {rank: worker(*args)}


def _tell(failure: ProcessFailure) -> str:
    """One line: which rank failed first, and of what."""
    message = _message(failure)
    lost = message.removeprefix(f"{TransportError.__name__}: ")  # says itself which rank is lost
    return lost if lost != message else f"rank {failure.local_rank} failed: {message}"


def _message(failure: ProcessFailure) -> str:
    data = failure.error_file_data.get("message") if isinstance(failure.error_file_data, dict) else None
    if isinstance(data, dict) and data.get("message"):
        told = " ".join(str(data["message"]).split())
        name, _, text = told.partition(": ")
        return text if text and hasattr(errors, name) else told  # our own errors speak for themselves
    if failure.exitcode < 0:
        hint = ": out of memory?" if failure.exitcode == -signal.SIGKILL else ""
        return f"it was ended by {failure.signal_name()}{hint}"
    return f"it exited with code {failure.exitcode} and without a message"


@contextlib.contextmanager
def _environment(nproc: int) -> Iterator[None]:
    """What the children inherit: their share of the cores, and the loopback interface, as all are on this machine."""
    wanted = {"OMP_NUM_THREADS": str(threads_per_rank(nproc)), **loopback_interface()}
    added = [name for name in wanted if name not in os.environ]
    os.environ.update({name: wanted[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def threads_per_rank(nproc: int) -> int:
    """The cores this process may use, shared out among ``nproc`` ranks; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // nproc)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the elastic launcher logs about failures: they are told in one line instead."""
    loggers = [
        logger
        for name, logger in logging.Logger.manager.loggerDict.items()
        if name.startswith(("torch.distributed", "torch.multiprocessing")) and isinstance(logger, logging.Logger)
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let no signal interrupt what is inside."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Give the caller its signal handlers back: the elastic launcher replaces them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
