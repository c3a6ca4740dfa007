"""A phase with its collectives inside, computed on all ranks in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from districompile.ir.segment import SegmentGraph


def run_joined(segments: Sequence[SegmentGraph], values: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Compute a whole phase on all ranks in this process: the yardstick of engines with collectives inside.

    ``segments`` and ``values`` (inputs and weights by name) are by rank; gives each rank's outputs by name. Ranks take
    turns from one collective to the next: their graphs hold the same ones in the same order.
    """
    runs = [_Run(s, v) for s, v in zip(segments, values, strict=True)]
    for sent, received, ranks, op in segments[0].collectives:
        together = [run.until(sent) for run in runs]
        for rank, run in enumerate(runs):
            parts = [t.reshape(ranks, -1)[rank] for t in together] if op == "all_to_all" else together
            run.give(received, torch.cat(parts))
    return [run.outputs() for run in runs]


class _Run:
    """One rank's graph, computed as far as it is asked for."""

    def __init__(self, segment: SegmentGraph, values: Mapping[str, Tensor]) -> None:
        self._segment = segment
        names = [n for n, _ in (*segment.inputs, *segment.weights)]
        holders = [n for n in segment.graph.graph.nodes if n.op == "placeholder"]
        self._holder = dict(zip(names, holders, strict=True))
        self._env: dict[fx.Node, Any] = {self._holder[n]: v for n, v in values.items() if n in self._holder}
        ends = segment.graph.graph.output_node().args[0]
        assert isinstance(ends, tuple)
        self._ends: dict[str, Any] = {n: e for (n, _), e in zip(segment.outputs, ends, strict=True)}

    def give(self, name: str, value: Tensor) -> None:
        self._env[self._holder[name]] = value

    def until(self, name: str) -> Tensor:
        """The output ``name``, from what was given so far."""
        pending = [self._ends[name]]
        while pending:
            node = pending[-1]
            missing = [n for n in node.all_input_nodes if n not in self._env]
            if node in self._env or not missing:
                pending.pop()
                if node not in self._env:
                    args, kwargs = fx.map_arg((node.args, node.kwargs), self._env.__getitem__)
                    self._env[node] = node.target(*args, **kwargs)
            else:
                pending += missing
        value: Tensor = self._env[self._ends[name]]
        return value

    def outputs(self) -> dict[str, Tensor]:
        inner = {c.sent for c in self._segment.collectives}
        return {name: self.until(name) for name, _ in self._segment.outputs if name not in inner}
