# SPDX-License-Identifier: Apache-2.0
"""Answer questions about values that follow from sizes alone, while a module is exported.

An export runs a module on fake tensors, which have no values. A module may nevertheless need some to choose sizes:
resizing by a factor computes its border as ``torch.ceil(torch.arange(rows) * scale - support)[0].item()``. Inputs have
fixed sizes in a conversion, so such a value is a constant. :class:`KnownValues` computes tensors that are made of
Python numbers alone a second time, with values, and answers ``item``, ``int``, ``bool`` and the like from them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

_MAKERS = {
    torch.tensor, torch.as_tensor, torch.scalar_tensor, torch.arange, torch.linspace, torch.logspace, torch.full,
    torch.zeros, torch.ones, torch.eye, torch.tril_indices, torch.triu_indices,
}  # fmt: skip
_QUESTIONS = {
    Tensor.item, Tensor.tolist, Tensor.__int__, Tensor.__float__, Tensor.__bool__, Tensor.__index__,
    Tensor.__complex__, Tensor.is_nonzero, torch.is_nonzero, torch.equal, Tensor.equal, torch.allclose, Tensor.allclose,
}  # fmt: skip
_DRAWN = ("rand", "normal", "uniform", "bernoulli", "multinomial", "poisson", "exponential", "cauchy", "geometric",
          "dropout", "rrelu", "gumbel", "empty")  # fmt: skip
# Of the layout of a tensor. An export asks some hundred thousand of these questions about a large network.
_LAYOUT = {
    "stride", "storage_offset", "_is_view", "size", "numel", "untyped_storage", "is_inference", "is_conj", "is_neg",
    "dim", "is_floating_point", "is_contiguous", "is_complex", "element_size", "get_device",
}  # fmt: skip
_LARGEST = 1 << 20  # elements of a tensor that is computed twice
_DATA = cast(Any, Tensor.data).__get__


class KnownValues(TorchFunctionMode):
    """Keep the values of tensors that are made of Python numbers alone, and read ``x.data`` as ``x.detach()``.

    A value is forgotten where a module writes something else into any tensor whose value is known, since the two may
    share memory. Random numbers and uninitialised memory are never known. ``x.data`` hides from an export which
    parameter is written to, and ``x.detach()`` does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: MutableMapping[Tensor, Tensor] = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in _LAYOUT:
            return func(*args, **kwargs)
        if name == "__get__":
            if func == _DATA:
                return args[0].detach()
            found = func(*args, **kwargs)
            if not isinstance(found, Tensor):  # as x.mT is
                return found
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        known = all(t in self._values for t in tensors)
        if known and tensors and func in _QUESTIONS:
            with contextlib.suppress(Exception):  # else the export says what is wrong
                return self._compute(func, args, kwargs)
        writes = _writes(func, kwargs)
        result = func(*args, **kwargs)
        symbolic = any(isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool) for x in leaves)
        drawn = any(word in name for word in _DRAWN)
        if not known or symbolic or drawn or not (tensors or func in _MAKERS):
            if writes and any(t in self._values for t in tensors):
                self._values.clear()
            return result
        made = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        if made or writes:
            self._remember(made, func, args, kwargs)
        return result

    def _remember(self, made: list[Tensor], func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if sum(x.numel() for x in made) > _LARGEST:
            self._values.clear()  # it may be a view that is written to
            return
        try:
            values = [x for x in pytree.tree_leaves(self._compute(func, args, kwargs)) if isinstance(x, Tensor)]
        except Exception:  # such as a tensor on a device by name, and one on the CPU
            self._values.clear()
            return
        if [tuple(x.shape) for x in made] == [tuple(x.shape) for x in values]:
            self._values.update(zip(made, values, strict=True))
        else:
            self._values.clear()

    def _compute(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        def value(x: Any) -> Any:
            if isinstance(x, torch.device):
                return torch.device("cpu")
            return self._values[x] if isinstance(x, Tensor) else x

        known, named = pytree.tree_map(value, (tuple(args), dict(kwargs)))
        if named.get("device") is not None:
            named["device"] = "cpu"
        with _disable_current_modes(), torch.no_grad():
            return func(*known, **named)


def _writes(func: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return whether a function of PyTorch may write to its arguments, by its name."""
    name = getattr(func, "__name__", "")
    in_place = name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    return in_place or name == "__set__" or bool(kwargs.keys() & {"out", "inplace"})
