"""The options of a plan: typed, frozen, and checked where a bundle is read."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from helpers_toy import make_plan

from districompile.errors import BundleError
from districompile.plan.options import PlanOptions, check_options
from districompile.plan.plan import ExecutionPlan


def test_options_survive_json() -> None:
    options = PlanOptions(
        ranks=2, groupnorm="sync", displace=("conv", "norm"), cfg_inputs=(), guidance="batch", images=3,
        dtype="float16", height=64, example_timestep=7,
    )  # fmt: skip
    plan = dataclasses.replace(make_plan(2), options=options)
    assert ExecutionPlan.from_json(plan.to_json()).options == options
    assert json.loads(plan.to_json())["options"]["images"] == 3  # one object


def test_options_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_plan(2).options.images = 2  # type: ignore[misc]


def test_plain_data_has_what_is_set() -> None:
    found = PlanOptions(height=64).to_dict()
    assert found["height"] == 64 and found["warmup_steps"] == 4 and "width" not in found


@pytest.mark.parametrize(
    "name, value",
    [
        ("cfg", "other"), ("groupnorm", "async"), ("warmup_steps", 0), ("warmup_steps", "4"), ("drift_limit", -1.0),
        ("images", 0), ("dtype", "float8"), ("collectives", "elsewhere"), ("guidance", "both"), ("strict", 1),
    ],
)  # fmt: skip
def test_options_of_another_type_or_range_are_refused(name: str, value: Any) -> None:
    plan = make_plan(2)
    wrong = dataclasses.replace(plan.options, **{name: value})
    with pytest.raises(BundleError, match=rf"the plan's options\.{name}"):
        check_options(wrong, plan.ranks, plan.inputs)
    written = json.loads(plan.to_json())
    written["options"][name] = value
    with pytest.raises(BundleError, match=rf"plan.json cannot be read: options\.{name}"):
        ExecutionPlan.from_json(json.dumps(written))


def test_unknown_and_missing_options_are_refused() -> None:
    for change in (lambda o: o.update(colour="red"), lambda o: o.pop("images")):
        written = json.loads(make_plan(2).to_json())
        change(written["options"])
        with pytest.raises(BundleError, match="a PlanOptions lacks or has too much: '(colour|images)'"):
            ExecutionPlan.from_json(json.dumps(written))


@pytest.mark.parametrize(
    "options, problem",
    [
        (PlanOptions(ranks=3), "the plan is for 2 ranks, and its options for 3"),
        (PlanOptions(conditioning=("text",)), "the plan's options name the input 'text', which it does not have"),
        (PlanOptions(cfg="split", cfg_inputs=()), "the plan is for cfg split, and halves no image"),
    ],
)
def test_options_that_contradict_the_plan_are_refused(options: PlanOptions, problem: str) -> None:
    plan = make_plan(2)
    with pytest.raises(BundleError, match=problem):
        check_options(options, plan.ranks, plan.inputs)


def test_what_follows_from_the_options() -> None:
    plan = make_plan(2, cfg="split")
    sample, timestep = plan.inputs
    assert plan.guidance_halves == 2 and plan.world_size == 4 and plan.timestep_path == "timestep"
    assert plan.is_halved(sample) and plan.called_spec(sample).shape == (4, 7)
    listed = dataclasses.replace(plan, options=dataclasses.replace(plan.options, cfg_inputs=("sample",)))
    assert listed.is_halved(sample) and not listed.is_halved(timestep)
    plain = make_plan(3)
    assert plain.world_size == 3 and not plain.is_halved(sample) and plain.called_spec(sample) == sample.spec
