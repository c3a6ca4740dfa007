"""The registry of operator rules: one rule an operator, looked up by overload.

A rule is called with the :class:`~districompile.cutter.Cutter` and the operator's own arguments, tensors as
:class:`~districompile.cutter.Value`. It emits the local computation and returns the result. It answers two questions:
which output rows does this rank make, and which input rows (or partial sums) does that take? What it cannot do it
refuses with a reason (:class:`~districompile.ir.layout.Refused`); the operator is then computed on gathered inputs.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from districompile.errors import ConvertError

RuleFunction = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Sample:
    """Arguments to try a rule with: ``args`` and ``kwargs`` of the operator; ``rows`` names the dim that is cut in
    each tensor argument, by position among the tensors (None: the tensor is given whole). ``used``: which of several
    results something reads (None: all)."""

    args: tuple[Any, ...]
    rows: tuple[int | None, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    used: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Rule:
    """A registered rule: its function, the kind of answer it gives (for the operator table), its samples, and whether
    it takes mixed dims (see :mod:`districompile.ir.layout`) as they are (others are given them unmixed), and results
    of fewer rows than ranks (others are then computed whole)."""

    op: Any
    function: RuleFunction
    kind: str
    samples: Callable[[], Iterable[Sample]] | None
    mixed: bool = False
    few: bool = False


_RULES: dict[Any, Rule] = {}


def rule(
    *targets: Any,
    kind: str,
    samples: Callable[[], Iterable[Sample]] | None = None,
    mixed: bool = False,
    few: bool = False,
    override: bool = False,
) -> Callable[[RuleFunction], RuleFunction]:
    """Register a rule for operator overloads (``aten.conv2d.default``, or an operator of the user's own).

    ``mixed``: the rule may be given dims that carry replicated parts beside the cut rows, and leaves them so.
    ``few``: it may be asked for results with fewer rows than ranks, and makes them whole.

    Raises :class:`ConvertError` if one of them has a rule already, unless ``override``: so a module imported under two
    names, or two extensions that claim one operator, are found out at import.
    """

    def register(function: RuleFunction) -> RuleFunction:
        load_rules()  # ours first: a rule that came before them would make them the ones to be refused
        for op in targets:
            if op in _RULES and not override:
                raise ConvertError(f"{op} has a rule already ({_RULES[op].function.__module__}); pass override=True")
            _RULES[op] = Rule(op, function, kind, samples, mixed, few)
        return function

    return register


def find_rule(op: Any) -> Rule | None:
    """The rule of an operator overload, or None."""
    load_rules()
    return _RULES.get(op)


def all_rules() -> Iterator[Rule]:
    """Every registered rule, in order of registration."""
    load_rules()
    return iter(list(_RULES.values()))


def load_rules() -> None:
    """Import the rules that ship with the package (once)."""
    importlib.import_module("districompile.passes.rules.table")


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
    """Whether an operator computes each output element from the elements at the same (broadcast) place."""
    if not isinstance(op, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in op.tags or op._schema.name in _POINTWISE_EXTRA
