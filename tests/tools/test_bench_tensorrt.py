"""Test what tools/bench_tensorrt.py runs, and the table that it makes of its lines."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from tests.tools.test_check import ROOT, load

bench = load(ROOT / "tools" / "bench_tensorrt.py")


def line(figure: str, backend: str = "tensorrt", **facts: Any) -> dict[str, Any]:
    job = {"network": "sd15", "dtype": "float32", "ranks": 2, "part": "step", "backend": backend}
    job |= {k: facts.pop(k) for k in ("transport",) if k in facts}
    made = {"device": "NVIDIA H200", "flavour": "tensorrt", "version": "8.6.0"} if figure != "done" else {}
    return {"figure": figure, **facts, **made, "job": job}


LINES = [
    line("errors", exact=3e-6, displaced=4e-6),
    line("displaced step, transfers free", ms=1.25),
    line("exact step, transfers free", ms=9.0),
    line("displaced step", ms=1.5, transport="peer"),
    line("displaced step", ms=2.5, transport="nccl"),
    line("displaced step, transfers free", "inductor", ms=1.0),
    line("done"),
]


def test_jobs_compare_backends_side_by_side() -> None:
    args = argparse.Namespace(networks="demo,full", dtypes="float32,float16", ranks="1,2", parts="errors,gpus",
                              backends="tensorrt,inductor", transports="peer,nccl")  # fmt: skip
    found = bench.jobs(args)
    assert [j["backend"] for j in found[:4]] == ["tensorrt", "inductor"] * 2
    assert {j["part"] for j in found if j["network"] == "full"} == {"step"}
    assert {(j["dtype"], j["ranks"]) for j in found if j["network"] == "full"} == {("float16", 2)}
    assert all(j["ranks"] == 2 and j["transport"] in ("peer", "nccl") for j in found if j["part"] == "gpus")
    assert len({str(j) for j in found}) == len(found)


def test_the_table_has_errors_and_times_of_both() -> None:
    *_, row = bench.table(LINES).splitlines()
    assert row == (
        "| small SD 1.5 | float32 | 2 | NVIDIA H200, tensorrt 8.6.0 | 3.0e-06 | 4.0e-06 | "
        "1.25 ms (no transfers), 1.50 ms (peer), 2.50 ms (nccl) | 1.00 ms (no transfers) |"
    )
    assert bench.table([]) == bench.table([LINES[5], line("done")]) == "No engine was executed so far."


def test_the_table_takes_its_place_in_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# A\n\n{bench.BEGIN}\n\nold\n\n{bench.END}\n\nend\n")
    for _ in range(2):
        bench.write_table(page, LINES)
        assert page.read_text() == f"# A\n\n{bench.BEGIN}\n\n{bench.table(LINES)}\n\n{bench.END}\n\nend\n"
    assert bench.BEGIN in (ROOT / "docs" / "tensorrt.md").read_text()


@pytest.mark.parametrize(
    "exact, displaced, fine",
    [(9e-5, None, True), (9e-5, 9e-5, True), (2e-4, 0.0, False), (0.0, 2e-4, False), (float("nan"), 0.0, False)],
)
def test_errors_have_limits(exact: float, displaced: float | None, fine: bool) -> None:
    assert bench.within(line("errors", exact=exact, displaced=displaced)) == fine
