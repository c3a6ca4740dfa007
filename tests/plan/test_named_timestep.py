"""The input that is the time of a step: one with a usual name, or the one that was named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import districompile as dc


class Net(nn.Module):
    """A network whose noise level is called ``level``, and has an offset that stays the same in an image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.offset = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, sample: Tensor, level: Tensor, text: Tensor) -> Tensor:
        return self.conv(sample) * level + self.offset(text)[:, :, None, None]  # type: ignore[no-any-return]


class Usual(nn.Module):
    def forward(self, x: Tensor, noise_labels: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 3, 1, 1) * noise_labels


def inputs(number: float) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"sample": torch.randn(1, 4, 12, 8), "level": torch.tensor(number), "text": torch.randn(1, 4)}


def phases_of_an_image(program: dc.Program, folder: Path) -> dict[str, int]:
    program.save(folder / "b", backend="eager")
    loaded = dc.load(folder / "b", lockstep=True)
    call = inputs(1.0)
    for step in range(8):
        loaded(**{**call, "level": torch.tensor(1.0 - 0.1 * step)})
    return loaded.image_calls


def test_a_named_timestep(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Net().eval()
    usual = {"ranks": 2, "warmup_steps": 2, "drift_limit": 0, "optimise": "all"}
    program = dc.convert(module, kwargs=inputs(0.9), timestep="level", phases="auto", **usual)
    assert program.phases == ("exact", "displaced")
    assert program.plan.timestep_path == "level" and program.plan.options.example_timestep == pytest.approx(0.9)
    assert program.plan.options.conditioning == ("text",)  # it is kept from the exact steps, and the level is not
    assert phases_of_an_image(program, tmp_path) == {"exact": 2, "displaced": 6}
    unnamed = dc.convert(module, kwargs=inputs(0.9), phases="auto", **usual)
    assert unnamed.phases == ("exact",) and unnamed.plan.timestep_path is None
    assert "no input is known as the time of a step: if it is level, name it" in " ".join(str(unnamed.report()).split())
    assert "time of a step" not in str(program.report())
    with pytest.raises(dc.ConvertError, match="a module without a timestep has none"):
        dc.convert(module, kwargs=inputs(0.9), ranks=2, reuse="deep=2")


def test_a_number_becomes_an_input() -> None:
    program = dc.convert(Net().eval(), kwargs={**inputs(0.9), "level": 0.9}, ranks=2, timestep="level")
    assert program.plan.timestep_path == "level"


def test_a_shape_that_is_added_has_the_same(tmp_path: Path) -> None:
    from districompile.bundle.bundle import Bundle
    from districompile.shapes import convert_like

    module = Net().eval()
    dc.convert(module, kwargs=inputs(0.9), ranks=2, timestep="level").save(tmp_path / "b", backend="eager")
    other = {**inputs(0.9), "sample": torch.randn(1, 4, 20, 8)}
    assert convert_like(Bundle.open(tmp_path / "b"), module, kwargs=other).plan.timestep_path == "level"


@pytest.mark.parametrize("name", ["lev", "", "sample.level"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(dc.Error, match="has no such tensor or number, it has sample, level, text"):
        dc.convert(Net().eval(), kwargs=inputs(0.9), ranks=2, timestep=name)


def test_an_image_is_no_timestep() -> None:
    with pytest.raises(dc.ConvertError, match="no such input beside its images: it has level, text"):
        dc.convert(Net().eval(), kwargs=inputs(0.9), ranks=2, timestep="sample")


def test_a_module_without_small_inputs_needs_none() -> None:
    program = dc.convert(nn.Conv2d(4, 4, 3, padding=1), (torch.randn(1, 4, 12, 8),), ranks=2, phases="auto")
    assert program.plan.timestep_path is None and "time of a step" not in str(program.report())


def test_names_of_other_code_bases() -> None:
    program = dc.convert(Usual(), (torch.randn(1, 4, 12, 8), torch.tensor([0.5])), ranks=2, phases="auto")
    assert program.plan.timestep_path == "noise_labels" and program.phases == ("exact", "displaced")


class Both(nn.Module):
    def forward(self, x: Tensor, noise_level: Tensor, timestep: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 3, 1, 1) * timestep + noise_level


def test_the_most_usual_of_several_names() -> None:
    call = torch.randn(1, 4, 12, 8), torch.tensor([0.1]), torch.tensor([0.5])
    plan = dc.convert(Both(), call, ranks=2).plan
    assert plan.timestep_path == "timestep" and plan.options.example_timestep == 0.5
