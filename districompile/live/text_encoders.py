# SPDX-License-Identifier: Apache-2.0
"""Replay the text encoders of a pipeline as CUDA graphs, as the engines of its network are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from districompile.live.graphed_module import Record, Replay, graph_calls
from districompile.runtime.executor.capture import GraphCapture


def graph_text_encoders(pipe: Any, on_first_call: bool = False) -> None:
    """Make the text encoders of ``pipe`` that are on a GPU replay their calls.

    A call is recorded when it comes for the second time. With ``on_first_call`` it is recorded when it comes for the
    first time, which then takes longer.
    """
    for name, part in pipe.components.items():
        if not name.startswith("text_encoder") or not isinstance(part, nn.Module):
            continue
        device = next((p.device for p in part.parameters()), None)
        if device is not None and device.type == "cuda":
            graph_calls(part, _recorder(device), on_first_call)


def _recorder(device: torch.device) -> Record:
    capture = GraphCapture(device)

    def record(queue: Callable[[], Any]) -> tuple[Replay, Any]:
        graph, result = capture.capture(queue)
        return graph.replay, result

    return record
