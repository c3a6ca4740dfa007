"""Rules by users: where they are registered, how long they hold, and what a mistake in one of them says."""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import districompile as dc
from districompile.ir.layout import Refused
from districompile.passes.rules import attention
from districompile.sharding.builder import ShardedValue, ShardingBuilder, rows_of
from districompile.sharding.registry import Rule, RuleSet, all_rules, find_rule, rules


@torch.library.custom_op("tests_own_rules::soften", mutates_args=())
def soften(x: Tensor) -> Tensor:
    """Each row plus half of the row above, which is zero beyond the border."""
    return x + torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :, :-1] / 2


@soften.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


OP = torch.ops.tests_own_rules.soften.default


class Net(nn.Module):
    def forward(self, sample: Tensor) -> Tensor:
        return soften(sample) * 2  # type: ignore[no-any-return]


SAMPLE = torch.linspace(-1, 1, 3 * 12 * 5).reshape(1, 3, 12, 5)
CAPTURED = dc.capture(Net(), (SAMPLE,))


def right(builder: ShardingBuilder, x: ShardedValue) -> ShardedValue:
    _, bounds, _ = rows_of(x)
    window = builder.fetch(x, [(a - 1, b) for a, b in itertools.pairwise(bounds)], purpose="conv")
    return builder.value(builder.emit(torch.ops.aten.slice.Tensor, builder.emit(OP, window), 2, 1), x.layout)


@pytest.fixture(autouse=True)
def scoped() -> Iterator[None]:
    with rules.scope():
        yield


def set_of(function: Any) -> RuleSet:
    made = RuleSet()
    made.rule(OP)(function)
    return made


def test_rule_set_holds_for_its_conversion_only() -> None:
    program = dc.convert(CAPTURED, ranks=3, rules=[set_of(right)], strict=True)
    torch.testing.assert_close(program.simulate(SAMPLE), Net()(SAMPLE))
    assert find_rule(OP) is None
    assert max(e.error for e in program.compare_nodes(SAMPLE)) < 1e-6  # by the program's own rules
    assert [f["reason"] for f in dc.convert(CAPTURED, ranks=3).report().fallbacks()] == ["the operator has no rule"]


def test_module_registers_its_rules_and_can_be_activated_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"import sys\nimport districompile as dc\n\nmine = sys.modules[{__name__!r}]\ndc.rule(mine.OP)(mine.right)\n"
    (tmp_path / "rules_of_a_user.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with rules.scope():
        dc.convert(CAPTURED, ranks=2, rules=["rules_of_a_user"], strict=True)
        found = find_rule(OP)
        assert found is not None and found.module == "rules_of_a_user" and not found.built_in
    assert find_rule(OP) is None
    dc.convert(CAPTURED, ranks=2, rules=[sys.modules["rules_of_a_user"]], strict=True)  # imported once, by now
    assert find_rule(OP) is not None


def test_scope_ends_with_an_exception_too() -> None:
    before = [r.op for r in all_rules()]
    with pytest.raises(KeyError), rules.scope(set_of(right)):
        assert find_rule(OP) is not None
        rules.remove(torch.ops.aten.conv2d.default)
        raise KeyError
    assert [r.op for r in all_rules()] == before


def test_second_rule_for_an_operator_is_refused() -> None:
    dc.rule(OP)(right)
    with pytest.raises(dc.ConvertError, match=rf"soften.default has a rule already \({__name__}\)"):
        dc.rule(OP)(right)
    dc.rule(OP, override=True)(right)


def test_what_is_no_rules_is_named() -> None:
    with pytest.raises(dc.ConvertError, match="neither a module nor its name nor a RuleSet"):
        dc.convert(CAPTURED, ranks=2, rules=[right])  # type: ignore[list-item]


def raises(builder: ShardingBuilder, x: ShardedValue) -> ShardedValue:
    return {}[x]  # type: ignore[no-any-return]


def node(builder: ShardingBuilder, x: ShardedValue) -> Any:
    return builder.emit(OP, x)


def taller(builder: ShardingBuilder, x: ShardedValue) -> ShardedValue:
    _, bounds, _ = rows_of(x)
    window = builder.fetch(x, [(a - 1, b) for a, b in itertools.pairwise(bounds)])
    return builder.value(builder.emit(OP, window), x.layout)


def other_shape(builder: ShardingBuilder, x: ShardedValue) -> ShardedValue:
    return builder.call(torch.ops.aten.unsqueeze.default, x, 0, layout=x.layout.insert(0))


def no_arguments() -> None: ...


def odd(builder: ShardingBuilder, x: ShardedValue) -> ShardedValue:
    raise ZeroDivisionError("odd")  # not among what a built-in rule may raise


@pytest.mark.parametrize(
    ("function", "cause", "message"),
    [
        (raises, KeyError, "KeyError"),
        (node, TypeError, "its result is a Node, not a ShardedValue"),
        (taller, RuntimeError, r"rank 0 computes \(1, 3, 13, 5\), layout"),
        (other_shape, ValueError, r"its result is \(1, 1, 3, 12, 5\), the operator's \(1, 3, 12, 5\)"),
        (no_arguments, TypeError, "takes 0 positional arguments"),
        (odd, ZeroDivisionError, "ZeroDivisionError: odd"),
    ],
)
def test_mistake_in_a_rule_is_an_error_with_its_cause(function: Any, cause: type[Exception], message: str) -> None:
    with pytest.raises(dc.ConvertError, match=message) as found:
        dc.convert(CAPTURED, ranks=2, rules=[set_of(function)])
    text = str(found.value)
    assert f"rule {__name__}.{function.__name__} failed for tests_own_rules.soften.default" in text
    assert "test_own_rules.py" in text and ", in forward" in text
    assert isinstance(found.value.__cause__, cause)


def test_refusing_is_no_mistake() -> None:
    def refuses(builder: ShardingBuilder, x: ShardedValue) -> ShardedValue:
        raise Refused("not today")

    program = dc.convert(CAPTURED, ranks=2, rules=[set_of(refuses)])
    assert [f["reason"] for f in program.report().fallbacks()] == ["not today"]


def test_built_in_rules_still_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_rule(torch.ops.aten.scaled_dot_product_attention.default)
    assert found is not None and found.built_in and found.module == attention.__name__
    rules.add(Rule(OP, raises, module=attention.__name__))
    (fallback,) = dc.convert(CAPTURED, ranks=2).report().fallbacks()
    assert fallback["reason"].startswith("the rule failed: KeyError")


def test_module_that_fails_is_named() -> None:
    made = types.ModuleType("not_importable")
    with pytest.raises(dc.ConvertError, match="rules not_importable: it cannot be imported"):
        dc.convert(CAPTURED, ranks=2, rules=[made])
