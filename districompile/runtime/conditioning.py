"""Whether inputs that the displaced phase takes for constant still are what they were in the last exact call."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence

import torch

from districompile.runtime.streams import Decision

_OFTEN = 3  # changes in a row


@dataclasses.dataclass
class _Seen:
    """A tensor as it was, without holding on to what a caller does to it."""

    tensor: torch.Tensor
    version: int | None
    copy: torch.Tensor

    @staticmethod
    def of(tensor: torch.Tensor) -> _Seen:
        return _Seen(tensor, _version(tensor), tensor.detach().clone())

    def is_still(self, tensor: torch.Tensor) -> bool:
        """Waits for the device only where ``tensor`` is other memory, or was written to. (Another object for the same
        memory is usual: what is checked is detached at every call. The memory cannot have been freed in between.)"""
        if self.version is not None and _version(tensor) == self.version and _place(tensor) == _place(self.tensor):
            return True
        if tensor.shape != self.copy.shape or not torch.equal(tensor.to(self.copy), self.copy):
            return False
        self.tensor, self.version = tensor, _version(tensor)
        return True


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """What memory a tensor reads, and how. The storage itself, not its address: a compiled encoder may give another
    result at the same address."""
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _version(tensor: torch.Tensor) -> int | None:
    """How often it was written to; None for inference tensors, which do not count."""
    return None if tensor.is_inference() else int(tensor._version)


class Conditioning:
    """Follows the inputs ``paths`` through the calls of a module; each stream of calls has its own last exact call."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = tuple(paths)
        self._seen: dict[int, dict[str, _Seen]] = {}
        self._changes = 0

    def reset(self) -> None:
        """Nothing is known of earlier calls."""
        self._seen.clear()

    def check(self, decision: Decision, given: Mapping[str, torch.Tensor]) -> Decision:
        """``decision``, or an exact call instead of a displaced one where an input has changed."""
        if not self._paths:
            return decision
        if decision.reset:
            self.reset()
        seen = self._seen.get(decision.stream, {})
        changed = [p for p in self._paths if p in seen and not seen[p].is_still(given[p])]
        if decision.phase == "steady" and seen:
            self._changes = self._changes + 1 if changed else 0
            if changed:
                decision = dataclasses.replace(decision, phase="warmup")
            if self._changes == _OFTEN:
                warnings.warn(
                    f"{changed[0]} changes from step to step, so that each is computed exactly: convert without the "
                    "optimisation hoist-conditioning",
                    stacklevel=2,
                )
        if decision.phase == "warmup" and (changed or not seen):
            self._seen[decision.stream] = {p: _Seen.of(given[p]) for p in self._paths}
        return decision
