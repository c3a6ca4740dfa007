"""The report is read off a plan: here one written by hand, of two uneven ranks."""

from __future__ import annotations

import json

import torch

from districompile.ir.plan import (
    Exchange,
    InputSpec,
    Keep,
    PhasePlan,
    Piece,
    Plan,
    Post,
    Reduction,
    Run,
    SegmentPlan,
    TensorSpec,
    Wait,
)
from districompile.report import Report, phase_text, size


def spec(*shape: int) -> TensorSpec:
    return TensorSpec(shape, torch.float32)


def plan() -> Plan:
    halo = Exchange(
        "halo", "blocks[0].conv", "conv", "x", 2, (spec(1, 4, 3, 8), spec(1, 4, 2, 8)), (spec(1, 4, 1, 8),) * 2,
        (Piece(0, 1, 2, 0, 1), Piece(1, 0, 0, 0, 1), Piece(0, 0, 0, 0, 1)), 0.0, "neighbour", displaced=True,
    )  # fmt: skip
    norm = Reduction("stats", "blocks[0].norm", "norm", "m", "sum", (spec(1, 2, 3),) * 2)
    first = SegmentPlan("s0", ("sample",), ("x", "m"), ("w",), ("a", "b"))
    second = SegmentPlan("s1", ("x", "halo", "stats"), ("y",), ("w",), ("c", "c"))
    exact = PhasePlan(
        (Run("s0"), Post(("halo", "stats")), Wait(("halo", "stats")), Run("s1"), Keep("old", "m")),
        {"s0": first, "s1": second},
        ("y",),
    )
    late = PhasePlan((Wait(("halo",)), Run("s0"), Run("s1"), Post(("halo",))), {"s0": first, "s1": second}, ("y",))
    return Plan(
        ranks=2,
        inputs=(InputSpec("sample", "sample", spec(1, 4, 5, 8), 2),),
        constants={},
        signature=("sample",),
        output=None,
        collectives={"halo": halo, "stats": norm},
        phases={"warmup": exact, "steady": late},
        weights={"w": spec(1000, 300)},
        bounds={"5": (0, 3, 5), "10": (0, 6, 10)},
        options={"ranks": 2, "groupnorm": "sync", "displace": ("conv",)},
        report={
            "fallbacks": [
                {"node": "sort[1]", "op": "aten.sort", "reason": "no rule", "bytes": 5120, "source": "a.py:3"}
            ],
            "flops": {"cut": 3.0, "whole": 1.0},
            "notes": ["rows run out at [5]"],
        },
    )


def test_figures() -> None:
    found = Report(plan()).to_dict()
    assert found["rows"] == {"10": [6, 4], "5": [3, 2]}
    assert found["sites"]["conv"] == {"count": 1, "displaced": 1, "bytes": [128, 128], "patterns": {"neighbour": 1}}
    assert found["sites"]["norm"]["bytes"] == [24, 24] and found["sites"]["norm"]["displaced"] == 0
    assert found["bytes_per_step"] == {"warmup": [152, 152], "steady": [128, 128]}
    assert found["segments"] == {"warmup": 2, "steady": 2} and found["engines"] == 3
    assert found["waits"] == {"warmup": 1, "steady": 1}
    assert found["flops"]["cut_share"] == 0.75
    assert found["fallbacks"][0]["op"] == "aten.sort"
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(Report(Plan.from_json(plan().to_json())).to_dict()))


def test_text() -> None:
    text = str(Report(plan()))
    for part in ("2 ranks; groupnorm sync, displace conv", "rows per rank", "sort[1]", "5.1 kB", "a.py:3", "75.0%",
                 "note: rows run out at [5]", "weights: 1 tensors, 1.2 MB", "3 distinct engines"):  # fmt: skip
        assert part in text, part
    assert "\x1b" not in text


def test_phase_text() -> None:
    lines = phase_text(plan(), "warmup").splitlines()
    assert lines == [
        "warmup: 5 steps, 2 segments, 2 ranks",
        "run  s0(sample) -> x, m  # 1 weights, 2 distinct engines",
        "post halo = exchange(x : [1, 4, 3, 8] | [1, 4, 2, 8])  # conv, neighbour along dim 2, 128 B"
        ", for the next call; blocks[0].conv",
        "post stats = reduction(m : [1, 2, 3])  # norm, sum, 24 B; blocks[0].norm",
        "wait halo, stats",
        "run  s1(x, halo, stats) -> y  # 1 weights, 1 distinct engine",
        "keep old = m",
        "out  y",
    ]


def test_a_plan_without_phases() -> None:
    """What ``stop_after`` leaves."""
    bare = Plan(1, (), {}, (), None, {}, {}, {}, {})
    assert Report(bare).to_dict()["segments"] == {} and "1 ranks" in str(Report(bare))


def test_sizes() -> None:
    assert [size(n) for n in (0, 999, 1500, 2_500_000, 5_140_000_000)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.5 MB",
        "5.14 GB",
    ]
