# SPDX-License-Identifier: Apache-2.0
"""A module whose calls do not repeat has no engines of displaced steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import districompile as dc
from districompile.bundle.bundle import Bundle
from districompile.cli import main


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(4, 8, 3, 1, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 3, 1, 1)

    def forward(self, sample: Tensor) -> Tensor:
        x = nn.functional.interpolate(torch.relu(self.norm(self.first(sample))), scale_factor=2.0)
        out: Tensor = self.last(x)
        return out


class Step(Decoder):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(sample + timestep)


SAMPLE = torch.randn(1, 4, 12, 8)


def convert(module: nn.Module, phases: str) -> dc.Program:
    kwargs = {"sample": SAMPLE} | ({"timestep": torch.tensor(0.5)} if isinstance(module, Step) else {})
    torch.manual_seed(0)
    return dc.convert(module.eval(), kwargs=kwargs, ranks=3, phases=phases, groupnorm="forecast", optimise="all")


@pytest.mark.parametrize(
    ("module", "phases", "want"),
    [(Decoder, "auto", 1), (Decoder, "both", 2), (Decoder, "exact", 1), (Step, "auto", 2), (Step, "exact", 1)],
)
def test_which_phases_are_compiled(module: type[nn.Module], phases: str, want: int) -> None:
    program = convert(module(), phases)
    assert program.phases == ("exact", "displaced")[:want] == tuple(program.plan.phases)
    assert any(c.displaced for c in program.plan.collectives.values()) == (want == 2)


def test_a_bundle_of_the_exact_phase(tmp_path: Path) -> None:
    module = Step().eval()
    program = convert(module, "exact")
    program.save(tmp_path / "one", backend="eager")
    convert(module, "both").save(tmp_path / "two", backend="eager")
    one, two = (len(list((tmp_path / name / "engines").iterdir())) for name in ("one", "two"))
    assert one < two
    loaded = dc.load(tmp_path / "one", lockstep=True)
    for number in range(8):  # more than the exact steps of an image
        timestep = torch.tensor(0.9 - 0.1 * number)
        with torch.no_grad():
            want = module(SAMPLE, timestep)
        assert (loaded(sample=SAMPLE, timestep=timestep) - want).norm() <= 1e-5 * want.norm()
    assert loaded.image_calls["displaced"] == 0
    text = str(loaded.plan and program.report())
    assert "exact step" in text and "displaced step" not in text


def test_the_phase_that_is_missing(tmp_path: Path) -> None:
    program = convert(Decoder(), "auto")
    program.simulate(sample=SAMPLE)
    with pytest.raises(dc.InputError, match="exact phase only: convert again with --phases both"):
        program.simulate(sample=SAMPLE, phase="displaced")
    program.save(tmp_path / "b", backend="eager")
    with pytest.raises(dc.InputError, match="exact phase only: convert again with --phases both"):
        dc.load(tmp_path / "b", lockstep=True).phase = "displaced"
    with pytest.raises(dc.ConvertError, match="there are auto, both, exact"):
        convert(Decoder(), "displaced")


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A factory of this file makes a module without a timestep."""
    monkeypatch.chdir(tmp_path)
    made = "from tests.plan.test_phases import SAMPLE, Decoder\ndef make():\n    return Decoder(), (SAMPLE,), {}\n"
    (tmp_path / "a_decoder.py").write_text(made)
    command = ["convert", "a_decoder:make", "--gpus", "2", "--backend", "eager"]
    for options, want in (([], {"exact"}), (["--phases", "both"], {"exact", "displaced"})):
        assert main.main([*command, *options, "--out", "b", "--force"]) == 0
        assert Bundle.open(tmp_path / "b").plan.phases.keys() == want
