# SPDX-License-Identifier: Apache-2.0
"""Choose which displaced calls of an image become reused ones.

A reused call reads what the last *full* call (exact or displaced) of its stream has computed for deep levels. Of
``every`` calls behind the exact ones, one is full. An exact call counts as full, too, so that the calls behind it are
reused first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from districompile.runtime.calls.call_tracker import Decision


class ReuseCounter:
    """Count the calls of each stream since its last full one. Without ``every``, no call is reused."""

    def __init__(self, every: int | None) -> None:
        self._every = every or 1
        self._since: dict[int, int] = {}  # stream -> reused calls since the last full one

    def reset(self) -> None:
        """Forget all calls. The next call of each stream is full."""
        self._since.clear()

    def check(self, decision: Decision, must_be_full: Callable[[int], bool]) -> Decision:
        """Return ``decision``, with the reused phase instead of the displaced one where the last full call is recent.

        ``must_be_full`` says of a stream that its next call may not be a reused one.
        """
        if decision.phase != "displaced" or decision.reset:
            return decision
        since = self._since.get(decision.stream)
        if since is None or since + 1 >= self._every or must_be_full(decision.stream):
            return decision
        return dataclasses.replace(decision, phase="reused")

    def count(self, decision: Decision) -> None:
        """Take a call into account that was made."""
        if decision.reset:
            self.reset()
        reused = decision.phase == "reused"
        self._since[decision.stream] = self._since.get(decision.stream, 0) + 1 if reused else 0
