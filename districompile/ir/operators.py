# SPDX-License-Identifier: Apache-2.0
"""The registry of operators of other packages: extensions declare them, and a loaded bundle finds them by name.

A bundle holds names of operators, by which nothing is ever imported. PyTorch's own operators are known. Another one has
to be *declared* by the caller's packages: with a rule, a decomposition or an ONNX translation, or with
:func:`declare_operator` alone. An operator that is registered in the process, but not declared, is refused. A bundle
could otherwise call any operator that a library has registered, such as one that writes files.

Operators that write to their arguments have a functional form (:func:`functional_form`), by which graphs hold them.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from districompile.common.extensions import load_extensions
from districompile.errors import BackendError, ConvertError

NAMESPACES = ("aten", "prims", "districompile")
"""Namespaces of PyTorch and of districompile: operators in them are known without a declaration."""

FUNCTIONAL = "functional:"
"""The prefix of the names of functional forms in a bundle."""

_LIBRARY = "districompile_functional"
_NAME = re.compile(r"[A-Za-z_]\w*\.\w+\.\w+", re.ASCII)

Operator = torch._ops.OpOverload


@dataclasses.dataclass(frozen=True)
class Provider:
    """The module that declared an operator, and the installed package that the module belongs to, with its version."""

    module: str
    package: str | None = None
    version: str | None = None

    def __str__(self) -> str:
        named = "" if self.package is None else f"the package {self.package} {self.version}, "
        return f"{named}module {self.module}"


@dataclasses.dataclass
class _Declared:
    op: Operator
    module: str
    decomposition: Callable[..., Any] | None = None
    onnx: Callable[..., Any] | None = None


_DECLARED: dict[str, _Declared] = {}
_FORMS: dict[Operator, Operator] = {}  # functional form -> the operator that it stands for


def declare_operator(op: object, module: str) -> None:
    """Declare an operator overload, so that bundles may name it. ``module`` is the declaring module.

    Raise :class:`ConvertError` for anything but an overload. Operators of :data:`NAMESPACES` need no declaration.
    """
    if not isinstance(op, Operator):
        hint = f": did you mean {op}.default?" if isinstance(op, torch._ops.OpOverloadPacket) else ""
        raise ConvertError(f"{op} is not an operator overload (torch.ops.NAMESPACE.NAME.OVERLOAD){hint}")
    if is_foreign(op):
        _entry(op, module)


def decompose_with(op: object, function: Callable[..., Any], module: str) -> None:
    """Register the decomposition of an operator: a function of the same arguments that calls other operators only."""
    _of_package(op, module).decomposition = function


def translate_with(op: object, function: Callable[..., Any], module: str) -> None:
    """Register an ONNX translation: a function that :func:`torch.onnx.export` takes in ``custom_translation_table``."""
    _of_package(op, module).onnx = function


def _of_package(op: object, module: str) -> _Declared:
    declare_operator(op, module)
    if not isinstance(op, Operator) or not is_foreign(op):
        raise ConvertError(f"{op} is an operator of PyTorch or districompile: only a package's own can be described")
    return _entry(op, module)


def _entry(op: Operator, module: str) -> _Declared:
    return _DECLARED.setdefault(name_of(op), _Declared(op, module))


def is_foreign(op: object) -> bool:
    """Return whether ``op`` is an operator of another package."""
    return isinstance(op, Operator) and op.namespace not in NAMESPACES


def name_of(op: Operator) -> str:
    """Return the name of an operator in bundles, such as ``"example.sharpen.default"``.

    The names of functional forms begin with :data:`FUNCTIONAL`.
    """
    return f"{FUNCTIONAL}{_FORMS[op]}" if op in _FORMS else str(op)


def is_declared(op: Operator) -> bool:
    """Return whether ``op`` is declared, so far or by an installed package.

    For a functional form, the operator that it stands for counts.
    """
    return find_operator(name_of(op)) is op


def find_operator(name: str) -> Operator | None:
    """Return the declared operator called ``name``, or None. Load installed extensions if it is not known yet."""
    base = name.removeprefix(FUNCTIONAL)
    if _NAME.fullmatch(base) is None or base.split(".")[0] in NAMESPACES:
        return None
    if name not in _DECLARED and base not in _DECLARED:
        load_extensions()
    if name in _DECLARED:
        return _DECLARED[name].op
    if name != base and base in _DECLARED and _DECLARED[base].op._schema.is_mutable:
        return functional_form(_DECLARED[base].op)
    return None


def decomposition_of(op: object) -> Callable[..., Any] | None:
    """Return the registered decomposition of an operator, or None. A functional form has that of its operator."""
    found = _declared(op)
    if found is None and isinstance(op, Operator) and op in _FORMS:
        base = _declared(_FORMS[op])
        if base is not None and base.decomposition is not None:
            return _functional(_FORMS[op], base.decomposition)
    return None if found is None else found.decomposition


def translation_of(op: object) -> Callable[..., Any] | None:
    """Return the ONNX translation that was registered for an operator, or None."""
    found = _declared(op)
    return None if found is None else found.onnx


def _declared(op: object) -> _Declared | None:
    return _DECLARED.get(name_of(op)) if isinstance(op, Operator) else None


def provider_of(op: Operator) -> Provider:
    """Return the provider of ``op``, as far as it is known. A functional form has the provider of its operator."""
    found = _DECLARED.get(name_of(op)) or _DECLARED.get(str(_FORMS.get(op, op)))
    if found is None:
        return Provider("unknown")
    packages = importlib.metadata.packages_distributions().get(found.module.partition(".")[0], ())
    if not packages:
        return Provider(found.module)
    return Provider(found.module, packages[0], importlib.metadata.version(packages[0]))


def foreign_operators(graph: fx.Graph) -> list[Operator]:
    """Return the operators of other packages that a graph calls, each once, in order."""
    return list(dict.fromkeys(n.target for n in graph.nodes if isinstance(n.target, Operator) and is_foreign(n.target)))


def functional_form(op: Operator) -> Operator:
    """Return the functional form of an operator that writes to its arguments.

    It takes the same arguments and writes to none of them. It returns the operator's results, followed by the new value
    of each argument that the operator writes to. Rules, decompositions and ONNX translations may be registered for it.
    Raise :class:`ConvertError` for an operator that writes to lists of tensors, or to none of its arguments.
    """
    for form, base in _FORMS.items():
        if base is op:
            return form
    written = _written(op)
    if not written:
        raise ConvertError(f"{op} writes to no tensor argument of its own: it has no functional form")
    name = re.sub(r"\W", "__", str(op))
    # (Tensor(a0!) x, float by) -> ()   becomes   (Tensor x, float by) -> Tensor
    arguments = re.sub(r"(?<=Tensor)\([\w|* ]+!?(?: -> [\w|* ]+)?\)", "", str(op._schema))
    arguments = arguments[arguments.index("(") : arguments.rindex(" -> ")]
    results = [*(str(r.type) for r in op._schema.returns), *("Tensor" for _ in written)]
    schema = f"{arguments} -> {results[0] if len(results) == 1 else '(' + ', '.join(results) + ')'}"
    function = _functional(op, op)
    torch.library.custom_op(f"{_LIBRARY}::{name}", function, mutates_args=(), schema=schema).register_fake(function)
    form = getattr(getattr(torch.ops, _LIBRARY), name).default
    if not isinstance(form, Operator):
        raise TypeError(f"{form} is not an operator")
    _FORMS[form] = op
    return form


def _written(op: Operator) -> dict[int, str]:
    """Return the arguments that an operator writes to: names by position."""
    found = {i: a for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write}
    for argument in found.values():
        if str(argument.type) not in ("Tensor", "Optional[Tensor]"):
            raise ConvertError(f"{op} writes to {argument.name}, a {argument.type}: only tensors can be written to")
    return {i: a.name for i, a in found.items()}


def _functional(op: Operator, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``function``, which writes to its arguments as ``op`` does: call it on copies, and return these, too."""
    written = _written(op)

    def call(*args: Any, **kwargs: Any) -> Any:
        copies: list[Tensor] = []
        given, named = list(args), dict(kwargs)
        for i, name in written.items():
            copies.append((given[i] if i < len(given) else named[name]).clone())
            if i < len(given):
                given[i] = copies[-1]
            else:
                named[name] = copies[-1]
        result = function(*given, **named)
        results = [] if result is None else list(result) if isinstance(result, tuple | list) else [result]
        found = (*results, *copies)
        return found[0] if len(found) == 1 else found

    return call


