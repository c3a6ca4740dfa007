# SPDX-License-Identifier: Apache-2.0
"""The ranks of a module as the process sees them that calls it: each call is sent to worker processes.

This process is no rank. It decides what a call is, as rank 0 does elsewhere: the image that it belongs to, and its
phase. Conditioning is sent when it changes. A text encoder's output is therefore sent once an image.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from districompile.bundle.bundle import Bundle
from districompile.errors import InputError, LaunchError
from districompile.plan.plan import ExecutionPlan
from districompile.runtime.calls.agreement import Proposal, kinds_of
from districompile.runtime.calls.call_tracker import Decision
from districompile.runtime.workers.group import Workers

_LOADING = 120.0  # seconds without a sign of life while libraries are imported and engines loaded
_numbers = itertools.count()


class WorkersRunner:
    """Send calls to ``workers``, which load the bundle with ``options``. ``owned``: they end with this runner.

    Raises :class:`districompile.Error` for a bundle that they cannot load.
    """

    leads = True

    def __init__(
        self, bundle: Path, plans: Mapping[str, ExecutionPlan], workers: Workers, device: torch.device,
        options: Mapping[str, Any], owned: bool,
    ) -> None:  # fmt: skip
        self._workers, self._device, self._owned = workers, device, owned
        self._number = next(_numbers)
        load = {"type": "load", "module": self._number, "bundle": str(bundle), "options": dict(options)}
        replies = workers.ask(load, silence=_LOADING)
        self.transport = str(replies[0]["transport"])
        self._small = [_small(plan) for plan in plans.values()]
        self._forget = weakref.finalize(self, workers.forget, self._number)
        self._forget.atexit = False

    def call(self, proposal: Proposal) -> tuple[Decision, list[torch.Tensor]]:
        """Run one call on all workers. Return the decision as it is, and the output leaves on the caller's device."""
        decision = proposal.decision
        small = self._small[proposal.shape]
        names = [n for n in proposal.inputs if proposal.fresh or n not in small]
        message = {
            "type": "call", "module": self._number, "shape": proposal.shape, "fresh": proposal.fresh,
            "decision": [decision.phase, decision.stream, decision.reset], "names": names,
            "keep": [n for n in names if n in small],
            "timestep": None if proposal.timestep is None else float(proposal.timestep).hex(),
        }  # fmt: skip
        replies = self._workers.ask(message, [proposal.inputs[n] for n in names])
        return decision, [leaf.to(self._device) for leaf in self._workers.tensors(replies[0])]

    def refuse(self) -> None:
        """Do nothing: workers are sent calls alone that are valid."""

    def unknown(self, key: int) -> contextlib.AbstractContextManager[None]:
        """Do nothing: no worker knows of the call yet."""
        return contextlib.nullcontext()

    def add(self, plan: ExecutionPlan, engines: Any) -> None:
        """Have the workers load a further shape. ``engines`` is its name in the bundle."""
        self._workers.ask({"type": "add", "module": self._number, "shape": str(engines)}, silence=_LOADING)
        self._small.append(_small(plan))

    def close(self) -> None:
        """Close the bundle on the workers, and end those that were started for it."""
        self._forget.detach()
        if self._workers.alive and not self._owned:
            self._workers.ask({"type": "close", "module": self._number})
        if self._owned:
            self._workers.close()


def _small(plan: ExecutionPlan) -> frozenset[str]:
    """Return the inputs that are sent when they change."""
    return frozenset(i.path for i in kinds_of(plan.inputs, plan.timestep_path)[1])


def call_workers(
    bundle: Bundle, plans: Mapping[str, ExecutionPlan], workers: int | Workers, device: torch.device,
    options: Mapping[str, Any],
) -> tuple[WorkersRunner, Callable[[Bundle, ExecutionPlan], str]]:  # fmt: skip
    """Return a runner whose calls ``workers`` compute, and a function that finds an added shape for its ``add``.

    ``options`` are those with which each worker loads the bundle. Raises :class:`LaunchError` for another number of
    workers than the bundle was made for, and :class:`InputError` for an option that only one process can have.
    """
    needed = bundle.plan.world_size
    count = workers if isinstance(workers, int) else workers.ranks
    if count != needed:
        raise LaunchError(f"{bundle.path} was converted for {needed} processes: load it with workers={needed}")
    for name in ("backend", "transport", "extensions"):
        given = options[name]
        values = given if isinstance(given, list) else [given]
        if not all(v is None or isinstance(v, str) for v in values):
            raise InputError(f"{name}: workers are other processes, so it must be given by name, not as an object")
    group = Workers(workers) if isinstance(workers, int) else workers
    owned = isinstance(workers, int)
    try:
        runner = WorkersRunner(bundle.path.resolve(), plans, group, device, options, owned)
    except BaseException:
        if owned:
            group.close()
        raise
    return runner, lambda found, plan: next(name for name, p in found.plans.items() if p is plan)
