"""What a caller can get wrong is one clear error; what passes do is recorded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import districompile as dc
from districompile.ir.unit import CompilationUnit, Options, Stage
from districompile.passes import pipelines
from districompile.passes.manager import PassManager, pass_text
from districompile.passes.text import parse_passes


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, sample: Tensor, timestep: Tensor | float, scale: float = 1.0, more: Any = None) -> Any:
        out = self.conv(sample) * scale + timestep
        return {"out": out, "mean": out.mean()} if more is None else out + more["bias"][0]


def sample(rows: int = 8) -> Tensor:
    return torch.randn(1, 3, rows, 6, generator=torch.Generator().manual_seed(0))


def test_nested_inputs_and_outputs_keep_their_structure() -> None:
    module = Net().eval()
    program = dc.convert(module, (sample(),), {"timestep": 3, "more": {"bias": [torch.ones(1, 3, 1, 1)]}}, ranks=2)
    assert [i.path for i in program.plan.inputs] == ["sample", "timestep", "more.bias.0"]
    want = module(sample(), 3, more={"bias": [torch.ones(1, 3, 1, 1) * 2]})
    got = program.simulate(sample(), 3, more={"bias": [torch.ones(1, 3, 1, 1) * 2]})
    torch.testing.assert_close(got, want)
    found = dc.convert(module, (sample(), 3.0), ranks=2).simulate(sample(), 4.0)
    torch.testing.assert_close(found, module(sample(), 4.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 9}, r"8 rows are too few for 9 ranks; use at most 8 ranks"),
        ({"ranks": 0}, "ranks must be at least 1"),
        ({"ranks": 3, "cfg": "split"}, "3 is odd"),
        ({"ranks": 2, "cfg": "split"}, "halves the batch, which is 1"),
        ({"ranks": 2, "groupnorm": "fast"}, "unknown groupnorm mode 'fast'; there are: forecast, corrected_async"),
        ({"ranks": 2, "displace": "walls"}, "cannot displace 'walls'"),
        ({"ranks": 2, "warmup_steps": 0}, "start from an exact one"),
        ({"ranks": 2, "rows": {"image": 2}}, "rows names 'image', but the tensor inputs are: sample, timestep"),
        ({"ranks": 2, "rows": {"sample": 5}}, "there is no dim 5"),
        ({"ranks": 2, "stop_after": "nothing"}, "no pass named 'nothing'"),
        ({"ranks": 2, "skip": ["partition"]}, "partition cannot be skipped"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(dc.ConvertError, match=message):
        dc.convert(Net().eval(), (sample(), 1.0), **options)


def test_rows_are_asked_for_where_they_cannot_be_told() -> None:
    with pytest.raises(dc.ConvertError, match=r"cannot tell which input holds the image's rows \(input \[2, 7, 4\]\)"):
        dc.convert(nn.Linear(4, 4), (torch.zeros(2, 7, 4),), ranks=2)


class Picks(nn.Module):
    def forward(self, sample: Tensor) -> Tensor:
        return sample.flatten()[torch.nonzero(sample.flatten() > 0)].sum() + sample


def test_sizes_that_depend_on_values_are_refused_with_the_line() -> None:
    with pytest.raises(dc.CaptureError, match=r"aten.nonzero.*in forward\) makes a tensor whose size depends"):
        dc.convert(Picks(), (sample(),), ranks=2)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 3, batch_first=True, dropout=0.5, num_layers=2)

    def forward(self, sample: Tensor) -> Tensor:
        out: Tensor = self.lstm(sample.flatten(2).transpose(1, 2))[0].transpose(1, 2).reshape(sample.shape)
        return out + sample


def test_recurrent_layers_are_computed_whole_and_named() -> None:
    module = Recurrent().eval()
    program = dc.convert(module, (sample(),), ranks=2)
    torch.testing.assert_close(program.simulate(sample()), module(sample()))
    assert [f["op"] for f in program.report().fallbacks()] == ["aten.lstm.input"]


class Branches(nn.Module):
    def forward(self, sample: Tensor) -> Tensor:
        return sample if sample.sum() > 0 else -sample


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, sample: Tensor) -> Tensor:
        self.calls += 1
        return sample * self.calls


def test_module_that_cannot_be_exported_says_where_and_why(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(dc.CaptureError, match=r"Branches cannot be exported: .*test_convert.py:\d+, in forward") as e:
        dc.convert(Branches(), (sample(),), ranks=2)
    assert "\n" not in str(e.value)
    assert capfd.readouterr().err == ""


def test_module_that_writes_to_its_buffers_is_refused() -> None:
    with pytest.raises(dc.CaptureError, match="writes to calls"):
        dc.convert(Counts(), (sample(),), ranks=2)


def test_wrong_call_is_named() -> None:
    with pytest.raises(dc.InputError, match="Net.forward: missing a required argument"):
        dc.convert(Net(), (), ranks=2)
    program = dc.convert(Net().eval(), (sample(), 1.0), ranks=2)
    with pytest.raises(dc.InputError, match="converted for 8x6, called with 9x6"):
        program.simulate(sample(9), 1.0)


def test_meta_module_converts_but_needs_weights_to_run() -> None:
    with torch.device("meta"):
        module = Net().eval()
    program = dc.convert(module, (sample().to("meta"), torch.tensor(1.0)), ranks=2)
    assert program.report().cut_share() == 1
    with pytest.raises(dc.CaptureError, match="conv.weight is on the meta device"):
        program.simulate(sample(), 1.0)


class Mixed(nn.Module):
    """SDXL's time embedding in small: half and float meet."""

    def forward(self, sample: Tensor, other: Tensor) -> Tensor:
        return torch.cat([sample, other], 1) + sample.mean(1, keepdim=True)


