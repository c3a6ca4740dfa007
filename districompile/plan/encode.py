# SPDX-License-Identifier: Apache-2.0
"""Plans as JSON values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from districompile.ir.spec import dtype_name


def encoded(x: Any) -> Any:
    """Return a plan, or a part of it, as values of JSON: objects carry their class."""
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        fields = {f.name: encoded(getattr(x, f.name)) for f in dataclasses.fields(x)}
        return {"@": type(x).__name__, **fields}
    if isinstance(x, torch.dtype):
        return {"@dtype": dtype_name(x)}
    if isinstance(x, Mapping):
        return {str(k): encoded(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [encoded(v) for v in x]
    return x


def frozen(x: Any) -> Any:
    """Return ``x`` with tuples in place of lists."""
    if isinstance(x, dict):
        return {k: frozen(v) for k, v in x.items()}
    return tuple(frozen(v) for v in x) if isinstance(x, list) else x
