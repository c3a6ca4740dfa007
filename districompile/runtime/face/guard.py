# SPDX-License-Identifier: Apache-2.0
"""Checks around each call of a converted module: threads, autocast, tracing, CUDA graphs and gradients."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch

from districompile.errors import InputError
from districompile.frontend.call_tree import leaves_of


class CallGuard:
    """Serialise the calls of a module, and refuse calls after it was closed.

    The state of an image belongs to the calls of one thread. A call from another thread than the last one starts a new
    image. Threads that take turns therefore get exact calls: correct, but slow.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread = threading.local()
        self._last: object | None = None  # the token of the thread of the last call
        self._closed = False

    @property
    def exact(self) -> bool:
        """Whether this thread's calls are to be exact."""
        return getattr(self._thread, "exact", False)

    @exact.setter
    def exact(self, value: bool) -> None:
        self._thread.exact = value

    @contextlib.contextmanager
    def call(self, start_image: Callable[[], None]) -> Iterator[None]:
        """Hold the module for one call. Call ``start_image`` first if the last call came from another thread."""
        with self._lock:
            if self._closed:
                raise InputError("this module was closed: load the bundle again")
            if not hasattr(self._thread, "token"):
                self._thread.token = object()  # thread identifiers are reused after a thread has ended
            if self._last not in (None, self._thread.token):
                start_image()
            self._last = self._thread.token
            yield

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Wait for the current call, and refuse later ones."""
        with self._lock:
            self._closed = True
            yield


def guarded(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the ``forward`` of a converted module, whose ``_calls_guard`` is a :class:`CallGuard`."""

    @functools.wraps(forward)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        _check_surroundings(self.device)
        with self._calls_guard.call(self.reset), _neutral_defaults():
            output = forward(self, *args, **kwargs)
        if torch.is_grad_enabled():
            _refuse_gradients(output, (args, list(kwargs.values())))
        return output

    untraced: Callable[..., Any] | None = None

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal untraced
        if "torch._dynamo" not in sys.modules:  # its import takes a second
            return checked(self, *args, **kwargs)
        if untraced is None:
            reason = "a converted module is compiled already: leave torch.compile out, or call it without fullgraph"
            untraced = torch.compiler.disable(checked, reason=reason)  # type: ignore[no-untyped-call]
        return untraced(self, *args, **kwargs)

    return call


def _check_surroundings(device: torch.device) -> None:
    if torch.is_autocast_enabled(device.type):
        raise InputError(
            "a call inside torch.autocast: the dtypes of a converted module are fixed. Leave autocast for the call "
            f"(`with torch.autocast({device.type!r}, enabled=False)`), or convert with --dtype"
        )
    tracing = torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
    if tracing or torch.compiler.is_exporting():
        raise InputError("a converted module cannot be traced or exported: trace the original module")
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise InputError(
            "a converted module cannot be captured in a CUDA graph: it replays graphs of its own; leave the capture out"
        )


@contextlib.contextmanager
def _neutral_defaults() -> Iterator[None]:
    """Allocate memory without an explicit device on the host, whatever the caller's default device is."""
    if torch.get_default_device().type == "cpu":
        yield
    else:
        with torch.device("cpu"):
            yield


class _NoGradient(torch.autograd.Function):
    """Mark an output as computed from inputs that require gradients. No gradient passes through it."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        raise InputError(
            "a converted module computes no gradients: call it with torch.no_grad(), or use the original module"
        )


def _refuse_gradients(output: Any, given: Any) -> None:
    """Make an output require gradients where an input does, as the original's would, and refuse to compute them."""
    inputs = [t for t in leaves_of(given) if t.requires_grad]
    if not inputs:
        return
    for leaf in leaves_of(output.to_tuple() if hasattr(output, "to_tuple") else output):
        if leaf.is_floating_point():
            _NoGradient.apply(leaf, *inputs)  # type: ignore[no-untyped-call]
