"""The launcher: results, failures that end the run quickly and name the rank, and nothing left behind."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from districompile.errors import InputError, LaunchError
from districompile.runtime.processes.launcher import launch, threads_per_rank
from districompile.runtime.transports.gloo import GlooGroup, start_gloo

pytestmark = pytest.mark.multiprocess
HERE = Path(__file__).resolve().parents[1]  # where the helpers are


def work(how: str, pids: Path | None = None, who: int = 1) -> tuple[int, float, str]:
    """A rank that adds something up with the other, forever where ``how`` names a way to fail at rank ``who``."""
    rank = int(os.environ["RANK"])
    if pids is not None:
        (pids / str(rank)).write_text(str(os.getpid()))
    print(f"hello from {rank}", flush=True)
    start_gloo(start_timeout=30)
    transport = GlooGroup()
    total = sum(t[0].item() for t in transport.all_gather(torch.full((2,), rank + 1.0)))
    if how != "none":
        if rank == who:
            fail(how, pids)
        while True:  # the other is always in the middle of a transfer when this one fails
            transport.all_gather(torch.ones(2))
    transport.close()
    dist.destroy_process_group()
    return rank, total, os.environ["OMP_NUM_THREADS"]


def fail(how: str, pids: Path | None) -> None:
    if pids is not None:
        (pids / "failed").write_text(str(time.time()))
    if how == "raise":
        raise InputError("sample: converted for batch 2,\ncalled with 1")
    if how == "exit":
        os._exit(7)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1000)


def test_results_threads_and_logs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    results = launch(work, ("none",), 2, log_dir=tmp_path)
    threads = str(threads_per_rank(2))
    assert results == {0: (0, 3.0, threads), 1: (1, 3.0, threads)}
    logs = sorted(tmp_path.rglob("stdout.log"))
    assert [p.read_text().strip() for p in logs] == ["hello from 0", "hello from 1"]
    assert "[rank 1] hello from 1" in capfd.readouterr().out
    assert "OMP_NUM_THREADS" not in os.environ or os.environ["OMP_NUM_THREADS"] == threads
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "rank 1 failed: sample: converted for batch 2, called with 1"),
        pytest.param("exit", "rank 1 failed: it exited with code 7", marks=pytest.mark.slow),
        pytest.param("kill", "rank 1 failed: it was ended by SIGKILL", marks=pytest.mark.slow),
    ],
)
def test_a_failing_rank_ends_the_run(how: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LaunchError) as caught:
        launch(work, (how, tmp_path), 2)
    ended = time.time()
    assert ended - float((tmp_path / "failed").read_text()) < 10
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert_gone(tmp_path, 1)
    err = capfd.readouterr().err
    assert "Traceback" not in err and "SIGTERM" not in err


@pytest.mark.slow
@pytest.mark.parametrize(("how", "message"), [("raise", "sample: converted for"), ("kill", "it was ended by SIGKILL")])
def test_the_rank_with_the_store_may_fail(how: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=f"^rank 0 failed: {message}"):
        launch(work, (how, tmp_path, 0), 2)
    assert_gone(tmp_path, 1)


def late() -> str | None:
    """Rank 1 needs the store long after rank 0 has finished."""
    start_gloo(start_timeout=30)
    store = dist.distributed_c10d._get_default_store()
    if os.environ["RANK"] == "0":
        return None
    time.sleep(1.5)
    store.set("word", "late")
    found: bytes = store.get("word")
    return found.decode()


def test_the_rank_with_the_store_ends_last() -> None:
    assert launch(late, (), 2) == {0: None, 1: "late"}


def assert_gone(pids: Path, within: float) -> None:
    found = [int((pids / str(rank)).read_text()) for rank in (0, 1)]
    until = time.monotonic() + within
    while any(map(alive, found)):
        assert time.monotonic() < until, "a process was left behind"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {tests!r} + "/runtime", {root!r}]
from test_launcher import work
from districompile.runtime.processes.launcher import launch
if __name__ == "__main__":
    try:
        launch(work, ("hang", Path(sys.argv[1])), 2)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ending_the_launcher_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(HERE), root=str(HERE.parent)))
    pids = tmp_path / "pids"
    pids.mkdir()
    process = subprocess.Popen([sys.executable, str(script), str(pids)], stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while not (pids / "failed").exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        time.sleep(0.5)  # into the transfer
        process.send_signal(number)
        _, err = process.communicate(timeout=10)
        assert_gone(pids, 10)
        if number == signal.SIGINT:
            assert process.returncode == 130 and "Traceback" not in err
    finally:
        process.kill()
        process.wait()


def doomed(marks: Path) -> int:
    """Its libraries would abort while the process ends; what the worker asked for at exit is done before."""
    libc = ctypes.CDLL(None)
    libc.__cxa_atexit(libc.abort, None, None)
    atexit.register((marks / os.environ["RANK"]).touch)
    print("done", flush=False)
    return int(os.environ["RANK"])


def test_a_rank_that_is_done_ends_well(tmp_path: Path) -> None:
    logs, marks = tmp_path / "logs", tmp_path / "marks"
    marks.mkdir()
    assert launch(doomed, (marks,), 2, log_dir=logs) == {0: 0, 1: 1}
    assert {m.name for m in marks.iterdir()} == {"0", "1"}
    assert all("done" in f.read_text() for f in logs.rglob("stdout.log"))


def rank_of_outer() -> str:
    return os.environ["RANK"]


def test_under_an_outer_launcher_the_worker_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launch(rank_of_outer, (), 4) == {3: "3"}
    with pytest.raises(LaunchError, match="2 processes are needed, but the outer launcher started 4"):
        launch(rank_of_outer, (), 2)


def test_what_cannot_be_started() -> None:
    with pytest.raises(LaunchError, match="at least 1"):
        launch(rank_of_outer, (), 0)
    with pytest.raises(LaunchError, match="use a function at the top of a module"):
        launch(lambda: None, (), 1)
