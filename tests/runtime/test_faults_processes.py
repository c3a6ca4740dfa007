"""Accidents of processes: every one ends in one line that names the rank, and leaves no process and no file behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from districompile.errors import LaunchError
from districompile.runtime.processes.launcher import launch
from districompile.runtime.processes.same_bundle import difference
from tests.helpers_faults import TIMEOUT, calls, make

pytestmark = pytest.mark.multiprocess
HERE = Path(__file__).resolve().parents[1]  # where the helpers are
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return {ranks: make(folder / f"b{ranks}", ranks) for ranks in (2, 3)}


def start_ranks(paths: list[Path], how: str, who: int, marks: Path) -> list[subprocess.Popen[str]]:
    """Without a launcher: rank 0 opens the store at which they meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"WORLD_SIZE": str(len(paths)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, str(HERE / "helpers_faults.py"), str(path), how, str(who), str(marks)],
            env={**ENVIRONMENT, **where, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank, path in enumerate(paths)
    ]  # fmt: skip


def wait_for(files: list[Path], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not all(f.exists() for f in files):
        assert time.monotonic() < until, f"not there: {[f.name for f in files if not f.exists()]}"
        time.sleep(0.1)


ACCIDENTS = [
    pytest.param(2, "kill", 0, marks=pytest.mark.always),
    *(pytest.param(*case, marks=pytest.mark.slow)
      for case in ((2, "stop", 1), (3, "kill", 2), (3, "stop", 0), (3, "hang", 1))),
]  # fmt: skip


@pytest.mark.parametrize(("ranks", "how", "who"), ACCIDENTS)
def test_every_other_rank_names_the_one_that_is_lost(
    ranks: int, how: str, who: int, bundles: dict[int, Path], tmp_path: Path
) -> None:
    processes = start_ranks([bundles[ranks]] * ranks, how, who, tmp_path)
    others = [r for r in range(ranks) if r != who]
    try:
        wait_for([tmp_path / "accident"], 90)
        wait_for([tmp_path / f"told-{r}" for r in others], 2 * TIMEOUT + 10)
        time.sleep(0.2)
        for rank in others:
            seconds, _, told = (tmp_path / f"told-{rank}").read_text().partition(" ")
            assert told.startswith(f"rank {rank} lost rank {who}: "), told
            assert float(seconds) < 2 * TIMEOUT + 5 and "\n" not in told
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("stop", "rank 0 lost rank 1: no sign of life"),
        pytest.param("hang", "rank 0 lost rank 1: it does not go on", marks=pytest.mark.slow),
        pytest.param("raise", "rank 1 failed: ValueError: had enough", marks=pytest.mark.slow),
    ],
)
def test_the_launcher_ends_all_and_names_the_rank(
    how: str, message: str, bundles: dict[int, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(LaunchError) as caught:
        launch(calls, (str(bundles[2]), how, 1, str(tmp_path)), 2)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert time.time() - float((tmp_path / "accident").read_text()) < 5 * TIMEOUT + 5
    for rank in (0, 1):
        assert not Path(f"/proc/{(tmp_path / f'ready-{rank}').read_text()}").exists()


@pytest.mark.slow
def test_rank_0_may_think_between_calls(bundles: dict[int, Path], tmp_path: Path) -> None:
    assert launch(calls, (str(bundles[2]), "think", 0, str(tmp_path)), 2) == {0: "done", 1: "done"}


def test_ranks_with_different_bundles_refuse(bundles: dict[int, Path], tmp_path: Path) -> None:
    other = make(tmp_path / "other", 2, scale=2.0)
    processes = start_ranks([bundles[2], other], "none", 0, tmp_path)
    errors = [process.communicate(timeout=120)[1].strip().splitlines()[-1] for process in processes]
    told = [error.partition("LaunchError: ")[2] for error in errors]
    assert told[0] == told[1] and told[0].startswith("rank 1 has other weights than rank 0"), errors
    assert all(process.returncode for process in processes)


def test_what_is_compared() -> None:
    same = {"plan": "a" * 64, "weights": "b" * 64, "torch": "2.13.0"}
    assert difference([same, dict(same)]) is None
    told = difference([same, same, {**same, "torch": "2.12.0"}])
    assert told == (
        "rank 2 has another version of torch than rank 0 (2.12.0, not 2.13.0): install the same version for all ranks"
    )
    assert "rank 1 has another plan than rank 0 (cccccccccccc," in (
        difference([same, {**same, "plan": "c" * 64}]) or ""
    )


# Listening sockets

LOAD = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from helpers_faults import calls
from districompile.runtime.processes.launcher import launch
if __name__ == "__main__":
    launch(calls, (sys.argv[1], "none", 0, sys.argv[2]), 2)
"""


def listening(pids: list[int]) -> list[str]:
    """The addresses, in the kernel's hexadecimal form, at which the processes listen."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(link)
            except FileNotFoundError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and columns[9] in inodes:
                found.append(columns[1].partition(":")[0])
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's tables of sockets")
@pytest.mark.parametrize("launcher", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_nothing_listens_beyond_the_machine(launcher: bool, bundles: dict[int, Path], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LOAD.format(tests=str(HERE), root=str(HERE.parent)))
    if launcher:
        started = [subprocess.Popen([sys.executable, str(script), str(bundles[2]), str(tmp_path)], env=ENVIRONMENT)]
    else:
        started = start_ranks([bundles[2]] * 2, "none", 0, tmp_path)
    try:
        wait_for([tmp_path / "ready-0", tmp_path / "ready-1"], 90)
        time.sleep(0.2)
        pids = [p.pid for p in started] + [int((tmp_path / f"ready-{r}").read_text()) for r in (0, 1)]
        addresses = listening(pids)
        loopback = {"0100007F", "0" * 24 + "01000000", "0000000000000000FFFF00000100007F"}
        assert len(addresses) >= 3 and set(addresses) <= loopback, addresses
    finally:
        for process in started:
            process.send_signal(signal.SIGINT if launcher else signal.SIGKILL)
        for process in started:
            process.communicate(timeout=30)


# Commands that are interrupted, and a disk that is full

NETS = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = torch.nn.Conv2d(4, 64, 3, padding=1)
        self.b = torch.nn.Conv2d(64, 4, 3, padding=1)

    def forward(self, sample):
        return self.b(self.a(sample))

def make():
    return Net(), (torch.randn(1, 4, 24, 16),), {}
"""
CONVERT = ["convert", "faults_net:make", "--gpus", "2", "--backend", "eager", "--out", "bundle"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "faults_net.py").write_text(NETS)
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def start(words: list[str], place: Path, limit: int | None = None) -> subprocess.Popen[str]:
    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    path = f"{HERE.parent}:{place.parent}"
    temporary = place.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = {
        **ENVIRONMENT,
        "PYTHONPATH": path,
        "TMPDIR": str(temporary),
        "XDG_CACHE_HOME": str(place / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "districompile", *words], cwd=place, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=prepare,
    )  # fmt: skip


def files(place: Path) -> dict[str, bytes]:
    return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}


def session(leader: int) -> Iterator[int]:
    """Processes that were started by a command, and are still there."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            columns = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(columns[3]) == leader and columns[0] not in "ZX":
            yield int(stat.parent.name)


@pytest.mark.parametrize("before", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_full_disk_leaves_what_was_there(before: bool, place: Path) -> None:
    if before:
        _, err = start(CONVERT, place).communicate(timeout=120)
        assert (place / "bundle").is_dir(), err
    was = files(place)
    process = start(CONVERT, place, limit=4096)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and len(err.strip().splitlines()) == 1 and "File too large" in err, err
    assert files(place) == was and [p.name for p in place.iterdir()] == (["bundle"] if before else [])


MOMENTS = {
    "convert": (0.1, 0.5, 0.8, 0.9),
    "bench": (0.6, 0.9),
    "verify": (0.7,),
    "run": (0.3, 0.6, 0.9),
}


@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=[] if c == "convert" else pytest.mark.slow) for c in MOMENTS]
)
def test_an_interrupted_command_leaves_nothing(command: str, place: Path) -> None:
    """At several moments of its run, as parts of how long it takes."""
    if command != "convert":
        start(CONVERT, place).communicate(timeout=120)
    words = {
        "convert": CONVERT,
        "bench": ["bench", "bundle", "--calls", "20", "--trace", "trace.json"],
        "verify": ["verify", "bundle"],
        "run": ["run", "demo", "--backend", "eager", "--steps", "5", "--out", "image.png", "--prompt", "a star"],
    }[command]
    lasts = 20.0
    if command != "run":
        began = time.monotonic()
        start(words, place).communicate(timeout=120)
        lasts = time.monotonic() - began
    if command == "convert":
        shutil.rmtree(place / "bundle")
    (place / "trace.json").unlink(missing_ok=True)
    was = files(place)
    for moment in MOMENTS[command]:
        process = start(words, place)
        time.sleep(moment * lasts)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        if process.returncode == 130:
            # A conversion that was complete is told of, and kept in the cache
            lines = [line for line in err.strip().splitlines() if not line.startswith("converted ")]
            assert lines == ["interrupted"], (moment, err)
            assert {n: d for n, d in files(place).items() if not n.startswith("cache/")} == was, moment
        else:  # it was done before, or Python had not started yet
            assert process.returncode in (0, 2, -signal.SIGINT), (moment, process.returncode, err)
            for name in files(place).keys() - was.keys():
                place.joinpath(name).unlink()
        until = time.monotonic() + 10
        while list(session(process.pid)):
            assert time.monotonic() < until, "a process was left behind"
            time.sleep(0.1)
        assert not [p for p in (place.parent / "tmp").iterdir() if p.name.startswith("districompile")], moment
        assert not list(place.glob(".districompile*")), moment


def test_the_manifest_tells_what_a_bundle_was_made_with(bundles: dict[int, Path]) -> None:
    assert json.loads((bundles[2] / "manifest.json").read_text())["made_with"]["ranks"] == 2
