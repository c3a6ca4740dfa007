# SPDX-License-Identifier: Apache-2.0
"""Capture the work that a call queues on a GPU into a CUDA graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from districompile.cuda.exchange import kernels
from districompile.cuda.graph_edit import replace_memsets
from districompile.runtime.executor.state import BufferState
from districompile.runtime.trace import Spans

_T = TypeVar("_T")


@dataclasses.dataclass
class CapturedCall:
    """A captured call: what replays it, the buffers after it, its outputs, and its spans while calls are traced."""

    graph: torch.cuda.CUDAGraph
    after: BufferState
    outputs: list[torch.Tensor]
    spans: Spans | None


class GraphCapture:
    """Capture graphs that share one memory pool, on ``device``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def capture(self, queue: Callable[[], _T]) -> tuple[torch.cuda.CUDAGraph, _T]:
        """Capture the work that ``queue`` queues, without running it. Return the graph, and the result of ``queue``."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        own = kernels(self._device)
        graph = torch.cuda.CUDAGraph(keep_graph=own is not None)
        # Other threads (watchdogs of transports) may go on using the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = queue()
        if own is not None:
            replace_memsets(graph.raw_cuda_graph(), own.fill_words)
            graph.instantiate()
        return graph, result
