# SPDX-License-Identifier: Apache-2.0
"""Add operators of this backend to the namespace ``districompile`` of ``torch.ops``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

import districompile.ir.ops  # noqa: F401  (defines the namespace, to which a fragment adds)


class Fragment(Protocol):
    """The methods of ``torch.library.Library`` that are used here, with the types that PyTorch does not declare."""

    def define(self, schema: str, /) -> object:
        """Declare an operator by its schema."""

    def impl(self, name: str, function: Callable[..., object], dispatch_key: str, /) -> object:
        """Register ``function`` as the operator's implementation for a dispatch key of PyTorch."""


def library_fragment() -> Fragment:
    """Open the namespace. The operators live as long as the returned object: keep it in a module's variable."""
    make: Callable[..., Fragment] = torch.library.Library
    return make("districompile", "FRAGMENT")


def register_fake(name: str, function: Callable[..., object], library: Fragment) -> None:
    """Register how Inductor infers the results of the operator ``districompile::name`` from fake tensors."""
    register: Callable[..., object] = torch.library.register_fake
    register(f"districompile::{name}", function, lib=library)
