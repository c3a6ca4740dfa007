"""The examples of docs/: a made-up operator gets a rule, a made-up pass changes which sites are displaced."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import districompile as dc
from districompile.cutter import Cutter, Value
from districompile.passmanager import import_pass

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield


def network() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    from sharpen import Network  # registers the operator and, as a rule module, its rule

    torch.manual_seed(0)
    return Network().eval(), {"sample": torch.randn(1, 3, 13, 8), "timestep": torch.tensor(0.5)}


def test_rule_of_the_docs_cuts_the_operator() -> None:
    module, kwargs = network()
    program = dc.convert(module, kwargs=kwargs, ranks=3, rules=["sharpen"], strict=True)
    with torch.no_grad():
        torch.testing.assert_close(program.simulate(**kwargs), module(**kwargs), rtol=1e-5, atol=1e-6)
    assert not program.report().fallbacks()


def test_wrong_rule_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    import districompile.registry as registry

    module, kwargs = network()
    program = dc.convert(module, kwargs=kwargs, ranks=3)
    errors = program.compare_nodes(**kwargs)
    assert len(errors) >= 12 and max(e.error for e in errors) < 1e-5

    def no_halo(cut: Cutter, x: Value, amount: float) -> Value:
        return cut.call(torch.ops.example.sharpen.default, x, amount, layout=x.layout)

    op = torch.ops.example.sharpen.default
    monkeypatch.setitem(registry._RULES, op, registry.Rule(op, no_halo, "window", None))
    first = next(e for e in dc.convert(module, kwargs=kwargs, ranks=3).compare_nodes(**kwargs) if e.error > 1e-5)
    assert first.op == "example.sharpen.default"
    assert "sharpen.py" in first.source


def test_unknown_operator_is_computed_whole_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import districompile.registry as registry

    module, kwargs = network()
    without = {op: r for op, r in registry._RULES.items() if "sharpen" not in str(op)}
    monkeypatch.setattr(registry, "_RULES", without)
    program = dc.convert(module, kwargs=kwargs, ranks=3)
    with torch.no_grad():
        torch.testing.assert_close(program.simulate(**kwargs), module(**kwargs), rtol=1e-5, atol=1e-6)
    (fallback,) = program.report().fallbacks()
    assert fallback["op"] == "example.sharpen.default"
    assert "no rule" in fallback["reason"]
    assert "sharpen.py" in fallback["source"]
    assert fallback["bytes"] == 8 * 13 * 8 * 4
    with pytest.raises(dc.ConvertError, match=r"strict: example.sharpen.default .*no rule.*writing-a-rule"):
        dc.convert(module, kwargs=kwargs, ranks=3, strict=True)


def test_pass_of_the_docs_changes_what_is_displaced() -> None:
    module, kwargs = network()
    captured = dc.capture(module, kwargs=kwargs)
    kinds = {}
    for name, passes in {"as it is": [], "changed": ["exact_attention:ExactAttention"]}.items():
        plan = dc.convert(captured, ranks=2, passes=passes, rules=["sharpen"]).plan
        kinds[name] = {c.kind for c in plan.collectives.values() if c.displaced}
    assert kinds == {"as it is": {"attention", "conv", "norm"}, "changed": {"conv", "norm"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exact_attention", "write module:Class"),
        ("nowhere.at_all:Pass", "nowhere.at_all cannot be imported"),
        ("exact_attention:Nothing", "has no Nothing"),
        ("exact_attention:Unit", "cannot be made without options"),
    ],
)
def test_bad_passes_are_named(text: str, message: str) -> None:
    with pytest.raises(dc.ConvertError, match=message):
        import_pass(text)


def test_second_rule_for_an_operator_is_refused() -> None:
    with pytest.raises(dc.ConvertError, match="has a rule already"):
        dc.rule(torch.ops.aten.conv2d.default, kind="window")(lambda cut, x: x)


def test_missing_rule_module_is_named() -> None:
    module, kwargs = network()
    with pytest.raises(dc.ConvertError, match=r"rules my_pkg\.rules: it cannot be imported"):
        dc.convert(module, kwargs=kwargs, ranks=2, rules=["my_pkg.rules"])
