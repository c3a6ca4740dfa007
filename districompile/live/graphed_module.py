# SPDX-License-Identifier: Apache-2.0
"""Replay the calls of a module that PyTorch runs operator by operator, such as a text encoder, as CUDA graphs.

The host takes longer to queue the many small kernels of a text encoder than the GPU takes to compute them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from districompile.live.adapters import is_adapted

Replay = Callable[[], object]
Record = Callable[[Callable[[], Any]], tuple[Replay, Any]]
"""Record the work that a function queues. Return what repeats it, and the result of the function."""

_MOST_KINDS = 8  # of calls that are recorded: each keeps its results, and memory for what is in between
_CONSTANTS = (bool, int, float, str, type(None), torch.dtype)
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


class GraphedModule:
    """Call a module, and replay its later calls of the same kind.

    Calls are of one kind if their arguments have the same shapes and dtypes, other arguments are equal, and the module
    has its parameters where they were. A call that this cannot tell is made as it is: one with gradients, in training,
    under autocast, with arguments that are neither tensors on the module's device nor constants, or of a module with
    hooks, adapters or quantised weights inside. So is every call of a kind that cannot be recorded, because the host
    waits within it.

    Results are new tensors in each call. ``record`` records the second call of a kind, or with ``on_first_call`` the
    first.
    """

    def __init__(self, module: nn.Module, record: Record, on_first_call: bool = False) -> None:
        self._module, self._forward = module, module.forward
        self._record, self._on_first_call = record, on_first_call
        self._seen: set[Any] = set()
        self._recorded: dict[Any, _Recorded | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module's own ``forward`` returns."""
        kind = self._kind(args, kwargs)
        if kind is None:
            return self._forward(*args, **kwargs)
        if kind in self._recorded:
            found = self._recorded[kind]
            return self._forward(*args, **kwargs) if found is None else found(args, kwargs)
        result = self._forward(*args, **kwargs)
        if self._on_first_call or kind in self._seen:
            self._seen.discard(kind)
            self._forget_moved(kind)
            self._recorded[kind] = self._recording(args, kwargs) if _can_copy(result) else None
        else:
            self._seen = {kind} if len(self._seen) >= _MOST_KINDS else {*self._seen, kind}
        return result

    def _recording(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Recorded | None:
        own = [_copied(a) for a in args], {name: _copied(a) for name, a in kwargs.items()}
        try:
            replay, result = self._record(lambda: self._forward(*own[0], **own[1]))
        except Exception:  # whatever a forward raises that must not wait for the device; it did not raise before
            return None
        return _Recorded([*own[0], *own[1].values()], replay, result)

    def _forget_moved(self, kind: Any) -> None:
        """Drop what was recorded with parameters that are elsewhere now, and the oldest kinds beyond the limit."""
        self._recorded = {k: found for k, found in self._recorded.items() if k[-1] == kind[-1]}
        while len(self._recorded) >= _MOST_KINDS:
            del self._recorded[next(iter(self._recorded))]

    def _kind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what tells calls apart, or None for a call that is made as it is."""
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
            return None
        places = _places(self._module)
        device = None if places is None else next((p[1] for p in places), None)
        if device is None or torch.is_autocast_enabled(device.type):
            return None
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        found: list[Any] = []
        for name, value in (*enumerate(args), *kwargs.items()):
            if type(value) is Tensor and value.device == device:
                found.append((name, value.shape, value.dtype))
            elif isinstance(value, _CONSTANTS):
                found.append((name, type(value), value))
            else:
                return None
        return (*found, places)


class _Recorded:
    def __init__(self, inputs: list[Any], replay: Replay, result: Any) -> None:
        self._inputs, self._replay, self._result = inputs, replay, result

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for own, given in zip(self._inputs, (*args, *kwargs.values()), strict=True):
            if isinstance(own, Tensor):
                own.copy_(given)
        self._replay()
        return pytree.tree_map(_copied, self._result)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _can_copy(result: Any) -> bool:
    """Say whether all tensors of a result are found by going through it."""
    return all(isinstance(leaf, (Tensor, *_CONSTANTS)) for leaf in pytree.tree_leaves(result))


def _places(module: nn.Module) -> tuple[tuple[int, torch.device], ...] | None:
    """Return the addresses and devices of a module's parameters and buffers; None for a module that is not plain."""
    found: list[tuple[int, torch.device]] = []
    for part in module.modules():
        outer = part is module  # whose hooks are called around its forward
        hooks = () if outer else (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
        # The scale of an adapter is a number of Python, which a graph would keep
        if part.training or not all(map(_only_collects, hooks)) or is_adapted(part):
            return None
        held = [x for x in (*part._parameters.values(), *part._buffers.values()) if x is not None]
        if any(type(x) not in _PLAIN for x in held):  # quantised, say: such a tensor holds others, and has no address
            return None
        found += [(x.data_ptr(), x.device) for x in held]
    return tuple(found) if len({device for _, device in found}) == 1 else None


def _only_collects(hook: Callable[..., Any]) -> bool:
    """Say whether a hook is of the transformers package, which collects hidden states of layers for the result."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def graph_calls(module: nn.Module, record: Record, on_first_call: bool = False) -> None:
    """Make ``module`` replay its calls (:class:`GraphedModule`). It stays the object that it is."""
    graphed = GraphedModule(module, record, on_first_call)

    @functools.wraps(module.forward)  # pipelines read its parameters
    def forward(*args: Any, **kwargs: Any) -> Any:
        return graphed(*args, **kwargs)

    module.forward = forward
