"""``Program.simulate`` plans its memory, and gives the bits of the reference executor, which does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import districompile as dc
from districompile.runtime.calls.inputs import InputChecker
from tests.reference.runner import ReferenceRunner
from tests.small_models import captured, first, reference


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"groupnorm": "sync"}, marks=pytest.mark.slow), {"optimise": "all"}],
    ids=["default", "sync", "all"],
)
@pytest.mark.parametrize("name", ["sdxl", "unet2d"])
def test_simulate_gives_the_bits_of_the_reference(name: str, options: dict[str, Any]) -> None:
    _, kwargs, _ = reference(name, 1, 20, 8)
    program = dc.convert(captured(name, 1, 20, 8), ranks=3, **options)
    runner = ReferenceRunner(program.plan, program._engines(), dense=True)
    check = InputChecker(program.plan, torch.device("cpu"))
    for i, phase in enumerate(("exact", "displaced", "displaced", "exact", "displaced")):
        given = {**kwargs, "sample": kwargs["sample"] * (1 + i / 10)}
        got = first(program.simulate(phase=phase, **given))  # type: ignore[arg-type]
        call = check((), given)
        with torch.no_grad():
            by_rank = runner(phase, {spec.value: call.tensors[spec.path] for spec in program.plan.inputs})
        for rank, leaves in enumerate(by_rank):
            assert torch.equal(got, leaves[0]), f"call {i}, {phase}, rank {rank}"


def test_the_comparison_can_fail() -> None:
    """A displaced call reads what the call before it left: with another one before it, the bits differ."""
    _, kwargs, _ = reference("sdxl", 1, 20, 8)
    program = dc.convert(captured("sdxl", 1, 20, 8), ranks=3)
    moved = {**kwargs, "sample": kwargs["sample"] * 1.1}
    outputs = []
    for before in (kwargs, moved):
        program.reset()
        program.simulate(**before)
        outputs.append(first(program.simulate(phase="displaced", **moved)))
    assert not torch.equal(*outputs)
