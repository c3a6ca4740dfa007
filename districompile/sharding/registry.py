# SPDX-License-Identifier: Apache-2.0
"""The registry of operator rules: one rule an operator, looked up by overload.

A rule is called with the :class:`~districompile.sharding.builder.ShardingBuilder` and the operator's own arguments,
tensors as :class:`~districompile.sharding.builder.ShardedValue`. It emits the local computation and returns the result.
It answers two questions. Which output rows does this rank compute? Which input rows, or partial sums, does that need?
A rule raises :class:`~districompile.ir.layout.Refused` with a reason for what it cannot shard. The operator is then
computed on gathered inputs.

:data:`rules` is the registry that conversions use. ``with rules.scope():`` restores it at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import torch

from districompile.errors import ConvertError, Error
from districompile.ir.operators import declare_operator, is_foreign

RuleFunction = Callable[..., Any]
_BUILT_IN = "districompile.passes.rules."


@dataclasses.dataclass(frozen=True)
class Sample:
    """Example arguments, from which the property test of a rule is made.

    ``args`` and ``kwargs`` are the operator's. ``rows`` names the sharded dim of each tensor argument, by position
    among the tensors (None: replicated). ``used`` names which of several results are read (None: all).
    """

    args: tuple[Any, ...]
    rows: tuple[int | None, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    used: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Rule:
    """A registered rule: operator, function, samples, and the module that registered it.

    With ``partially_replicated`` the function accepts partially replicated dims (see :mod:`districompile.ir.layout`).
    Otherwise their replicas are dropped first. With ``allow_fewer_rows_than_ranks`` it can compute results of fewer
    rows than ranks. Otherwise such a result is computed on every rank.
    """

    op: Any
    function: RuleFunction
    samples: Callable[[], Iterable[Sample]] | None = None
    partially_replicated: bool = False
    allow_fewer_rows_than_ranks: bool = False
    module: str = ""

    @property
    def built_in(self) -> bool:
        """Whether the rule ships with the package. A mistake in any other rule is an error of the conversion."""
        return self.module.startswith(_BUILT_IN)


class RuleSet:
    """A set of rules by operator overload. ``convert(rules=[...])`` takes such sets, for that conversion only.

    ::

        mine = RuleSet()

        @mine.rule(torch.ops.example.sharpen.default)
        def sharpen(builder, x, amount): ...
    """

    def __init__(self) -> None:
        self._rules: dict[Any, Rule] = {}
        self._registered: dict[str, list[Rule]] = {}  # the rules that each module registered, in order

    def rule(
        self,
        *targets: Any,
        samples: Callable[[], Iterable[Sample]] | None = None,
        partially_replicated: bool = False,
        allow_fewer_rows_than_ranks: bool = False,
        override: bool = False,
    ) -> Callable[[RuleFunction], RuleFunction]:
        """Register a function as the rule of operator overloads (``aten.conv2d.default``, or a user's own operator).

        For ``samples``, ``partially_replicated`` and ``allow_fewer_rows_than_ranks`` see :class:`Rule`. Raise
        :class:`ConvertError` if one of the operators has a rule already, unless ``override``. A module that is imported
        under two names, and two extensions for one operator, are thus found at import.
        """
        module = str(sys._getframe(1).f_globals.get("__name__", ""))

        def register(function: RuleFunction) -> RuleFunction:
            for op in targets:
                self.add(
                    Rule(op, function, samples, partially_replicated, allow_fewer_rows_than_ranks, module),
                    override=override,
                )
            return function

        return register

    def add(self, rule: Rule, *, override: bool = False) -> None:
        """Add one rule. Raise :class:`ConvertError` if its operator has one already, unless ``override``."""
        known = self._rules.get(rule.op)
        if known is not None and not override:
            raise ConvertError(f"{rule.op} has a rule already ({known.module}); pass override=True")
        if is_foreign(rule.op):
            declare_operator(rule.op, rule.module)
        self._rules[rule.op] = rule
        self._registered.setdefault(rule.module, []).append(rule)

    def remove(self, op: Any) -> None:
        """Remove the rule of an operator, if it has one."""
        self._rules.pop(op, None)

    def find(self, op: Any) -> Rule | None:
        """Return the rule of an operator overload, or None."""
        return self._rules.get(op)

    def __iter__(self) -> Iterator[Rule]:
        return iter(list(self._rules.values()))

    @contextlib.contextmanager
    def scope(self, *more: RuleSet) -> Iterator[RuleSet]:
        """Restore the set's rules when the ``with`` block ends. Within the block, it has those of ``more``, too.

        A rule of ``more`` takes the place of another one for the same operator.
        """
        before = dict(self._rules)
        try:
            for other in more:
                self._rules |= {rule.op: rule for rule in other}
            yield self
        finally:
            self._rules = before

    def use(self, module: str | ModuleType) -> None:
        """Import a module that registers rules, or activate those that it registered when it was imported.

        Raise :class:`ConvertError` if it cannot be imported.
        """
        name = module if isinstance(module, str) else module.__name__
        try:
            importlib.import_module(name)
        except ImportError as e:
            raise ConvertError(f"rules {name}: it cannot be imported ({e})") from e
        except Error:
            raise
        except (Exception, SystemExit) as e:  # of the user's own code, or of a name that cannot be a module's
            raise ConvertError(f"rules {name}: it cannot be imported ({type(e).__name__}: {e})") from e
        for rule in self._registered.get(name, ()):
            self._rules.setdefault(rule.op, rule)


RuleSource = str | ModuleType | RuleSet

rules = RuleSet()
rule = rules.rule


def find_rule(op: Any) -> Rule | None:
    """Return the rule of an operator overload, or None."""
    return rules.find(op)


def all_rules() -> Iterator[Rule]:
    """Return every registered rule, in order of registration."""
    return iter(rules)


@contextlib.contextmanager
def rules_for(chosen: Iterable[RuleSource]) -> Iterator[None]:
    """Use rules for one conversion: those of modules, by name or imported, and those of rule sets.

    Rule sets hold until the ``with`` block ends. Modules stay registered, as by any import of them. Raise
    :class:`ConvertError` for a module that cannot be imported.
    """
    sets: list[RuleSet] = []
    for item in chosen:
        if isinstance(item, RuleSet):
            sets.append(item)
        elif isinstance(item, str | ModuleType):
            rules.use(item)
        else:
            raise ConvertError(f"rules: {item!r} is neither a module nor its name nor a RuleSet")
    with rules.scope(*sets) if sets else contextlib.nullcontext():
        yield


_POINTWISE_EXTRA = {
    "aten::_to_copy", "aten::masked_fill", "aten::where", "aten::zeros_like", "aten::ones_like", "aten::full_like",
    "aten::empty_like", "aten::clamp", "aten::silu", "aten::gelu", "aten::hardtanh", "aten::leaky_relu", "aten::elu",
    "aten::rsub", "aten::lerp", "aten::addcmul", "aten::mish", "aten::softplus", "aten::hardswish", "aten::selu",
    "aten::threshold", "aten::log_sigmoid", "aten::rrelu", "aten::celu", "aten::hardsigmoid",
    "aten::softshrink", "aten::hardshrink", "aten::relu6", "aten::clip", "aten::nan_to_num", "aten::floor_divide",
    "aten::fake_quantize_per_tensor_affine", "aten::float_power",
    "aten::logical_and", "aten::logical_or", "aten::logical_not", "aten::logical_xor", "aten::isfinite", "aten::copy",
    "aten::addcdiv", "aten::fill", "aten::polar", "aten::complex", "aten::real", "aten::imag", "aten::bitwise_and",
    "aten::relu", "aten::square", "aten::softsign", "aten::special_expm1", "aten::special_expit", "aten::rad2deg",
}  # fmt: skip


def is_pointwise(op: Any) -> bool:
    """Return whether an operator computes each output element from the elements at the same (broadcast) position."""
    if not isinstance(op, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in op.tags or op._schema.name in _POINTWISE_EXTRA
