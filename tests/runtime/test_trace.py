"""Traces for Perfetto: every flow has both ends, inside of the slices it connects."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

from districompile.runtime.trace import Span, Trace, write_chrome_trace

NEIGHBOURS = {"halo": frozenset({(0, 1), (1, 0), (1, 2), (2, 1)}), "stats and 1 more": frozenset({(0, 2)})}


def exact(shift: float) -> list[Span]:
    return [
        Span("run", "s0", "compute", 0, 2 + shift), Span("post", "halo", "transfer", 2 + shift, 5, 64),
        Span("wait", "halo", "compute", 3, 5), Span("run", "s1", "compute", 5, 6),
    ]  # fmt: skip


def displaced(shift: float) -> list[Span]:
    return [
        Span("wait", "halo", "compute", 0, 0), Span("run", "s0", "compute", 0, 3 + shift),
        Span("post", "halo", "transfer", 1, 4, 64), Span("post", "stats and 1 more", "transfer", 4, 4.5, 8),
        Span("join", "displaced", "compute", 5, 6),
    ]  # fmt: skip


def traces() -> list[Trace]:
    return [
        Trace(r, [("exact", exact(r / 10)), ("displaced", displaced(r)), ("displaced", displaced(r))]) for r in range(3)
    ]


def written(path: Path, senders: Any) -> list[dict[str, Any]]:
    write_chrome_trace(path, traces(), senders)
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def test_every_flow_has_both_ends(tmp_path: Path) -> None:
    events = written(tmp_path / "t.json", NEIGHBOURS)
    slices = [e for e in events if e["ph"] == "X"]
    flows: dict[int, list[dict[str, Any]]] = collections.defaultdict(list)
    for e in events:
        if e["ph"] in "sf":
            flows[e["id"]].append(e)
    assert flows

    def slice_at(end: dict[str, Any], kind: str) -> dict[str, Any]:
        found = [
            s for s in slices
            if (s["pid"], s["tid"], s["cat"]) == (end["pid"], end["tid"], kind) and end["name"] in s["name"]
            and s["ts"] <= end["ts"] <= s["ts"] + s["dur"]
        ]  # fmt: skip
        assert found, f"{end} is in no {kind} slice"
        return found[0]

    pairs: collections.Counter[tuple[int, int, str]] = collections.Counter()
    for ends in flows.values():
        assert [e["ph"] for e in ends] == ["s", "f"] and ends[1]["bp"] == "e"
        start, end = slice_at(ends[0], "post"), slice_at(ends[1], "wait")
        assert ends[0]["ts"] <= ends[1]["ts"]
        pairs[ends[0]["pid"], ends[1]["pid"], ends[0]["cat"]] += 1
        late = end["args"]["call"] - start["args"]["call"]
        assert late == (0 if end["args"]["phase"] == "exact" else 1)
    # Three waits a rank: one in the exact call; the first displaced call waits for it again, the second for the first
    assert {k for k in pairs if k[2] == "start to wait"} == {(r, r, "start to wait") for r in range(3)}
    assert {k[:2] for k in pairs if k[2] == "rank to rank"} == set(NEIGHBOURS["halo"])


def test_without_senders_no_arrow_leads_to_another_rank(tmp_path: Path) -> None:
    events = written(tmp_path / "t.json", None)
    assert {e["cat"] for e in events if e["ph"] in "sf"} == {"start to wait"}


def test_names_and_transfers(tmp_path: Path) -> None:
    events = written(tmp_path / "t.json", NEIGHBOURS)
    names = {
        (e["pid"], e.get("tid"), e["args"]["name"]) for e in events if e["name"] in ("process_name", "thread_name")
    }
    for rank in range(3):
        assert {(rank, None, f"rank {rank}"), (rank, 0, "compute"), (rank, 1, "transfers")} <= names
    transfers = [e for e in events if e["ph"] == "X" and e["cat"] == "post"]
    assert all(e["name"].startswith("transfer ") and e["tid"] == 1 and e["args"]["bytes"] for e in transfers)
    begins = {(e["args"]["call"], e["pid"]): e["ts"] for e in events if e["ph"] == "X" and e["name"] == "run s0"}
    assert all(begins[c, 0] == begins[c, r] for c in range(3) for r in range(3))  # calls are aligned
