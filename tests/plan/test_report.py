"""The report is read off a plan: here one written by hand, of two uneven ranks."""

from __future__ import annotations

import json

import torch

from districompile.ir.report_builder import Fallback, Flops
from districompile.ir.spec import InputSpec, TensorSpec
from districompile.plan.options import PlanOptions
from districompile.plan.plan import (
    Exchange,
    ExecutionPlan,
    Reduction,
    RowSlice,
    Run,
    SaveState,
    Schedule,
    SegmentInterface,
    Start,
    Wait,
)
from districompile.plan.plan_report import PlanReport
from districompile.plan.report import WORDS, Report, size
from districompile.plan.steps_text import phase_text


def spec(*shape: int) -> TensorSpec:
    return TensorSpec(shape, torch.float32)


def plan() -> ExecutionPlan:
    halo = Exchange(
        "halo", "blocks[0].conv", "conv", "x", 2, (spec(1, 4, 3, 8), spec(1, 4, 2, 8)), (spec(1, 4, 1, 8),) * 2,
        (RowSlice(0, 1, 2, 0, 1), RowSlice(1, 0, 0, 0, 1), RowSlice(0, 0, 0, 0, 1)), 0.0, "neighbour", displaced=True,
    )  # fmt: skip
    norm = Reduction("stats", "blocks[0].norm", "norm", "m", "sum", (spec(1, 2, 3),) * 2)
    first = SegmentInterface("s0", ("sample",), ("x", "m"), ("w",), ("a", "b"))
    second = SegmentInterface("s1", ("x", "halo", "stats"), ("y",), ("w",), ("c", "c"))
    exact = Schedule(
        (Run("s0"), Start(("halo", "stats")), Wait(("halo", "stats")), Run("s1"), SaveState("old", "m")),
        {"s0": first, "s1": second},
        ("y",),
    )
    late = Schedule((Wait(("halo",)), Run("s0"), Run("s1"), Start(("halo",))), {"s0": first, "s1": second}, ("y",))
    return ExecutionPlan(
        ranks=2,
        inputs=(InputSpec("sample", "sample", spec(1, 4, 5, 8), 2),),
        constants={},
        signature=("sample",),
        output=None,
        collectives={"halo": halo, "stats": norm},
        phases={"exact": exact, "displaced": late},
        weights={"w": spec(1000, 300)},
        bounds={"5": (0, 3, 5), "10": (0, 6, 10)},
        options=PlanOptions(ranks=2, groupnorm="sync", displace=("conv",)),
        report=PlanReport(
            flops=Flops(3.0, 1.0), fallbacks=(Fallback("sort[1]", "aten.sort", "no rule", 5120, "a.py:3"),)
        ),
    )


def test_figures() -> None:
    found = Report(plan()).to_dict()
    assert found["rows"] == {"10": [6, 4], "5": [3, 2]}
    assert found["sites"]["conv"] == {"count": 1, "displaced": 1, "bytes": [128, 128], "patterns": {"neighbour": 1}}
    assert found["sites"]["norm"]["bytes"] == [24, 24] and found["sites"]["norm"]["displaced"] == 0
    assert found["bytes_per_step"] == {"exact": [152, 152], "displaced": [128, 128]}
    assert found["segments"] == {"exact": 2, "displaced": 2} and found["engines"] == 3
    assert found["waits"] == {"exact": 1, "displaced": 1}
    assert found["flops"]["cut_share"] == 0.75
    assert found["fallbacks"][0]["op"] == "aten.sort"
    assert json.loads(json.dumps(found)) == json.loads(
        json.dumps(Report(ExecutionPlan.from_json(plan().to_json())).to_dict())
    )


def test_text() -> None:
    text = str(Report(plan()))
    for part in ("2 ranks; ", "groupnorm sync, displace conv", "rows per rank", "sort[1]", "5.1 kB", "a.py:3", "75.0%",
                 "received from other ranks: 152 B per rank", "weights: 1 tensors, 1.2 MB",
                 "3 distinct engines"):  # fmt: skip
        assert part in text, part
    assert "\x1b" not in text


def test_phase_text() -> None:
    assert phase_text(plan(), "exact", None).splitlines() == [
        "exact: 5 steps, 2 segments, 2 ranks",
        "  0 run     s0(sample) -> x, m  # 1 weight, 2 distinct engines",
        "  1 start   halo = exchange(x : [1, 4, 3, 8] | [1, 4, 2, 8])  # conv, neighbour along dim 2, 128 B"
        "; pending until step 2, then kept for the next call; blocks[0].conv",
        "  1 start   stats = reduction(m : [1, 2, 3])  # norm, sum, 24 B; pending until step 2; blocks[0].norm",
        "  2 wait    halo, stats",
        "  3 run     s1(x, halo, stats) -> y  # 1 weight, 1 distinct engine",
        "  4 save    old = m  # for the next call",
        "    return  y",
    ]


def test_transfers_of_the_displaced_phase_are_pending_in_the_next_call() -> None:
    lines = phase_text(plan(), "displaced", None).splitlines()
    assert "; pending until step 0 of the next call;" in next(line for line in lines if " start " in line)


def test_phase_text_fits() -> None:
    for width in (40, 60, 80):
        wrapped = phase_text(plan(), "exact", width)
        assert max(map(len, wrapped.splitlines())) <= width
        assert wrapped.split() == phase_text(plan(), "exact", None).split()


def test_every_word_of_the_report_is_explained() -> None:
    text = str(Report(plan()))
    titles = [line for line in text.splitlines() if line.isupper()]
    assert titles == ["MODEL", "PARTITION", "TRANSFERS", "ENGINES", "MEMORY", "WORDS"]
    before = text[: text.index("WORDS")]
    for word in WORDS:
        assert word in before and f"\n{word}: " in text, word
    assert "WORDS" not in str(Report(plan(), explain=False))


def test_a_plan_without_phases() -> None:
    """What ``stop_after`` leaves."""
    bare = ExecutionPlan(1, (), {}, (), None, {}, {}, {}, {})
    assert Report(bare).to_dict()["segments"] == {} and "1 ranks" in str(Report(bare))


def test_sizes() -> None:
    assert [size(n) for n in (0, 999, 1500, 2_500_000, 5_140_000_000)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.5 MB",
        "5.14 GB",
    ]
