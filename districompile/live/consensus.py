# SPDX-License-Identifier: Apache-2.0
"""The ranks of live modules: they compare their calls, and rank 0 converts for all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from districompile.errors import ConvertError, RanksDifferError
from districompile.runtime.processes.liveness import FOREVER, Liveness
from districompile.runtime.transports.gloo import GlooGroup, new_group, start_gloo


class Consensus:
    """The agreement of all processes on which conversion a call needs. One process alone agrees with itself."""

    def __init__(self, processes: int, start_timeout: float, timeout: float) -> None:
        self.rank, self._count = 0, 0
        self._group: GlooGroup | None = None
        if processes > 1:
            start_gloo(start_timeout=start_timeout)
            self._liveness = Liveness.of_default_group(timeout, start_timeout)
            self._group = GlooGroup(new_group(range(dist.get_world_size()), FOREVER), liveness=self._liveness)
            self.rank = dist.get_rank()

    def agree(self, name: str, call: str, structure: str, weights: str) -> None:
        """Check that all ranks make the same call of the same module.

        Raises :class:`RanksDifferError` on all ranks alike if they do not.
        """
        if self._group is None:
            return
        own = torch.tensor([_number(name), _number(call), _number(structure), _number(weights)], dtype=torch.int64)
        self._liveness.enter()
        try:
            every = self._group.all_gather(own)
        finally:
            self._liveness.leave()
        what = ("another component", "inputs of other shapes", "another structure", "other weights or adapters")
        for rank, found in enumerate(every):
            for i, difference in enumerate(what):
                if found[i] != every[0][i]:
                    raise RanksDifferError(
                        f"rank {rank} calls {difference} than rank 0 ({name}): all ranks make the same calls and the "
                        "same changes"
                    )

    def first_does(self, work: Callable[[], str]) -> str:
        """Let rank 0 do ``work``, and return its result on all ranks. Its error is raised on all ranks."""
        if self._group is None:
            return work()
        facts: dict[str, Any] = {}
        failure: Exception | None = None
        if self.rank == 0:
            try:
                facts = {"result": work()}
            except Exception as e:
                facts, failure = {"error": str(e)}, e
        self._count += 1
        first = self._liveness.exchange(f"work{self._count}", facts)[0]
        if failure is not None:
            raise failure
        if "error" in first:
            raise ConvertError(first["error"])
        return str(first["result"])

    def close(self) -> None:
        """Leave the other ranks."""
        if self._group is not None:
            self._group.close()
            self._liveness.close()
            self._group = None


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
