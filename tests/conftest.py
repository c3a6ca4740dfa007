"""What all tests share, and which of the slow ones a run takes."""

from __future__ import annotations

import datetime
import gc
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._export import utils as export_utils

# Tests run side by side, one process a core: more threads than cores wait for each other, by spinning, which made
# calls of small networks take ten times as long
torch.set_num_threads(1)

TURNS = 3  # runs that share the slow tests
_TURN = pytest.StashKey[int]()
_LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--networks", type=int, default=240, help="how many random networks test_fuzz.py cuts")
    parser.addoption("--all", action="store_true", help="every slow test, not only the third whose turn it is")
    parser.addoption(
        "--turn", type=int, choices=range(TURNS), help="which third of the slow tests; without, by the date"
    )


def pytest_configure(config: pytest.Config) -> None:
    """A worker takes the turn that it was given, so that midnight does not come between two of them."""
    given = getattr(config, "workerinput", {}).get("turn", config.getoption("--turn"))
    today = datetime.datetime.now(datetime.timezone.utc).toordinal()
    config.stash[_TURN] = today % TURNS if given is None else given


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["turn"] = node.config.stash[_TURN]


def turn_of(nodeid: str) -> int:
    """The same at every run and in every worker, whatever other tests there are."""
    return int(hashlib.md5(nodeid.encode(), usedforsecurity=False).hexdigest(), 16) % TURNS


def takes_turns(config: pytest.Config) -> bool:
    """Whoever names tests, by file, by node or with -k, or asks for those that failed, gets all that were named."""
    paths = [config.invocation_params.dir / arg.partition("::")[0] for arg in config.args]
    named = config.getoption("keyword") or config.getoption("lf", False) or not all(map(Path.is_dir, paths))
    return not (named or config.getoption("--all"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the slow tests whose turn it is not, after -m has chosen: only what would have run is counted."""
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
    """All workers leave out the same tests, but one that crashed says nothing."""
    if left_out := getattr(node, "workeroutput", {}).get("left_out", 0):
        node.config.stash[_LEFT_OUT] = left_out


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if count := config.stash.get(_LEFT_OUT, 0):
        turn = config.stash[_TURN]
        terminalreporter.write_line(
            f"Slow tests left out until their turn comes: {count}. This was turn {turn} of 0 to {TURNS - 1}, "
            "the next day takes the next, and --all runs every test."
        )


def pytest_collection_finish() -> None:
    """What was imported lives as long as the tests do. Looking through it for garbage, often, would take a tenth of
    their time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def operators_are_listed_once() -> Iterator[None]:
    """``torch.export`` asks PyTorch's dispatcher for all operators of C++ anew each time, a fifth of what it
    takes to export a network of two layers; libraries in C++ are not loaded between two tests."""
    listing = export_utils._materialize_cpp_cia_ops
    listing()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_utils, "_materialize_cpp_cia_ops", lambda: None)
        yield