def test_promotions_become_casts() -> None:
    args = (sample().half(), sample())
    program = dc.convert(Mixed(), args, ranks=2)
    assert program.graph_text().count("aten._to_copy(") == 2
    torch.testing.assert_close(program.simulate(*args), Mixed()(*args))


def test_passes_are_recorded_dumped_and_stopped(tmp_path: Path) -> None:
    module = Net().eval()
    program = dc.convert(module, (sample(), 1.0), ranks=2, dump=tmp_path, stop_after="propagate-shardings")
    names = [p.name for p in sorted(tmp_path.glob("*.txt"))]
    order = ["captured", "drop-noops", "fuse-norms", "explicit-casts", "propagate-shardings"]
    assert names == [f"0{i}-{name}.txt" for i, name in enumerate(order)]
    assert [p.stem for p in sorted(tmp_path.glob("*.diff"))] == [n.removesuffix(".txt") for n in names[1:]]
    assert "aten.conv2d(%sample, @conv.weight" in program.graph_text()
    with pytest.raises(dc.ConvertError, match="stops after a pass"):
        program.simulate(sample(), 1.0)
    whole = dc.convert(module, (sample(), 1.0), ranks=2, skip=["drop-noops"])
    assert whole.plan.report.passes[0].name == "fuse-norms"


def test_pipelines_have_a_text_form() -> None:
    options = Options(2, displace=("conv",))
    passes = [*pipelines.cut(options), *pipelines.lower(options), *pipelines.displaced(options)]
    texts = [pass_text(p) for p in passes]
    assert "choose-displaced{purposes=conv}" in texts
    kept = [p for p in passes if p.needs == p.gives]
    assert parse_passes(",".join(pass_text(p) for p in kept), pipelines.PASSES) == kept
    with pytest.raises(dc.ConvertError, match="unknown pass 'fly'"):
        parse_passes("drop-noops,fly", pipelines.PASSES)
    with pytest.raises(dc.ConvertError, match="has no option 'speed=2'"):
        parse_passes("group-norm-mode{speed=2}", pipelines.PASSES)


@dataclasses.dataclass(frozen=True)
class Breaks:
    """A pass that leaves a node with results for too few ranks."""

    name: ClassVar[str] = "breaks"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "spmd"
    gives: ClassVar[Stage] = "spmd"

    def run(self, unit: CompilationUnit) -> None:
        node = next(n for n in unit.graph.nodes if n.op == "call_function")
        node.meta["local"] = node.meta["local"][:1]


def test_verifier_names_the_pass_and_the_node() -> None:
    with pytest.raises(dc.ConvertError, match="after pass breaks: .* has results for 1 ranks, not 2"):
        dc.convert(Net().eval(), (sample(), 1.0), ranks=2, passes=[Breaks()])


def test_pass_out_of_place_is_named() -> None:
    captured = dc.capture(Net().eval(), (sample(), 1.0))
    unit = CompilationUnit(captured.copy_graph(), "global", captured, Options(2), {"sample": 2})
    with pytest.raises(dc.ConvertError, match="breaks needs the spmd stage, the graph is global"):
        PassManager().run(unit, [Breaks()])
