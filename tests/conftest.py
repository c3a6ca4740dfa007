"""Set up all tests, and select which of the slow ones a run takes."""

from __future__ import annotations

import datetime
import functools
import gc
import hashlib
import json
import random
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from torch._export import utils as export_utils

# One test process runs on each core. More threads than cores would wait for each other by spinning, which made calls of
# small networks ten times as slow.
torch.set_num_threads(1)

# A shell leaves SIGINT ignored in a job that it starts in the background, and processes of tests would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TURNS = 14  # runs that share the slow tests
SLOW = 12.0  # seconds that a test took, on two cores with others beside it, from which on it is a slow one
RECORD = Path(__file__).with_name("durations.json")
_RECORDED = 5.0  # seconds: what took less is not recorded
_TURN = pytest.StashKey[int]()
_LEFT_OUT = pytest.StashKey[int]()


def read_seed(text: str) -> int:
    """Return the seed that ``--fresh-seed`` names: a number, or a new one for "random"."""
    return random.SystemRandom().randrange(2**32) if text == "random" else int(text)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--networks", type=int, default=240, help="how many random networks test_fuzz.py shards")
    parser.addoption("--all", action="store_true", help="run every slow test, not only those of a turn")
    parser.addoption("--turn", type=int, choices=range(TURNS), help="which of the slow tests [default: by date]")
    parser.addoption(
        "--record-durations", action="store_true", help=f"write to {RECORD.name} how long the tests of this run took"
    )
    parser.addoption(
        "--fresh-seed", type=read_seed, metavar="N|random",
        help="draw new examples in property tests; the seed is printed [default: the same examples in every run]",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Choose the turn. Workers are given it, as midnight may come between the starts of two of them."""
    given = getattr(config, "workerinput", {}).get("turn", config.getoption("--turn"))
    today = datetime.datetime.now(datetime.timezone.utc).toordinal()
    config.stash[_TURN] = today % TURNS if given is None else given


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["turn"] = node.config.stash[_TURN]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what conversions keep for later ones away from the user's cache, and the other way round."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def turn_of(nodeid: str) -> int:
    """Return the turn of a test, which depends on its name alone: all runs and workers agree on it."""
    return int(hashlib.md5(nodeid.encode(), usedforsecurity=False).hexdigest(), 16) % TURNS


def takes_turns(config: pytest.Config) -> bool:
    """Return whether slow tests take turns. Tests that are named (by file, node or -k) or that failed last all run."""
    paths = [config.invocation_params.dir / arg.partition("::")[0] for arg in config.args]
    named = config.getoption("keyword") or config.getoption("lf", False) or not all(map(Path.is_dir, paths))
    return not (named or config.getoption("--all"))


@functools.cache
def recorded_durations() -> dict[str, float]:
    """Return the seconds that tests took when they were recorded, by name; those of short ones are left out."""
    found: dict[str, float] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return found


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test as slow that was recorded to be, unless it has the mark ``always``. -m selects later."""
    if recorded_durations().get(item.nodeid, 0.0) >= SLOW and not item.get_closest_marker("always"):
        item.add_marker("slow")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect slow tests of other turns. This comes after -m has selected, so that only those are counted."""
    if not takes_turns(config):
        return
    kept, left_out = [], []
    for item in items:
        waits = item.get_closest_marker("slow") and turn_of(item.nodeid) != config.stash[_TURN]
        (left_out if waits else kept).append(item)
    config.stash[_LEFT_OUT] = len(left_out)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(_LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take the number of deselected tests from a worker. All have the same number; one that crashed has none."""
    if left_out := getattr(node, "workeroutput", {}).get("left_out", 0):
        node.config.stash[_LEFT_OUT] = left_out


def write_durations(terminalreporter: pytest.TerminalReporter) -> None:
    """Record how long the tests of this run took. What did not run keeps its record."""
    took: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                took[report.nodeid] = took.get(report.nodeid, 0.0) + report.duration
    kept = {name: seconds for name, seconds in recorded_durations().items() if name not in took}
    found = kept | {name: round(seconds, 1) for name, seconds in took.items() if seconds >= _RECORDED}
    RECORD.write_text(json.dumps(dict(sorted(found.items())), indent=0) + "\n")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--record-durations"):
        write_durations(terminalreporter)
    if (seed := config.getoption("--fresh-seed")) is not None:
        terminalreporter.write_line(f"Fresh seed: {seed}. The same examples are drawn with --fresh-seed {seed}.")
    if count := config.stash.get(_LEFT_OUT, 0):
        turn = config.stash[_TURN]
        terminalreporter.write_line(
            f"Slow tests of other turns, not run: {count}. This was turn {turn} of 0 to {TURNS - 1}; the turn changes "
            "every day. --all runs every test."
        )


def pytest_collection_finish() -> None:
    """Exempt imported modules from garbage collection, which would take a tenth of the tests' time otherwise."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture
def fresh_seed(request: pytest.FixtureRequest) -> int | None:
    """Return the number of ``--fresh-seed``, if it was given, for tests that seed hypothesis themselves."""
    seed: int | None = request.config.getoption("--fresh-seed")
    return seed


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Seed tests that hypothesis decorates. Their own seed is a hash of their name."""
    seed = pyfuncitem.config.getoption("--fresh-seed")
    if seed is not None and hasattr(pyfuncitem.obj, "hypothesis"):
        hypothesis.seed(seed)(pyfuncitem.obj)
    return (yield)


@pytest.fixture(scope="session", autouse=True)
def operators_are_listed_once() -> Iterator[None]:
    """List the operators written in C++ once. ``torch.export`` lists them anew at each call.

    That is a fifth of the time of exporting a network of two layers. No C++ library is loaded between two tests.
    """
    listing = export_utils._materialize_cpp_cia_ops
    listing()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_utils, "_materialize_cpp_cia_ops", lambda: None)
        yield
