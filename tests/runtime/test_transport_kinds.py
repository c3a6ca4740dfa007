"""Transports of other packages: by object and by entry point, from the choice to the pixels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_net import make_bundle

from districompile.errors import InputError, LaunchError
from districompile.runtime.processes.launcher import launch
from districompile.runtime.transports.kinds import Facts, TransportKind
from districompile.runtime.transports.registry import BUILT_IN, candidates, transport_name
from districompile.runtime.transports.select import check_transport, decide
from tests.helpers_transport import CountingTransport, rank_of

GROUP = [Facts("a", "", (), False, False)] * 2


def install(folder: Path, **points: str) -> str:
    """A package, as far as Python's installed metadata goes, that registers transports."""
    info = folder / "counting-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: counting\nVersion: 1.0\n")
    lines = [f"{name.replace('_', '-')} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[districompile.transports]", *lines, ""]))
    return str(folder)


def test_the_kinds_that_come_with_the_package() -> None:
    assert [kind.name for kind in BUILT_IN] == ["peer", "nccl", "gloo"]
    assert all(isinstance(kind, TransportKind) for kind in BUILT_IN)
    assert candidates("auto") == BUILT_IN and transport_name("gloo") == "gloo"


def test_a_kind_by_object() -> None:
    kind = CountingTransport()
    assert decide(kind, [GROUP]) is kind and transport_name(kind) == "counting"
    with pytest.raises(LaunchError, match="the counting transport cannot be used: it counts up to 1 ranks; use"):
        decide(CountingTransport(most=1), [GROUP])
    with pytest.raises(InputError, match="is no transport: it lacks a name or method of TransportKind"):
        check_transport(object())  # type: ignore[arg-type]


def test_kinds_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = install(
        tmp_path, counting="tests.helpers_transport:CountingTransport", broken="tests.no_such_module:Kind",
        other="builtins:dict", gloo="tests.helpers_transport:CountingTransport",
    )  # fmt: skip
    monkeypatch.syspath_prepend(made)
    (kind,) = candidates("counting")
    assert isinstance(kind, CountingTransport)
    assert candidates("gloo") == BUILT_IN[2:]  # nobody replaces one that comes with the package
    assert candidates("auto") == BUILT_IN  # what is installed changes nothing by itself
    with pytest.raises(InputError, match=r"transport 'broken' \(tests.no_such_module:Kind\) cannot be loaded: Module"):
        check_transport("broken")
    with pytest.raises(InputError, match=r"transport 'other' \(builtins:dict\) is no transport"):
        check_transport("other")
    with pytest.raises(InputError, match="'mpi': use one of auto, peer, nccl, gloo, broken, counting, other"):
        check_transport("mpi")
    sys.path.remove(made)
    with pytest.raises(InputError, match="no transport 'counting': use one of auto, peer, nccl, gloo$"):
        check_transport("counting")


def test_the_example_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "extending" / "transport.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    kind = names["CountingTransport"]()
    assert candidates(kind) == (kind,) and decide(kind, [GROUP]) is kind
    members = {n for n in dir(TransportKind) if not n.startswith("_")} | set(TransportKind.__annotations__)
    assert members and all(f"| `{n}" in page for n in members)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_another_transport_end_to_end(tmp_path: Path) -> None:
    """Two processes, over gloo, over a counting object, and over the same by its registered name."""
    bundle, kwargs = str(make_bundle(tmp_path / "b", ranks=2)), tmp_path / "inputs.pt"
    given = {"sample": torch.randn(2, 4, 40, 32), "timestep": torch.tensor(10.0)}
    torch.save(given, kwargs)
    installed = install(tmp_path / "site", counting="tests.helpers_transport:CountingTransport")
    want = launch(rank_of, (bundle, str(kwargs), "gloo"), 2)
    runs: list[dict[int, Any]] = [
        launch(rank_of, (bundle, str(kwargs), "object"), 2),
        launch(rank_of, (bundle, str(kwargs), "counting", installed), 2),
    ]
    for found in runs:
        for rank in (0, 1):
            assert found[rank]["name"] == "counting" and found[rank]["outputs"] == want[rank]["outputs"]
            assert found[rank]["transfers"] > 0 and found[rank]["nbytes"] > 0
    assert runs[0][0]["calls"] == ["unavailable_reason", "channel", "shares"]  # no halves to gather
    assert want[0]["name"] == "gloo" and want[0]["transfers"] is None
    with pytest.raises(LaunchError, match="the counting transport cannot be used: it counts up to 1 ranks"):
        launch(rank_of, (bundle, str(kwargs), "refusing"), 2)
