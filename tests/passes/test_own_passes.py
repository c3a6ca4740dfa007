"""Passes by users: placed by the stage that they need, with options, recorded as what they are, errors with a cause."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, fx, nn

import districompile as dc
from districompile.ir.graph import insert_before
from districompile.ir.meta import local_tensors
from districompile.ir.ops import ops
from districompile.ir.unit import CompilationUnit, Stage
from districompile.passes import pipelines
from districompile.passes.manager import pass_text

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        return nn.functional.silu(self.conv(sample.relu()))  # type: ignore[no-any-return]


SAMPLE = torch.linspace(-1, 1, 3 * 12 * 5).reshape(1, 3, 12, 5)
SEEN: list[tuple[str, str | None, str]] = []


@dataclasses.dataclass(frozen=True)
class _Watch:
    """Records at which stage and phase it runs."""

    layer: str = ""
    least: int = 1
    share: float | None = None
    parts: tuple[int, ...] = ()
    loud: bool = False
    mode: Literal["a", "b"] = "a"
    graph: fx.Graph | None = None

    name: ClassVar[str] = "watch"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "global"
    gives: ClassVar[Stage] = "global"

    def run(self, unit: CompilationUnit) -> None:
        SEEN.append((unit.stage, unit.phase, pass_text(self)))


class WatchGlobal(_Watch):
    name = "watch-global"


class WatchSpmd(_Watch):
    name, needs, gives = "watch-spmd", "spmd", "spmd"


class WatchLowered(_Watch):
    name, needs, gives = "watch-lowered", "lowered", "lowered"


@dataclasses.dataclass(frozen=True)
class Scale:
    """Multiplies what the activation is given: not the model any more."""

    by: float = 2.0

    name: ClassVar[str] = "scale"
    exact: ClassVar[bool] = False
    needs: ClassVar[Stage] = "global"
    gives: ClassVar[Stage] = "global"

    def run(self, unit: CompilationUnit) -> None:
        (node,) = (n for n in unit.graph.nodes if n.target is aten.silu.default)
        x = node.all_input_nodes[0]
        node.replace_input_with(x, insert_before(node, aten.mul.Tensor, x, self.by))


@dataclasses.dataclass(frozen=True)
class Fails:
    """Has a mistake."""

    name: ClassVar[str] = "fails"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "spmd"
    gives: ClassVar[Stage] = "spmd"

    def run(self, unit: CompilationUnit) -> None:
        {}["nothing"]


@dataclasses.dataclass(frozen=True)
class Jumps:
    """Claims to lower the graph."""

    name: ClassVar[str] = "jumps"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "spmd"
    gives: ClassVar[Stage] = "lowered"

    def run(self, unit: CompilationUnit) -> None: ...


@pytest.fixture(autouse=True)
def module_of_passes() -> Iterator[None]:
    SEEN.clear()
    made = types.ModuleType("passes_of_a_user")
    vars(made).update({c.__name__: c for c in (WatchGlobal, WatchSpmd, WatchLowered, Scale, Fails, Jumps)})
    sys.modules[made.__name__] = made
    yield
    del sys.modules[made.__name__]


@pytest.fixture(scope="module")
def captured() -> Any:
    torch.manual_seed(0)
    return dc.capture(Net().eval(), (SAMPLE,))


def test_passes_run_at_the_stage_that_they_need(captured: Any) -> None:
    added = [f"passes_of_a_user:Watch{stage}" for stage in ("Lowered", "Spmd", "Global")]  # the order does not matter
    program = dc.convert(captured, ranks=2, passes=added)
    assert [(stage, phase) for stage, phase, _ in SEEN] == [
        ("global", None), ("spmd", None), ("lowered", "displaced"), ("lowered", "exact"),
    ]  # fmt: skip
    names = [p.name for p in program.plan.report.passes]
    assert names.index("explicit-casts") < names.index("watch-global") < names.index("propagate-shardings")
    assert names.index("choose-displaced") < names.index("watch-spmd") < names.index("lower-collectives")
    assert names.index("group-norm-mode") < names.index("watch-lowered") and names.count("watch-lowered") == 2
    assert not program.inexact_passes()


def test_objects_classes_and_names_are_passes(captured: Any) -> None:
    program = dc.convert(captured, ranks=2, passes=[WatchGlobal(least=3), WatchSpmd, "cse"])
    assert [text for _, _, text in SEEN] == ["watch-global{least=3}", "watch-spmd"]
    assert "cse" in [p.name for p in program.plan.report.passes]


def test_options_are_fields() -> None:
    text = "passes_of_a_user:WatchSpmd{layer=down;least=3;share=0.5;parts=1+2;loud=yes;mode=b}"
    (made,) = pipelines.add_passes([text])
    assert made == WatchSpmd("down", 3, 0.5, (1, 2), True, "b")
    assert pass_text(made) == "watch-spmd{layer=down;least=3;share=0.5;parts=1+2;loud=True;mode=b}"
    (made,) = pipelines.add_passes(["passes_of_a_user:WatchSpmd{share=none}"])
    assert made == WatchSpmd()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passes_of_a_user:WatchSpmd{least=few}", r"least='few' is not a whole number"),
        ("passes_of_a_user:WatchSpmd{share=much}", r"share='much' is not a number"),
        ("passes_of_a_user:WatchSpmd{loud=perhaps}", r"loud='perhaps' is not true or false"),
        ("passes_of_a_user:WatchSpmd{mode=c}", r"mode='c' is not one of: a, b"),
        ("passes_of_a_user:WatchSpmd{parts=1+x}", r"parts='1\+x' is not a whole number"),
        ("passes_of_a_user:WatchSpmd{graph=x}", r"make the pass in Python"),
        ("passes_of_a_user:WatchSpmd{wide=1}", r"has no option 'wide=1'; write option=value, with: layer, least"),
        ("passes_of_a_user:WatchSpmd{layer}", r"has no option 'layer'; write option=value"),
        ("passes_of_a_user:WatchSpmd{least=1", r"cannot be read at"),
        ("passes_of_a_user:Nothing", r"passes_of_a_user has no Nothing"),
        ("nowhere:Pass", r"nowhere cannot be imported"),
        ("faster", r"unknown pass 'faster'.* or one of: .*cse"),
        ("partition", r"has to leave the stage as it is"),
        ("passes_of_a_user:Jumps", r"needs the spmd stage and gives the lowered stage"),
    ],
)
def test_mistakes_in_the_text_are_named(text: str, message: str) -> None:
    with pytest.raises(dc.ConvertError, match=message):
        pipelines.add_passes([text])


def test_what_is_no_pass_is_named() -> None:
    with pytest.raises(dc.ConvertError, match="lacks name, exact, needs, gives, run"):
        pipelines.add_passes([object()])  # type: ignore[list-item]


def test_inexact_passes_are_recorded_and_do_what_they_say(captured: Any) -> None:
    program = dc.convert(captured, ranks=2, passes=["passes_of_a_user:Scale{by=3}"])
    assert program.inexact_passes() == ["scale{by=3.0}"]
    (record,) = (p for p in program.plan.report.passes if p.name == "scale")
    assert not record.exact and not record.built_in and record.changed == {"aten.mul.Tensor": 1}
    plain = dc.convert(captured, ranks=2)
    assert not plain.inexact_passes()  # the displaced phase's own are built in
    conv = captured.weights["conv.weight"][1](), captured.weights["conv.bias"][1]()
    want = nn.functional.silu(3 * nn.functional.conv2d(SAMPLE.relu(), *conv, padding=1))
    torch.testing.assert_close(program.simulate(SAMPLE), want, rtol=1e-5, atol=1e-6)


def test_mistake_in_a_pass_has_its_cause(captured: Any) -> None:
    with pytest.raises(dc.ConvertError, match="pass fails failed: KeyError: 'nothing'") as found:
        dc.convert(captured, ranks=2, passes=[Fails()])
    assert isinstance(found.value.__cause__, KeyError)


@dataclasses.dataclass(frozen=True)
class CountTransfers:
    """Reads the lowered graph of each phase."""

    found: dict[str, int] = dataclasses.field(default_factory=dict)

    name: ClassVar[str] = "count-transfers"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "lowered"
    gives: ClassVar[Stage] = "lowered"

    def run(self, unit: CompilationUnit) -> None:
        transfers = [n for n in unit.graph.nodes if n.target is ops.exchange.default]
        self.found[str(unit.phase)] = sum(len(local_tensors(n)) for n in transfers)


def test_lowered_passes_see_the_transfers_of_both_phases(captured: Any) -> None:
    counter = CountTransfers()
    dc.convert(captured, ranks=2, passes=[counter])
    assert counter.found == {"displaced": 4, "exact": 4}  # a halo and the output, on two ranks
