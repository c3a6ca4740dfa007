# SPDX-License-Identifier: Apache-2.0
"""The schedulers that the installed diffusers has, by the name of their class."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from districompile.cli.common import UsageError


def scheduler_names() -> list[str]:
    """Return the names of all scheduler classes of diffusers that can be used here."""
    module = importlib.import_module("diffusers.schedulers")
    base = importlib.import_module("diffusers.schedulers.scheduling_utils").SchedulerMixin
    found = []
    for name in dir(module):
        if "Scheduler" not in name:  # its functions, and its outputs
            continue
        cls = getattr(module, name, None)
        if isinstance(cls, type) and issubclass(cls, base) and cls is not base and hasattr(cls, "from_config"):
            found.append(name)
    return found


def scheduler_class(name: str) -> type[Any]:
    """Return a scheduler class of diffusers. Raise :class:`UsageError` for any other name."""
    known = scheduler_names()
    if name not in known:
        start = name.lower()
        holds = [k for k in known if start and start in k.lower()]
        holds.sort(key=lambda k: (not k.lower().startswith(start), len(k)))
        near = holds[:3] or difflib.get_close_matches(name, known, 3, 0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(f"--scheduler {name}: the installed diffusers has no scheduler of that name{hint}")
    found: type[Any] = getattr(importlib.import_module("diffusers.schedulers"), name)
    return found
