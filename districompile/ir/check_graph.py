# SPDX-License-Identifier: Apache-2.0
"""Check by its shapes alone that a stored graph can be run. Nothing is computed, and no memory is allocated."""

from __future__ import annotations

import functools
import numbers
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from districompile.errors import BackendError
from districompile.ir.spec import TensorSpec

_MOST_EXPONENT = 64
_MOST_PARTS = 1 << 16


@functools.cache
def machine_bytes() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def output_specs(module: fx.GraphModule, device: torch.device | None = None) -> tuple[TensorSpec, ...]:
    """Return the output specs of a graph from :func:`~districompile.ir.serialize.graph_from_json`, on ``device`` (cpu).

    Raise :class:`BackendError` for an operator that writes to its arguments, for arguments that an operator does not
    take, and for a value that is larger than this machine's memory.
    """
    mode = FakeTensorMode()  # strides as on the device: a view may depend on them
    values = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
    for value in values:
        _check_size("input", value)
    runner = _Shapes(module)
    try:
        with torch.no_grad(), mode:
            inputs = [torch.empty(v.shape, dtype=v.dtype, device=device or torch.device("cpu")) for v in values]
            results: Sequence[Any] = runner.run(*inputs, enable_io_processing=False)
    except BackendError:
        raise
    except Exception as e:  # whatever an operator raises for arguments that it does not take
        reason = str(e).strip().partition("\n")[0]
        raise BackendError(f"the operator {runner.at} of the graph cannot be computed: {reason}") from None
    for result in results:
        if not isinstance(result, Tensor):
            raise BackendError(f"the graph gives a {type(result).__name__}, not a tensor")
    return tuple(TensorSpec(tuple(r.shape), r.dtype) for r in results)


class _Shapes(fx.Interpreter):
    """An interpreter that runs a graph on fake tensors, and checks each call."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.at = ""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        self.at = str(target) if isinstance(target, torch._ops.OpOverload) else target.__name__
        if isinstance(target, torch._ops.OpOverload):
            if target._schema.is_mutable:
                raise BackendError(f"the graph uses the operator {target}, which writes to its arguments")
            _check_parts(target, args, kwargs)
        elif target.__name__ != "getitem":
            _check_numbers(target.__name__, args)
        result = super().call_function(target, args, kwargs)
        parts = result if isinstance(result, list | tuple) else [result]
        if len(parts) > _MOST_PARTS:
            raise BackendError(f"the graph's {self.at} gives {len(parts)} parts")
        for part in parts:
            if isinstance(part, Tensor):
                _check_size(self.at, part)
            if isinstance(part, int) and abs(part) >= 1 << 63:
                raise BackendError(f"the graph's {self.at} gives a number of more than 64 bits")
        return result


def _check_size(what: str, value: Tensor) -> None:
    if value.numel() * value.itemsize > machine_bytes():
        raise BackendError(f"the graph's {what} gives {list(value.shape)}: more than this machine's memory")


def _check_parts(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise :class:`BackendError` for an operator that returns too many tensors: their list alone would be large."""
    name = target._schema.name
    if name not in ("aten::unbind", "aten::split", "aten::unsafe_split"):
        return
    given: dict[str, Any] = {a.name: a.default_value for a in target._schema.arguments}
    given |= dict(zip(given, args, strict=False)) | kwargs
    size = given.get("split_size", 1)
    if isinstance(size, int) and given["self"].shape[given["dim"]] > _MOST_PARTS * max(1, size):
        raise BackendError(f"the graph's {name} gives more than {_MOST_PARTS} parts")


def _check_numbers(name: str, args: Sequence[Any]) -> None:
    """Raise :class:`BackendError` for arguments of Python's operators other than numbers and tensors.

    With strings and lists, these operators would do other things. Exponents are limited, too.
    """
    for x in args:
        if not isinstance(x, numbers.Number | Tensor):
            raise BackendError(f"the graph gives {name} a {type(x).__name__}")
    if name == "pow" and isinstance(args[-1], int) and abs(args[-1]) > _MOST_EXPONENT:
        raise BackendError(f"the graph raises to the power of {args[-1]}")
