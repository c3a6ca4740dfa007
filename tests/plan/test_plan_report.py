"""The report of a plan: typed, frozen, and checked where a bundle is read."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from helpers_toy import make_plan

from districompile.errors import BundleError
from districompile.ir.report_builder import Fallback, Flops
from districompile.plan.plan import ExecutionPlan
from districompile.plan.plan_report import (
    PassRecord,
    PlanReport,
    QualitySearch,
    QualityTrial,
    check_report,
)
from districompile.plan.report import Report

REPORT = PlanReport(
    flops=Flops(3.0, 1.0),
    passes=(PassRecord("cse", None, True, 0.5, 9, 8, {"aten.relu.default": -1}, "cse", True),),
    fallbacks=(Fallback("sort", "aten.sort", "no rule", 5120, "a.py:3"),),
    replicated=("add",),
    rows={"8": (0, 4, 8), "1": None},
    joined={"a.weight+1": (("a.weight", 2), ("b.weight", 4))},
    quality=QualitySearch("40dB", 8, (QualityTrial("sync", math.inf, 45.0, "a cat", None, 5.0, True),)),
)


def test_the_report_survives_json() -> None:
    plan = dataclasses.replace(make_plan(2), report=REPORT)
    read = ExecutionPlan.from_json(plan.to_json())
    assert read.report == REPORT
    check_report(read.report, read.weights)
    assert Report(read).to_dict() == Report(plan).to_dict()
    assert json.loads(plan.to_json())["report"]["joined"] == {"a.weight+1": [["a.weight", 2], ["b.weight", 4]]}


def test_the_report_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        REPORT.quality = None  # type: ignore[misc]


def _set(*place: Any, to: Any) -> Callable[[Any], None]:
    def change(report: Any) -> None:
        for key in place[:-1]:
            report = report[key]
        report[place[-1]] = to

    return change


@pytest.mark.parametrize(
    "change, problem",
    [
        (_set("colour", to="red"), "a PlanReport lacks or has too much: 'colour'"),
        (lambda r: r.pop("joined"), "a PlanReport lacks or has too much: 'joined'"),
        (_set("passes", 0, "colour", to="red"), "a PassRecord lacks or has too much: 'colour'"),
        (lambda r: r["fallbacks"][0].pop("op"), "a Fallback lacks or has too much: 'op'"),
        (_set("flops", "cut", to=-1.0), r"report\.flops\.cut"),
        (_set("flops", "cut", to=math.nan), r"report\.flops\.cut"),
        (_set("passes", 0, "exact", to=1), r"report\.passes\.0\.exact"),
        (_set("fallbacks", 0, "bytes", to="5"), r"report\.fallbacks\.0\.bytes"),
        (_set("joined", "a.weight+1", 0, 1, to=0), r"report\.joined\.a\.weight\+1\.0\.1"),
        (_set("quality", "trials", 0, "good", to="yes"), r"report\.quality\.trials\.0\.good"),
    ],
)
def test_a_report_of_another_form_is_refused(change: Callable[[Any], None], problem: str) -> None:
    written = json.loads(dataclasses.replace(make_plan(2), report=REPORT).to_json())
    change(written["report"])
    with pytest.raises(BundleError, match=f"plan.json cannot be read: {problem}"):
        ExecutionPlan.from_json(json.dumps(written))


@pytest.mark.parametrize("name, kept", [("options", "PlanOptions"), ("report", "PlanReport")])
def test_objects_say_their_class(name: str, kept: str) -> None:
    for change in (lambda x: x.pop("@"), lambda x: x.update({"@": "Flops", "cut": 1.0, "whole": 1.0})):
        written = json.loads(make_plan(2).to_json())
        change(written[name])
        with pytest.raises(BundleError, match=f"not a {kept}|a Flops lacks or has too much"):
            ExecutionPlan.from_json(json.dumps(written))


def test_parts_have_the_rows_of_their_weight() -> None:
    plan = make_plan(2)
    check_report(PlanReport(joined={"first.weight": (("a", 1),)}), plan.weights)
    with pytest.raises(BundleError, match="the plan's report joins first.weight of other rows than it has"):
        check_report(PlanReport(joined={"first.weight": (("a", 1), ("b", 1))}), plan.weights)
    with pytest.raises(BundleError, match=r"the plan's report\.flops\.cut"):
        check_report(PlanReport(flops=Flops(-1.0, 0.0)), plan.weights)