def replace_functionalized(graph: fx.Graph) -> None:
    """Replace the nodes of :func:`torch.export.export` for operators that write to their arguments.

    Calls of functional forms take their place. Raise :class:`ConvertError` for an operator without one.
    """
    for node in list(graph.nodes):
        if node.target is not torch.ops.higher_order.auto_functionalized:
            continue
        op = node.args[0]
        form = functional_form(op)
        # In the order of the schema: positional arguments first; an absent optional argument is left out
        arguments = op._schema.arguments
        args = [node.kwargs[a.name] for a in arguments if not a.kwarg_only and a.name in node.kwargs]
        named = {a.name: node.kwargs[a.name] for a in arguments if a.kwarg_only and a.name in node.kwargs}
        if len(args) < sum(not a.kwarg_only for a in arguments):  # one in the middle was left out
            args, named = [], dict(node.kwargs)
        with graph.inserting_before(node):
            new = graph.call_function(form, tuple(args), named)
        new.meta.update(node.meta)
        values = node.meta["val"]
        first = 0 if op._schema.returns else 1  # an operator without results returns None before its written arguments
        kept: Sequence[Any] = values[first:]
        new.meta["val"] = kept[0] if len(kept) == 1 else tuple(kept)
        for user in list(node.users):
            index = user.args[1] - first
            if len(kept) == 1:
                user.replace_all_uses_with(new)
            else:
                with graph.inserting_before(user):
                    item = graph.call_function(user.target, (new, index))
                item.meta.update(user.meta)
                user.replace_all_uses_with(item)
            graph.erase_node(user)
        graph.erase_node(node)


def check_available(operators: Sequence[tuple[str, Provider]], where: str) -> None:
    """Raise :class:`BackendError` with the package of an operator that a bundle needs and nothing here declares."""
    for name, provider in operators:
        if find_operator(name) is None:
            raise BackendError(
                f"{where} calls the operator {name} of {provider}, and nothing here declares it: "
                "install that package, or name its module (--extension MODULE, extensions=[...])"
            )
