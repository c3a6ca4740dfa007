"""Which transport is used where, and what is said where the one that is wanted cannot work."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from districompile.cli.commands.bench import transfers_of
from districompile.errors import InputError, LaunchError
from districompile.runtime.trace import Span, Spans, Trace, write_chrome_trace
from districompile.runtime.transports.kinds import Facts
from districompile.runtime.transports.select import check_transport, decide


def gpus(n: int, host: str = "a") -> list[Facts]:
    names = [f"{host}{i}" for i in range(n)]
    return [Facts(host, name, tuple(o for o in names if o != name), True, True) for name in names]


def without(facts: list[Facts], rank: int, **changes: object) -> list[Facts]:
    return [dataclasses.replace(f, **changes) if i == rank else f for i, f in enumerate(facts)]  # type: ignore[arg-type]


CASES = [
    (gpus(4), "peer", None, None),
    (without(gpus(4), 2, reaches=("a0", "a1")), "nccl",
     "the GPU of rank 2 cannot reach the memory of the GPU of rank 3", None),
    (gpus(2) + gpus(2, "b"), "nccl", "the ranks run on several machines", None),
    (without(gpus(2), 1, symmetric=False), "nccl", "no symmetric memory", None),
    (without(without(gpus(2), 1, symmetric=False), 0, nccl=False), "gloo", "no symmetric memory", "has no NCCL"),
    (without(gpus(2), 1, gpu="a0"), "gloo", "several ranks share one GPU", "several ranks share one GPU"),
    (without(gpus(2), 1, gpu="", reaches=()), "gloo", "rank 1 does not compute on an NVIDIA GPU",
     "rank 1 does not compute on an NVIDIA GPU"),
]  # fmt: skip


@pytest.mark.parametrize(("facts", "chosen", "no_peer", "no_nccl"), CASES)
def test_choice(facts: list[Facts], chosen: str, no_peer: str | None, no_nccl: str | None) -> None:
    assert decide("auto", [facts]).name == chosen
    for wanted, obstacle in (("peer", no_peer), ("nccl", no_nccl)):
        if obstacle is None:
            assert decide(wanted, [facts]).name == wanted
        else:
            with pytest.raises(LaunchError, match=f"the {wanted} transport cannot be used: .*{obstacle}.*auto"):
                decide(wanted, [facts])


def test_guidance_halves_on_two_machines_use_peer() -> None:
    """Each group of patches exchanges within itself; one that cannot decides for all."""
    assert decide("auto", [gpus(2), gpus(2, "b")]).name == "peer"
    assert decide("auto", [gpus(2), without(gpus(2, "b"), 0, symmetric=False)]).name == "nccl"


def test_unknown_transport() -> None:
    with pytest.raises(InputError, match="no transport 'mpi': use one of auto, peer, nccl, gloo"):
        check_transport("mpi")


def test_hidden_and_exposed_transfer_time(tmp_path: Path) -> None:
    spans = [
        Span("run", "a", "compute", 0, 4), Span("post", "x", "transfer", 1, 3, 100),
        Span("post", "y", "transfer", 2, 6, 50), Span("wait", "y", "compute", 4, 5.5),
        Span("join", "s", "compute", 6, 6.5),
    ]  # fmt: skip
    trace = Trace(1, [("displaced", spans), ("displaced", spans)])
    row = trace.summary()[0]
    assert row == {
        "phase": "displaced",
        "total_ms": 6.5,
        "run_ms": 4,
        "transfer_ms": 5,
        "exposed_ms": 2,
        "hidden_ms": 3,
        "sent_bytes": 150,
    }
    faster = Trace(0, [("displaced", [Span("run", "a", "compute", 0, 3), Span("wait", "y", "compute", 3, 6.5)])])
    assert transfers_of([faster.summary()[0], row]) == {**row, "imbalance_ms": 1}  # it waits for the other
    write_chrome_trace(tmp_path / "t.json", [trace])
    events = [e for e in json.loads((tmp_path / "t.json").read_text())["traceEvents"] if e["ph"] == "X"]
    assert len(events) == 10 and {e["pid"] for e in events} == {1}
    assert events[5]["ts"] == 6500.0 and events[1]["args"]["bytes"] == 100  # microseconds; the second call follows
    assert not list(tmp_path.glob("*.partial"))


def test_spans_on_the_host() -> None:
    spans = Spans(cuda=False)
    with spans.span("run", "a", "compute"):
        torch.ones(1000).sum()
    with spans.span("wait", "b", "compute"):
        pass
    first, second = spans.read()
    assert 0 <= first.start <= first.end <= second.start <= second.end
